"""Prompts: the built-in task or JSONL files, and the order in which tickets visit them.

Left out: streaming data sets, several tasks at once.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from support import task
from support.config import Config, refusal, require
from support.load import shared_vocabulary

BUILTIN_PROMPTS = 20_000


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
    for where, item in json_lines(path):
        text = prompt_text(where, item, tokenizer)
        ids = tokenizer(text, add_special_tokens="prompt" in item).input_ids
        check_prompt(where, text, ids, limit, tokenizer)
        answer = item.get("answer")
        prompts.append(Prompt(text, ids, None if answer is None else str(answer)))
    require(prompts, f"{path}: no prompts in it (up to {limit} tokens long)")
    return prompts


def load_prompts(config: Config, tokenizer):
    """(training prompts, evaluation prompts). No evaluation prompt occurs in training."""
    limit = config.max_prompt_tokens
    if config.prompts:
        train = read_jsonl(config.prompts, tokenizer, limit)
        held_out = hold_out(config, train)
    else:
        train, held_out = builtin_prompts(config, tokenizer)
    if config.eval_prompts:
        held_out = read_jsonl(config.eval_prompts, tokenizer, limit)
        require(
            all(prompt.answer is not None for prompt in held_out),
            f"{config.eval_prompts}: every evaluation prompt needs an `answer`",
        )
    seen = {prompt.text for prompt in held_out}
    train = [prompt for prompt in train if prompt.text not in seen]
    require(train, f"{config.prompts}: all are evaluation prompts, none is left to train on")
    check_ids(config, train + held_out)
    return train, held_out[: config.eval_size]


def builtin_prompts(config: Config, tokenizer):
    """(training prompts, evaluation prompts) of the built-in task."""
    train = task.running_sums(BUILTIN_PROMPTS, config.seed, heldout=False)
    held_out = task.running_sums(config.eval_size, task.EVALUATION_SEED, heldout=True)
    ids = tokenizer([text for text, _ in train + held_out]).input_ids
    prompts = [Prompt(text, own, answer) for (text, answer), own in zip(train + held_out, ids)]
    longest = max(map(len, ids))
    limit = config.max_prompt_tokens
    fix = f"--max-prompt-tokens is {limit}: raise it"
    require(longest <= limit, f"built-in prompts have up to {longest} tokens, {fix}")
    return prompts[: len(train)], prompts[len(train) :]


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


# ---- the order of prompts --------------------------------------------------------------------


def prompt_of(ticket: int, num_prompts: int, config: Config):
    """Index of a ticket's prompt. `samples_per_prompt` tickets share it; epochs differ in order."""
    epoch, index = divmod(ticket // config.samples_per_prompt, num_prompts)
    return int(permutation(num_prompts, config.seed * 1_000_003 + epoch)[index])


@lru_cache(maxsize=1)
def permutation(count: int, seed: int):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# ---- prompt files ------------------------------------------------------------------------------


def json_lines(path: str):
    """Yield (where, object) for every line that is not blank."""
    with refusal(f"{path}: a file of JSON lines in UTF-8 is needed"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if line.strip():
            yield where, parse_line(where, line)


def parse_line(where, line):
    with refusal(f"{where}: one JSON object per line is needed"):
        item = json.loads(line)
        json.dumps(item, ensure_ascii=False).encode()  # not of half a surrogate pair
    require(
        isinstance(item, dict) and ("prompt" in item) != ("messages" in item),
        f"{where}: needs an object with either `prompt` (text) or `messages` (chat list), not both",
    )
    answer = item.get("answer", "")
    require(
        answer is None or isinstance(answer, (str, int, float)),
        f"{where}: `answer` is {type(answer).__name__}, text or a number is needed",
    )
    return item


def prompt_text(where, item, tokenizer):
    """The `prompt`, or the `messages` through the chat template."""
    text = item.get("prompt")
    if "messages" in item:
        text = apply_template(where, item["messages"], tokenizer)
    require(
        text and isinstance(text, str),
        f"{where}: the prompt is empty or not text: {json.dumps(item)[:80]}",
    )
    return text


def apply_template(where, messages, tokenizer):
    require(
        tokenizer.chat_template,
        f"{where}: has `messages`, but the student's tokenizer has no chat template: use `prompt`",
    )
    refused = f"{where}: the chat template refuses `messages`"
    require(isinstance(messages, list), f"{refused}: a list is needed")
    with refusal(refused):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def check_ids(config, prompts):
    vocab = shared_vocabulary(config)
    highest = max(max(prompt.ids) for prompt in prompts)
    require(highest < vocab, f"a prompt has token {highest}, the models know {vocab} tokens")


def check_prompt(where, text, ids, limit, tokenizer):
    require(
        len(ids) <= limit,
        f"{where}: {len(ids)} tokens, --max-prompt-tokens is {limit}: raise it or drop the line",
    )
    require(ids, f"{where}: the prompt has no tokens: {text!r}")
    ordinary = {None, tokenizer.bos_token_id, tokenizer.eos_token_id}
    is_known = tokenizer.unk_token_id in ordinary or tokenizer.unk_token_id not in ids
    require(
        is_known,
        f"{where}: the prompt has characters that the tokenizer does not know: {text!r}",
    )
