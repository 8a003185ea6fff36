"""Which models and tokenizers work, and how they are loaded.

A model is judged by comparing numbers, not by its name: its logits must be hidden @ W^T, which the
chunked head computes. What the KV slots must hold is checked where they are used (kv_cache.py).
Every message names the value, the limit and the fix.

Left out: quantised models, adapters, teacher and student with different tokenizers.
"""

import json
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from losses import make_loss
from model import fuse_norms
from support.config import Config, refusal, require

NO_CODE = {"trust_remote_code": False}  # else transformers asks on the terminal
PROBE = "The 3 answers: 47+58=105, naïve 你好\n\tdef f(x): return x**2"  # for two tokenizers


# ---- tokenizers and settings ------------------------------------------------------------------


def check_path(flag: str, path: str):
    """A model directory must be whole. What does not look like a path is taken for a hub id."""
    place = Path(path)
    is_hub_id = path.count("/") == 1 and path[0] not in "./~" and not place.parent.is_dir()
    missing = f"no model there (config.json is missing in {place.absolute()})"
    fix = "give a model directory or a hub id such as org/name"
    require(is_hub_id or (place / "config.json").is_file(), f"{flag} {path}: {missing}: {fix}")


def load_tokenizer(flag: str, path: str):
    check_path(flag, path)
    with refusal(f"{flag} {path}: own code is never run; its config.json cannot be used"):
        text_config(path).vocab_size  # what is no language model has none
    with refusal(f"{flag} {path}: no tokenizer there"):
        return AutoTokenizer.from_pretrained(path, **NO_CODE)


def text_config(path: str):
    """The settings of a model's text part: it may have others."""
    return AutoConfig.from_pretrained(path, **NO_CODE).get_text_config()


def shared_vocabulary(config: Config):
    """How many ids, from 0 on, mean the same to all models. The others are never sampled.

    Heads may be padded to different sizes, and one tokenizer may have more tokens at its end.
    Raises InputError if tokens differ before that.
    """
    student, paths = config.path("student"), config.teacher_paths
    return min(common_ids(student, path, teacher_flag(name)) for name, path in paths.items())


def teacher_flag(name: str):
    """How messages call a teacher."""
    return f"--teacher {name}".strip()


def common_ids(student: str, teacher: str, flag: str):
    """`shared_vocabulary` of two models."""
    paths = (student, teacher)
    size = min(text_config(path).vocab_size for path in paths)
    tokenizers = (AutoTokenizer.from_pretrained(path, **NO_CODE) for path in paths)
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in tokenizers)
    differ = [i for i in range(size) if ours.get(i) != theirs.get(i)]
    first = min(differ, default=size)
    shown = ", ".join(f"{i}: {ours.get(i)!r} and {theirs.get(i)!r}" for i in differ[:3])
    why = f"the tokenizers of --student and {flag} differ at {len(differ)} ids ({shown}, ...)"
    is_end = not any(i in ours and i in theirs for i in range(first, size))
    require(is_end, f"{why}: choose two models of one family")
    return first


def stop_ids(path: str, tokenizer, more=()):
    """Every id that ends a response: the generation config's, the tokenizer's, of tokens `more`."""
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # no generation_config.json
        named = text_config(path).eos_token_id
    named = named if isinstance(named, list) else [named]
    known = tokenizer.get_vocab()
    require(known.keys() >= set(more), f"--stop-token {' '.join(more)}: not all are in {path}")
    ids = {tokenizer.eos_token_id, *named, *map(known.get, more)} - {None}
    require(ids, f"{path}: no stop token in tokenizer and generation config: give --stop-token")
    return ids


def check_models(config: Config):
    """Every teacher must read text like the student. Returns what the user should be told."""
    student = load_tokenizer("--student", config.path("student"))
    flags = {teacher_flag(name): path for name, path in config.teacher_paths.items()}
    teachers = {flag: load_tokenizer(flag, path) for flag, path in flags.items()}
    check_config(config)
    vocab = shared_vocabulary(config)
    check_top_k(config, vocab)
    stops = stop_ids(config.path("student"), student, config.stop_token)
    require(min(stops) < vocab, "a teacher knows no stop token of the student: give --stop-token")
    notes = []
    for flag, teacher in teachers.items():
        ours, theirs = (t(PROBE, add_special_tokens=False).input_ids for t in (student, teacher))
        why = f"--student and {flag} have the same tokens, but split text differently"
        require(ours == theirs, f"{why}: choose two models of one family")
        theirs = stop_ids(flags[flag], teacher)
        if stops != theirs:
            shown = [student.convert_ids_to_tokens(sorted(ids)) for ids in (stops, theirs)]
            fix = "--stop-token adds to the student's, its generation_config.json has the others"
            notes.append(f"student stops at {shown[0]}, {flag[2:]} at {shown[1]}: {fix}")
        kwargs = json.loads(config.chat_template_kwargs)
        ours, theirs = (chat_of(t, kwargs) for t in (student, teacher))
        if ours and theirs and ours != theirs:
            told = (
                f"the student's chat template counts: {ours!r}. That of the {flag[2:]}: {theirs!r}"
            )
            notes.append(told)
    return notes


def chat_of(tokenizer, kwargs):
    """The probe as the chat template writes it. None: it has none, or wants other messages."""
    with suppress(Exception):
        options = {"tokenize": False, "add_generation_prompt": True, **kwargs}
        return tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], **options)


def check_top_k(config: Config, vocab: int):
    loss = make_loss(config)
    limit = vocab - (loss.tail.start < loss.tail.stop)  # a tail needs one id outside of the top
    fix = f"the vocabulary has {vocab} ids: {limit} is the most for {config.loss}"
    require(loss.top.stop - loss.top.start <= limit, f"--top-k is {config.top_k}, {fix}")


def check_config(config: Config):
    """Every model must take its longest sequence, and must not be quantised."""
    longest = {config.path("student"): config.max_sequence}
    for path in config.teacher_paths.values():  # it may be the student's
        longest[path] = max(config.max_teacher_sequence, longest.get(path, 0))
    for path, length in longest.items():
        settings = text_config(path)
        positions = getattr(settings, "max_position_embeddings", None) or length
        rope = getattr(settings, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # a longer sequence changes all keys
            positions = rope["original_max_position_embeddings"]
        told = f"a sequence may have {length} tokens, the model takes {positions}"
        fix = "lower --max-new-tokens, --max-prompt-tokens or --max-teacher-prompt-tokens"
        require(length <= positions, f"{path}: {told}: {fix}")
        is_quantised = getattr(settings, "quantization_config", None)
        require(not is_quantised, f"{path}: its weights are quantised: that is not supported")


# ---- models -----------------------------------------------------------------------------------


def load_model(path: str, dtype: torch.dtype, device: torch.device, gpus=1, length=8):
    """The model, frozen, on `device`. With `gpus` above 1, spread over that many from there on.

    `length`: tokens of the longest sequence. Raises InputError if weights are missing or left over,
    if the head is more than a matrix product, or if that depends on the length of a sequence.
    """
    transformers.logging.disable_progress_bar()
    options = {"dtype": dtype, "output_loading_info": True, **NO_CODE}
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
    model = model if gpus > 1 else model.to(device)
    model.eval().requires_grad_(False)
    with refusal(f"{path} is not supported"):
        check_head(model, length)
    if device.type == "cuda":  # a CPU gains nothing
        fuse_norms(model)
    return model


def probe_ids(model, length: int):
    """Ids [1,length] to compare numbers with.

    In bfloat16 8 of them, since its rounding depends on the shape of a batch.
    """
    length = length if model.dtype == torch.float32 else 8
    vocab = len(model.get_output_embeddings().weight)
    return torch.arange(length, device=model.device)[None] % vocab


def head_factor(model):
    """What hidden @ W^T is multiplied by: Cohere, Falcon-H1 and Granite have names for it."""
    settings = model.config.get_text_config()
    factor = getattr(settings, "logit_scale", None) or getattr(settings, "lm_head_multiplier", 1.0)
    return factor / getattr(settings, "logits_scaling", 1.0)


@torch.no_grad()
def check_head(model, length: int):
    """The logits of 8 tokens must be factor * hidden @ W^T, also where `length` give the hidden."""
    ids = probe_ids(model, length)
    with refusal("its logits cannot be compared with hidden @ W^T"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :8]  # [8,F]
        logits = model(input_ids=ids[:, :8], use_cache=False).logits[0]  # [8,V]
        plain = head_factor(model) * hidden @ model.get_output_embeddings().weight.to(hidden).T
    require(logits.isfinite().all(), "its logits are not finite: damaged weights?")
    why = f"""its logits are not hidden @ W^T (a bias, scale or soft-cap follows the head), or they
        change with the length of the sequence (compared: 8 and {ids.shape[1]} tokens)"""
    require(agree(logits, plain), why)


def agree(a, b):
    """Equal up to the rounding of a model in the dtype of `a`, at half of the positions [...,F].

    At a few of them rounding alone may be 30 times what it is elsewhere.
    """
    tolerance = 0.05 if a.dtype == torch.bfloat16 else 3e-5  # 30 layers: 3e-6
    a, b = a.float(), b.to(a.device, torch.float32)
    worst = (a - b).abs().amax(-1)  # of each position
    return bool(worst.median() <= tolerance * a.abs().max())
