"""What models, prompt files and the output directory must be, and the messages that say so.

Nothing here is needed to understand the algorithm. Every message names the value, the limit and the
fix. A model is judged by comparing numbers, not by its name: its logits must be hidden @ W^T, which
the chunked head computes, and attention must be its only memory, which the KV slots hold.

Left out: quantised models, adapters, teacher and student with different tokenizers.
"""

import json
from pathlib import Path

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from attention import Decode, KVCache, Prefill
from config import InputError, refusal
from kernels.head import head_logits
from log import checkpoints, step_of
from losses import make_loss
from model import head_weight, last_hidden, shared_vocabulary, stop_ids, text_config


def require(condition, message):
    if not condition:
        raise InputError(message)


# ---- models -----------------------------------------------------------------------------------


def check_path(flag, path):
    """A model directory must be whole. What does not look like a path is taken for a hub id."""
    place = Path(path)
    if path.count("/") == 1 and path[0] not in "./~" and not place.parent.is_dir():
        return  # a hub id
    require(
        (place / "config.json").is_file(),
        f"{flag} {path}: no model there (config.json is missing in {place.absolute()}): "
        "give a model directory or a hub id such as org/name",
    )


def load_tokenizer(flag, path):
    check_path(flag, path)
    with refusal(f"{flag} {path}: its config.json cannot be used"):
        text_config(path)
    with refusal(f"{flag} {path}: no tokenizer there"):
        return AutoTokenizer.from_pretrained(path)


def check_models(config):
    """Teacher and student must read text alike. Returns what the user should be told."""
    student = load_tokenizer("--student", config.student_path)
    teacher = load_tokenizer("--teacher", config.teacher_path)
    probe = "The 3 answers: 47+58=105, naïve 你好\n\tdef f(x): return x**2"
    same_ids = student.get_vocab() == teacher.get_vocab()
    require(
        same_ids and student(probe).input_ids == teacher(probe).input_ids,
        f"--teacher {config.teacher_path} and --student {config.student_path} have different "
        f"tokenizers ({len(teacher)} and {len(student)} tokens): choose two models of one family",
    )
    check_config(config)
    check_top_k(config)
    ours = stop_ids(config.student_path, student)
    theirs = stop_ids(config.teacher_path, teacher)
    if ours == theirs:
        return []
    fix = "the student's are used, watch truncated_fraction"
    return [f"student stops at {sorted(ours)}, teacher at {sorted(theirs)}: {fix}"]


def check_top_k(config):
    vocab = shared_vocabulary(config)
    loss = make_loss(config)
    limit = vocab - (loss.tail.start < loss.tail.stop)  # a tail needs an id
    require(
        loss.top.stop - loss.top.start <= limit,
        f"--top-k is {config.top_k}, the vocabulary has {vocab} ids: "
        f"{limit} is the most for {config.loss}",
    )


def check_config(config):
    for path in (config.student_path, config.teacher_path):
        settings = text_config(path)
        positions = getattr(settings, "max_position_embeddings", None) or config.max_sequence
        rope = getattr(settings, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # longer ones change all keys
            positions = rope["original_max_position_embeddings"]
        require(
            config.max_sequence <= positions,
            f"{path}: a sequence may have {config.max_sequence} tokens, the model takes "
            f"{positions}: lower --max-prompt-tokens or --max-new-tokens",
        )
        require(
            not getattr(settings, "quantization_config", None),
            f"{path}: its weights are quantised: such a model is not supported",
        )


def load_model(path, dtype, device, attention=None, gpus=1, length=8):
    """The model, frozen, on `device`. With `gpus` above 1 its layers lie on that many, from it on.

    `attention`: "kv_slots" for a generator, whose sequences have up to `length` tokens. Raises
    InputError if weights are missing or left over, if the head is more than a matrix product, or if
    the slots do not hold all that the model remembers.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"dtype": dtype, "output_loading_info": True}
    if gpus > 1:
        memory = torch.cuda.get_device_properties(device).total_memory
        own = range(device.index, device.index + gpus)
        options |= {"device_map": "auto", "max_memory": {i: int(0.9 * memory) for i in own}}
    with refusal(f"{path} cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(path, **options)
    # transformers would start missing tensors at random, and ignore others.
    for kind, what in (("missing", "are not in its files"), ("unexpected", "have no place in it")):
        keys = info[f"{kind}_keys"]
        require(not keys, f"{path}: {len(keys)} tensors {what}, {min(keys, default='')} for one")
    model = (model if gpus > 1 else model.to(device)).eval().requires_grad_(False)
    with refusal(f"{path} is not supported"):
        check_forward(model, attention, length)
    return model


@torch.no_grad()
def check_forward(model, attention, length):
    """Compare numbers for `length` tokens. With `attention`, switch the model to it on the way.

    In bfloat16, whose rounding depends on the shape of a batch, for 8 tokens.
    """
    weight = head_weight(model)
    length = length if model.dtype == torch.float32 else 8
    ids = torch.arange(length, device=model.device)[None] % len(weight)
    hidden = last_hidden(model, ids)[0]
    logits = model(input_ids=ids[:, :8], use_cache=False).logits[0]
    require(logits.isfinite().all(), "its logits are not finite: damaged weights?")
    require(
        agree(logits, head_logits(hidden[:8], weight.to(hidden))),
        "its logits are not hidden @ W^T (a bias, scale or soft-cap follows the head), or they "
        f"change with the length of the sequence (compared: 8 and {length} tokens)",
    )
    if attention:
        model.set_attn_implementation(attention)
        require(
            agree(hidden[-1], last_through_slots(model, ids)),
            "the KV slots do not hold all that it remembers of earlier tokens (recurrent or "
            "convolution layers, or a window that its attention layers do not pass on)",
        )


def last_through_slots(model, ids):
    """The last hidden state [D] of ids [1,X]: all but the last are prefilled, the last decoded."""
    last = ids.shape[1] - 1
    position = torch.full_like(ids[0, :1], last)
    cache = KVCache(slots=1, max_len=last + 1)
    last_hidden(model, ids[:, :-1], slot_step=Prefill(cache, torch.zeros_like(position)))
    require(cache.layers, "its attention is its own, the KV slots cannot take its place")
    step = Decode(cache, position, length=last + 1)
    return last_hidden(model, ids[:, -1:], position_ids=position[None], slot_step=step)[0, 0]


def agree(a, b):
    tolerance = 0.05 if a.dtype == torch.bfloat16 else 1e-3
    a, b = a.float(), b.to(a.device, torch.float32)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))


# ---- prompt files -----------------------------------------------------------------------------


def json_lines(path):
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


# ---- the output directory ---------------------------------------------------------------------

# The settings that decide which rollouts come next.
MUST_MATCH = """student prompts eval_prompts eval_size seed batch_size samples_per_prompt order
    max_prompt_tokens""".split()


def check_output(config, fingerprint):
    """The checkpoint to resume from (None: a new run), and what the user should be told.

    `fingerprint`: of the prompts. Raises InputError if the directory holds another run, if there is
    nothing to resume, or if the prompts or a setting in MUST_MATCH have changed.
    """
    output = config.output
    checkpoint = (checkpoints(output) or [None])[-1]
    if config.resume:
        return checkpoint, check_resume(config, checkpoint, fingerprint)
    fix = "choose a new directory, or --resume if a step_N is in it"
    metrics = output / "metrics.jsonl"
    is_used = checkpoint or (metrics.exists() and metrics.stat().st_size)
    require(not is_used, f"--output-dir {output} holds another run: {fix}")
    return None, []


def check_resume(config, checkpoint, fingerprint):
    output = config.output
    missing = f"--resume: no checkpoint (step_N) in --output-dir {output}: choose a new directory"
    require(checkpoint, missing)
    done = step_of(checkpoint)
    progress = read_progress(checkpoint)
    for name in MUST_MATCH:
        before, now = progress["settings"].get(name), getattr(config, name)
        require(before == now, f"--resume: {name} was {before!r} and is now {now!r}: keep it")
    require(
        progress["prompts"] == fingerprint,
        "--resume: the prompts are not what they were: give the same files",
    )
    require(
        done < config.steps,
        f"--resume: {output} has made {done} updates already, --steps is {config.steps}: raise it",
    )
    return [f"resuming from {checkpoint}"]


def read_progress(checkpoint):
    """{"settings": of the run, "prompts": their fingerprint, "trained_ahead": see Tickets}."""
    with refusal(f"--resume: {checkpoint} is damaged, or of an older version of this program"):
        return dict(yaml.safe_load((checkpoint / "progress.yaml").read_text()))
