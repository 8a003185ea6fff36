"""Prompts: the built-in task or JSONL files, the order in which tickets visit them, answers.

Left out: streaming data sets, several tasks at once, answer checkers that run code.
"""

import hashlib
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

import torch

import checks
from assets import task
from config import Config

# A minus after a digit, a letter or a bracket is no sign.
NUMBER = r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
IN_BRACES = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # text with up to two levels of inner braces


@dataclass(frozen=True)
class Prompt:
    text: str  # as the model sees it, chat template applied
    ids: list[int]
    answer: str | None = None


def read_jsonl(path: str, tokenizer, limit: int):
    """The prompts of a UTF-8 file, one JSON object per line.

    `prompt` is tokenized as plain text, with the tokenizer's own special tokens. `messages` go
    through the chat template, which puts in its own. `limit`: most tokens that a prompt may have.
    Raises InputError with the line that cannot be used.
    """
    prompts = []
    for where, item in checks.json_lines(path):
        text = checks.prompt_text(where, item, tokenizer)
        ids = tokenizer(text, add_special_tokens="prompt" in item).input_ids
        checks.check_prompt(where, text, ids, limit, tokenizer)
        answer = item.get("answer")
        prompts.append(Prompt(text, ids, None if answer is None else str(answer)))
    checks.require(prompts, f"{path}: no prompts in it (up to {limit} tokens long)")
    return prompts


def load_prompts(config: Config, tokenizer):
    """(training prompts, evaluation prompts). No evaluation prompt occurs in training."""
    limit = config.max_prompt_tokens
    if config.prompts:
        train = read_jsonl(config.prompts, tokenizer, limit)
        held_out = hold_out(config, train)
    else:
        train, held_out = task.load(config, tokenizer)
    if config.eval_prompts:
        held_out = read_jsonl(config.eval_prompts, tokenizer, limit)
        checks.require(
            all(prompt.answer is not None for prompt in held_out),
            f"{config.eval_prompts}: every evaluation prompt needs an `answer`",
        )
    seen = {prompt.text for prompt in held_out}
    train = [prompt for prompt in train if prompt.text not in seen]
    checks.require(train, f"{config.prompts}: all are evaluation prompts, none is left to train on")
    checks.check_ids(config, train + held_out)
    return train, held_out[: config.eval_size]


def fingerprint(prompts: list[Prompt]):
    """Equal for equal prompts in equal order."""
    texts = [f"{prompt.text}\0{prompt.answer}" for prompt in prompts]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def hold_out(config, prompts):
    """A tenth of the prompts, of those with an answer, in random order."""
    answered = {prompt.text: prompt for prompt in prompts if prompt.answer is not None}
    texts = sorted(answered)
    order = permutation(len(texts), config.seed).tolist()
    count = min(config.eval_size, len(prompts) // 10)
    return [answered[texts[i]] for i in order[:count]]


def prompt_of(ticket: int, num_prompts: int, config: Config):
    """Index of a ticket's prompt. `samples_per_prompt` tickets share it; epochs differ in order."""
    epoch, index = divmod(ticket // config.samples_per_prompt, num_prompts)
    return int(permutation(num_prompts, config.seed * 1_000_003 + epoch)[index])


@lru_cache(maxsize=1)
def permutation(count: int, seed: int):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def is_correct(response: str, answer: str):
    """Does the response equal the answer? Else its last \\boxed{...}, else its last number."""
    response, answer = response.strip(), answer.strip()
    return response == answer or is_equal(conclusion(response), answer)


def conclusion(response):
    """What the response ends in: the last box, or else the last number."""
    boxed = re.findall(rf"\\boxed\{{({IN_BRACES})\}}", response)
    return (boxed or re.findall(NUMBER, response) or [""])[-1].strip(" ,")


def is_equal(a, b):
    """As numbers, or else as text."""
    a, b = (re.sub(r"(?<=\d),(?=\d{3}\b)", "", text) for text in (a, b))
    try:
        return a == b or Decimal(a) == Decimal(b)
    except ArithmeticError:
        return False
