"""Prompts: the built-in task or JSONL files, and the order in which tickets visit them.

The student sees every prompt as it was put in, or the line is refused. A row may name the teacher
that scores its responses, and give that teacher a prompt of its own. Left out: streaming data sets.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

from support.config import Config, refusal, require
from support.load import load_tokenizer, shared_vocabulary, teacher_flag

FOR_TEACHER = {"teacher_prompt": "prompt", "teacher_messages": "messages"}  # instead of the latter
FOR_TEMPLATE = {"tools", "chat_template_kwargs"}
KEYS = {"prompt", "messages", "answer", "teacher", *FOR_TEACHER, *FOR_TEMPLATE}  # of a row
KINDS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".txt": "text"}  # of `datasets`
AT_ONCE = 1000  # texts that are tokenized together


@dataclass(frozen=True)
class Prompt:
    text: str  # with the chat template applied
    ids: list[int]  # what the student reads
    answer: str | None = None
    teacher: str = ""  # its name, see Config.teacher_paths
    teacher_ids: list[int] | None = None  # what the teacher reads; None: what the student does
    source: tuple | None = None  # (file and line, row), until the teacher's side is read

    @property
    def for_teacher(self):
        return self.teacher_ids or self.ids


def load_prompts(config: Config, tokenizer, started: datetime | None = None):
    """(training prompts, evaluation prompts). No evaluation prompt occurs in training. Those
    without an answer are not judged: samples.jsonl shows what the student says to them.

    `started`: when the run began; None: now. Chat templates that print the date print that one.
    """
    kwargs = json.loads(config.chat_template_kwargs)
    vocab = shared_vocabulary(config)
    options = (config.max_prompt_tokens, kwargs, config.drop_long_prompts, vocab)
    with mock.patch("transformers.utils.chat_template_utils.datetime") as clock:
        clock.now.return_value = started or datetime.now()
        train = read_jsonl(config.path("prompts"), tokenizer, *options)
        train = for_teachers(train, config, kwargs, vocab)
        held_out = hold_out(config, train)
        if config.path("eval_prompts"):
            held_out = read_jsonl(config.path("eval_prompts"), tokenizer, *options)
            held_out = [named(prompt, config) for prompt in held_out]
    seen = {prompt.text for prompt in held_out}
    train = [prompt for prompt in train if prompt.text not in seen]
    require(train, f"{config.path('prompts')}: all are evaluation prompts, give it more")
    return train, held_out[: config.eval_size]


def read_jsonl(path: str, tokenizer, limit: int, kwargs=None, drop_long=False, vocab=math.inf):
    """The prompts of a UTF-8 file, one JSON object per line, as the student reads them.

    `prompt` is text, or a chat list like `messages`. Text gets the tokenizer's own special tokens
    before it. `messages` go through the chat template, with `kwargs` and the row's `tools` and
    `chat_template_kwargs`. An assistant's turn at the end is the answer that the student has to
    find: it is left out. `limit`: most tokens of a prompt; `drop_long` leaves longer ones out.
    `vocab`: how many ids the models know. Raises InputError with the line that cannot be used.
    """
    rows = [(where, check_row(where, item)) for where, item in json_lines(path)]
    answered = sum(drop_answer(where, row.get("messages", [])) for where, row in rows)
    if answered:
        print(f"note: {path}: {answered} rows end with the assistant's answer: it is left out")
    unknown = sorted({key for _, row in rows for key in row} - KEYS)
    if unknown:
        print(f"note: {path}: these keys of its rows are not used: {', '.join(unknown)}")
    encoded = encode(path, rows, tokenizer, kwargs or {}, vocab)
    prompts = [
        Prompt(text, ids, answer_of(*source), source=source)
        for source, (text, ids) in zip(rows, encoded)
    ]
    prompts = fitting(path, prompts, "ids", "--max-prompt-tokens", limit, drop_long)
    require(prompts, f"{path}: no prompts in it (up to {limit} tokens long)")
    return prompts


def fitting(path, prompts, name, flag, limit, drop_long):
    """The prompts whose ids, in the field `name`, are not too many."""
    lengths = [len(getattr(prompt, name)) for prompt in prompts]
    count = sum(length > limit for length in lengths)
    told = f"{path}: {count} of {len(prompts)} prompts are longer than {flag} {limit}, "
    told += f"the longest has {max(lengths, default=0)} tokens"
    require(drop_long or not count, f"{told}: raise it, or --drop-long-prompts")
    if count:
        print(f"note: {told}: left out")
    return [prompt for prompt, length in zip(prompts, lengths) if length <= limit]


def fingerprint(config: Config):
    """Of the prompt files as they are. What the chat template makes of them is another matter."""
    files = filter(os.path.isfile, map(config.path, ("prompts", "eval_prompts")))
    return " ".join(hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files)


def hold_out(config, prompts):
    """A tenth of the prompts, of those with an answer, in random order."""
    answered = {prompt.text: prompt for prompt in prompts if prompt.answer is not None}
    texts = sorted(answered)
    order = permutation(len(texts), config.seed).tolist()
    count = min(config.eval_size, len(prompts) // 10)
    return [answered[texts[i]] for i in order[:count]]


# ---- the order of prompts ---------------------------------------------------------------------


def prompt_of(ticket: int, num_prompts: int, config: Config):
    """Index of a ticket's prompt. `samples_per_prompt` tickets share it; epochs differ in order."""
    epoch, index = divmod(ticket // config.samples_per_prompt, num_prompts)
    return int(permutation(num_prompts, config.seed * 1_000_003 + epoch)[index])


@lru_cache(maxsize=1)
def permutation(count: int, seed: int):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# ---- rows of a file ---------------------------------------------------------------------------


def json_lines(path: str):
    """Yield (where, object) for every line that is not blank."""
    with refusal(f"{path}: a file of JSON lines in UTF-8 is needed{converter(path)}"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if line.strip():
            with refusal(f"{where}: one JSON object per line is needed{converter(path)}"):
                item = json.loads(line)
                json.dumps(item, ensure_ascii=False).encode()  # not of half a surrogate pair
            yield where, item


def converter(path: str):
    """The line of Python that makes JSON lines of another format, or of a data set of the hub."""
    if Path(path).suffix == ".jsonl" or Path(path).is_dir():
        return ""
    kind = next((KINDS[s] for s in Path(path).suffixes if s in KINDS), "json")  # or compressed
    source = f"'{kind}', data_files='{path}'" if Path(path).exists() else f"'{path}'"
    make = f"from datasets import load_dataset; load_dataset({source}, split='train')"
    return f" (`pip install datasets`, then in Python: {make}.to_json('prompts.jsonl'))"


def check_row(where, item):
    """The row as it is used, with its chat list under `messages`."""
    fix = "needs an object with either `prompt` (text) or `messages` (chat list): rename its keys"
    is_row = isinstance(item, dict) and ("prompt" in item) != ("messages" in item)
    require(is_row, f"{where}: {fix}: {json.dumps(item)[:80]}")
    prompt = item.get("prompt")
    if isinstance(prompt, str) and prompt:
        return item
    chat = item.get("messages", prompt)
    require(isinstance(chat, list) and chat, f"{where}: the prompt is empty or not text: {item}")
    return item | {"messages": [check_message(where, message) for message in chat]}


def check_message(where, message):
    """A message with its text parts joined."""
    shown = json.dumps(message)[:80]
    with refusal(f"{where}: a message needs a `role`, and text as `content`: {shown}"):
        require(message["role"] not in ("human", "gpt"), "call the roles user and assistant")
        content = message.get("content")
        if isinstance(content, list):
            kinds = {part["type"] for part in content} - {"text"}
            require(not kinds, f"parts of type {', '.join(kinds)} are not supported")
            content = "".join(part["text"] for part in content)
        is_call = content is None and message.get("tool_calls")
        require(is_call or isinstance(content, str), "its `content` is not text")
        return message | {"content": content}


def drop_answer(where, messages):
    """Take the assistant's turns off the end. Was there one?"""
    count = len(messages)
    while messages and messages[-1]["role"] in ("assistant", "model"):  # Gemma's word
        messages.pop()
    require(messages or not count, f"{where}: `messages` has nothing that the student could answer")
    return len(messages) < count


def answer_of(where, row):
    """The reference answer as text, or None."""
    answer = row.get("answer")
    is_number = type(answer) in (int, float) and abs(answer) < math.inf
    is_usable = answer is None or is_number or (isinstance(answer, str) and answer.strip())
    require(is_usable, f"{where}: `answer` is {answer!r}: text or a number is needed, or none")
    return None if answer is None else str(answer)


# ---- teachers of rows -------------------------------------------------------------------------


def for_teachers(prompts: list[Prompt], config: Config, kwargs, vocab):
    """The training prompts with their teachers' names, and with what these read."""
    system, path = config.teacher_system, config.path("prompts")
    sources = [prompt.source for prompt in prompts]
    sources = [(f"{where}, for the teacher", row) for where, row in sources]
    rows = [(where, teacher_row(where, row, system)) for where, row in sources]
    prompts = [named(prompt, config) for prompt in prompts]
    for name, place in config.teacher_paths.items():
        own = [i for i, (_, row) in enumerate(rows) if row and prompts[i].teacher == name]
        if own:
            tokenizer = load_tokenizer(teacher_flag(name), place)
            encoded = encode(path, [rows[i] for i in own], tokenizer, kwargs, vocab)
            for i, (_, ids) in zip(own, encoded):
                prompts[i] = replace(prompts[i], teacher_ids=ids)
    limit = config.max_teacher_sequence - config.max_new_tokens
    flag = "--max-teacher-prompt-tokens"
    prompts = fitting(path, prompts, "for_teacher", flag, limit, config.drop_long_prompts)
    require(prompts, f"{path}: no prompts in it (up to {limit} tokens long for the teacher)")
    return prompts


def named(prompt: Prompt, config: Config):
    """The prompt with its teacher's name. The row may leave it out if there is one teacher."""
    where, row = prompt.source
    names = [*config.teacher_paths]
    name = row.get("teacher") or (names[0] if len(names) == 1 else None)
    fix = "--teacher NAME=DIR makes others" if names == [""] else f"take one of {', '.join(names)}"
    told = "names no `teacher`" if name is None else f"`teacher` is {name!r}: none has this name"
    require(name in names, f"{where}: {told}: {fix}")
    return replace(prompt, teacher=name, source=None)


def teacher_row(where, row, system: str):
    """What the row's teacher reads, as a row. None: what the student reads.

    `system`: a message to put first.
    """
    given = [key for key in FOR_TEACHER if row.get(key) is not None]
    require(len(given) < 2, f"{where}: give `teacher_prompt` or `teacher_messages`, not both")
    if given:
        options = {key: row[key] for key in FOR_TEMPLATE if key in row}
        row = check_row(where, {FOR_TEACHER[given[0]]: row[given[0]]})
        row |= options if "messages" in row else {}
        fix = "its last turn is the assistant's, where the student's response belongs: drop it"
        require(not drop_answer(where, row.get("messages", [])), f"{where}: {given[0]}: {fix}")
    if system:
        fix = "--teacher-system goes before a chat, and this is plain text: give `messages`"
        require("messages" in row, f"{where}: {fix}")
        row = row | {"messages": [{"role": "system", "content": system}, *row["messages"]]}
    return row if given or system else None


# ---- from rows to tokens ----------------------------------------------------------------------


def encode(path, rows, tokenizer, kwargs, vocab):
    """(text, ids) of each row, checked."""
    bar = tqdm(rows, f"{path}: chat template", leave=False, disable=None)
    texts = [render(where, row, tokenizer, kwargs) for where, row in bar]
    all_ids = tokenize(path, texts, ["messages" in row for _, row in rows], tokenizer)
    for (where, _), text, ids in zip(rows, texts, all_ids):
        check_ids(where, text, ids, tokenizer, vocab)
    return list(zip(texts, all_ids))


def render(where, row, tokenizer, kwargs):
    """The text of a row: its `prompt`, or its `messages` through the chat template."""
    messages, tools = row.get("messages"), row.get("tools")
    own = row.get("chat_template_kwargs") or {}
    with refusal(f"{where}: the chat template refuses it"):
        tools = json.loads(tools.strip() or "null") if isinstance(tools, str) else tools
        if messages is None:
            require(not (tools or own), "`tools` and `chat_template_kwargs` need `messages`")
            return row["prompt"]
        template = tokenizer.get_chat_template(tools=tools)
        for name in kwargs | own:
            is_known = name != "tools" and re.search(rf"(?<![\w<>/]){re.escape(name)}\b", template)
            require(is_known, f"it knows no `{name}`")
        options = {"tokenize": False, "add_generation_prompt": True, **kwargs, **own}
        apply = partial(tokenizer.apply_chat_template, **options)
        text = apply(messages, tools=tools)
        # Does it show every message? Words that no template has stand for their texts.
        marks = [m | {"content": m["content"] and f"text{i}."} for i, m in enumerate(messages)]
        marked = apply(marks, tools=tools)
        lost = [m["role"] for m in marks if (m["content"] or "") not in marked]
        require(not lost, f"it leaves out what role `{'`, `'.join(lost)}` says")
        none = {"content": "", "tool_calls": []}
        bare = [m | none if m.get("tool_calls") else m for m in messages]
        fix = "drop them from the row, or change the template"
        require(not tools or text != apply(messages), f"it leaves out `tools`: {fix}")
        is_shown = bare == messages or text != apply(bare, tools=tools)
        require(is_shown, f"it leaves out `tool_calls`: {fix}")
    return text


def tokenize(source, texts, is_chat, tokenizer):
    """The ids of each text, for plain text with the special tokens that the tokenizer puts before.

    Not twice, and none after it: a stop token would end the prompt.
    """
    special = tokenizer("a", return_special_tokens_mask=True)
    before = special.input_ids[: (special.special_tokens_mask + [0]).index(0)]
    all_ids = []
    for i in tqdm(range(0, len(texts), AT_ONCE), f"{source}: tokens", leave=False, disable=None):
        all_ids += tokenizer(texts[i : i + AT_ONCE], add_special_tokens=False).input_ids
    for ids, chat in zip(all_ids, is_chat):
        if not chat and ids[: len(before)] != before:
            ids[:0] = before
    return all_ids


def check_ids(where, text, ids, tokenizer, vocab):
    require(ids, f"{where}: the prompt has no tokens: {text!r}")
    highest = max(ids)
    fix = f"the models know {vocab} tokens: take it out of the text"
    require(highest < vocab, f"{where}: the prompt has token {highest}, {fix}")
    is_over = len(ids) > 1 and text.rstrip().endswith(tokenizer.eos_token or " ")
    fix = f"nothing follows {tokenizer.eos_token}: end with the header of the assistant's turn"
    require(not is_over, f"{where}: {fix}: {text[-80:]!r}")
    unknown = tokenizer.unk_token_id
    # A text may name it, as a separator; a tokenizer may begin every text with it.
    named = text.count(tokenizer.unk_token or " ") + (unknown == tokenizer.bos_token_id)
    fix = "the prompt has characters that the tokenizer does not know"
    require(ids.count(unknown) <= named, f"{where}: {fix}: {text!r}")
