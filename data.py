"""Prompts: the built-in task, JSONL files, the order in which tickets visit them, answer checking.

The built-in task is *running sums*: the prompt `a47+b58+c91=` asks for the running totals, each named after the
last addend in it, three digits, least significant first: `b501,c691`. Every response digit may be written with any
of 16 synonym tokens, which the tokenizer decodes to the same digit; the teacher draws them from a Zipf law. So there
is arithmetic to learn, and a style with entropy, which is what makes top-k supports, sampling and staleness matter.

Left out: streaming data sets, several tasks at once, answer checkers that run code.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

SYNONYMS = 16  # tokens that decode to one digit: "7", "7A", ... "7O"
ADDENDS, NAMES = range(2, 9), "abcdefgh"
ADDEND_DECAY = 0.85  # P(n addends) is proportional to ADDEND_DECAY ** n: many short responses, a long tail


class DataError(ValueError):
    """A prompt file that cannot be used; the message names the line, the limit and the fix."""


@dataclass(frozen=True)
class Prompt:
    text: str  # as the model sees it, chat template applied
    ids: list[int]
    answer: str | None = None


# ---- the built-in task ------------------------------------------------------------------------------


def running_sums(count: int, seed: int, heldout: bool) -> list[tuple[str, str]]:
    """`count` distinct (prompt, answer) pairs. A prompt is held out if its checksum says so: disjoint by construction."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([ADDEND_DECAY**n for n in ADDENDS])
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        size = ADDENDS[int(torch.multinomial(weights, 1, generator=generator))]
        addends = torch.randint(10, 100, (size,), generator=generator)
        prompt = "+".join(name + str(addend) for name, addend in zip(NAMES, addends.tolist())) + "="
        if (zlib.crc32(prompt.encode()) % 16 == 0) == heldout:
            totals = zip(NAMES[1:], addends.cumsum(0)[1:].tolist())
            pairs[prompt] = ",".join(name + f"{total:03d}"[::-1] for name, total in totals)
    return list(pairs.items())


def build_tokenizer():
    """The built-in task's tokenizer: one token per digit synonym, name and sign, and two specials (V = 173)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [""] + [chr(ord("A") + i) for i in range(SYNONYMS - 1)]
    words = ["<pad>", "<eos>", *"+=,", *NAMES, *(digit + letter for digit in "0123456789" for letter in letters)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9][A-O]?|[+=,a-h]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("[A-O]"), ""), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


# ---- any task: JSONL files ----------------------------------------------------------------------------


def read_jsonl(path: str, tokenizer, limit: int, drop_long: bool = False) -> list[Prompt]:
    """The prompts of a file (UTF-8), one JSON object per line. Raises DataError naming the line that cannot be used.

    `prompt` is tokenized as plain text, with the tokenizer's own special tokens; `messages` go through the chat
    template, which puts in its own. `limit`: most tokens a prompt may have; `drop_long` leaves longer ones out.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}: give a file of JSON lines in UTF-8") from None
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id}
    prompts, dropped = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error}: one object per line is needed") from None
        if not isinstance(item, dict) or ("prompt" in item) == ("messages" in item):
            raise DataError(f"{where}: needs an object with either `prompt` (text) or `messages` (chat list), not both")
        answer = item.get("answer")
        if answer is not None and not isinstance(answer, (str, int, float)):
            raise DataError(f"{where}: `answer` is {type(answer).__name__}, text or a number is needed")
        if "messages" in item and not tokenizer.chat_template:
            raise DataError(f"{where}: has `messages`, but the student's tokenizer has no chat template: use `prompt`")
        text = item.get("prompt")
        if "messages" in item:
            try:
                if not isinstance(item["messages"], list):
                    raise TypeError(f"it is {type(item['messages']).__name__}, a list is needed")
                text = tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
            except Exception as error:  # jinja errors, wrong types: whatever the template raises on bad messages
                raise DataError(f"{where}: the chat template refuses `messages`: {error}") from None
        if not isinstance(text, str) or not text:
            raise DataError(f"{where}: the prompt is empty or not text: {json.dumps(item)[:80]}")
        ids = tokenizer(text, add_special_tokens="prompt" in item).input_ids
        if len(ids) > limit and not drop_long:
            raise DataError(f"{where}: {len(ids)} tokens, --max-prompt-tokens is {limit}: raise it or pass --drop-long-prompts")
        if len(ids) > limit:
            dropped += 1
        elif not ids or unknown & set(ids):
            raise DataError(f"{where}: the prompt {'has characters that the tokenizer does not know' if ids else 'has no tokens'}: {text!r}")
        else:
            prompts.append(Prompt(text, ids, None if answer is None else str(answer)))
    if not prompts:
        why = f": all {dropped} are longer than --max-prompt-tokens {limit}, raise it" if dropped else ""
        raise DataError(f"{path}: no prompts in it{why}")
    return prompts


def load_prompts(config, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, evaluation prompts). Evaluation prompts have answers and never occur in training."""
    limit, drop, held = config.max_prompt_tokens, config.drop_long_prompts, []
    if config.prompts:
        train = read_jsonl(config.prompts, tokenizer, limit, drop)
    else:  # evaluation prompts are the same for every seed, so that runs compare
        pairs = running_sums(20_000, config.seed, heldout=False), running_sums(config.eval_size, 12345, heldout=True)
        train, held = (
            [Prompt(text, ids, answer) for (text, answer), ids in zip(part, tokenizer([text for text, _ in part]).input_ids)] for part in pairs
        )
        if len(max(train + held, key=lambda prompt: len(prompt.ids)).ids) > limit:
            raise DataError(f"built-in prompts have up to {4 * ADDENDS[-1]} tokens, --max-prompt-tokens is {limit}: raise it")
    if config.eval_prompts:
        held = read_jsonl(config.eval_prompts, tokenizer, limit, drop)
        if any(prompt.answer is None for prompt in held):
            raise DataError(f"{config.eval_prompts}: every evaluation prompt needs an `answer`")
    elif config.prompts:
        answered = {prompt.text: prompt for prompt in train if prompt.answer is not None}
        order = torch.randperm(len(answered), generator=torch.Generator().manual_seed(config.seed)).tolist()
        texts = sorted(answered)
        held = [answered[texts[i]] for i in order[: min(config.eval_size, len(train) // 10)]]
    seen = {prompt.text for prompt in held}
    train = [prompt for prompt in train if prompt.text not in seen]
    if not train:
        raise DataError(f"{config.prompts}: every prompt is also an evaluation prompt, none is left to train on")
    return train, held[: config.eval_size]


class TicketOrder:
    """Ticket n's prompt: every `samples_per_prompt` tickets share one, each epoch is its own seeded permutation."""

    def __init__(self, num_prompts: int, samples_per_prompt: int, seed: int):
        self.num_prompts, self.samples_per_prompt, self.seed = num_prompts, samples_per_prompt, seed
        self.epoch, self.permutation = -1, torch.empty(0)

    def __call__(self, ticket: int) -> int:
        epoch, place = divmod(ticket // self.samples_per_prompt, self.num_prompts)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.permutation = epoch, torch.randperm(self.num_prompts, generator=generator)
        return int(self.permutation[place])


def is_correct(response: str, answer: str) -> bool:
    """Exact match of the stripped response, else of its last \\boxed{...}, else of its last number if the answer is one."""
    response, answer = response.strip(), answer.strip()
    if response == answer:
        return True
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", response)
    if boxed:
        return boxed[-1].strip() == answer
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
    return bool(numbers) and numbers[-1].replace(",", "") == answer.replace(",", "")
