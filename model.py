"""Loading models and tokenizers, and the checks that must pass before anything starts.

Any causal LM of transformers whose logits are `last_hidden_state @ embedding^T`, what the chunked head computes, and whose
only memory of earlier tokens is attention, what the KV slots hold. Others are refused, by comparing numbers, not names.

Left out: quantised models, adapters, teacher and student with different tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from attention import Decode, KVCache, Prefill
from config import Config, ConfigError
from kernels.head import head_logits


def check_path(flag: str, path: str):
    """A directory must exist; anything that does not look like a path is taken for a hub id."""
    place = Path(path)
    no_hub_id = path.startswith((".", "/", "~")) or path.count("/") != 1
    looks_local = no_hub_id or place.parent.is_dir()
    if looks_local and not (place / "config.json").is_file():
        why = "" if no_hub_id else f"; {place.parent} is a directory here, so this is not taken for a hub id"
        raise ConfigError(f"{flag} {path}: no model there (config.json is missing{why}): give a model directory or a hub id such as org/name")
    if not looks_local or list(place.glob("pytorch_model*.bin")):
        return
    shard, index = place / "model.safetensors", place / "model.safetensors.index.json"
    try:
        whole = shard.is_file() or not index.is_file()
        for shard in [shard] if whole else {place / name for name in json.loads(index.read_text())["weight_map"].values()}:
            safe_open(shard, "pt")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(f"{flag} {shard}: weights missing or damaged: {error}: fetch or save the model again") from None


def load_tokenizer(flag: str, path: str):
    check_path(flag, path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {path}: no tokenizer there: {str(error).splitlines()[0]}") from None


def load_model(path: str, dtype: torch.dtype, device: torch.device, attention: str | None = None) -> nn.Module:
    """The model, frozen, on `device`. `attention`: "kv_slots" for the generator; None for what transformers prefers.

    Raises ConfigError if its weights are not all there, its head is more than a matrix product or the slots do not
    hold all it remembers.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:  # transformers would start them at random
        raise ConfigError(f"{path}: {len(info['missing_keys'])} tensors are not in its files, {min(info['missing_keys'])} for one: wrong config.json?")
    model = model.to(device).eval().requires_grad_(False)
    check_head(model, path)
    if attention:
        check_slots(model, path, attention)
    return model


def agree(a: Tensor, b: Tensor) -> bool:
    tolerance = 0.05 if a.dtype == torch.bfloat16 else 1e-3
    return torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * float(a.abs().max()))


@torch.no_grad()
def check_head(model: nn.Module, path: str):
    ids = torch.arange(4, device=model.device)[None]
    hidden = last_hidden(model, ids)[0]
    if not agree(model(input_ids=ids, use_cache=False).logits[0], head_logits(hidden, head_weight(model), 1.0)):
        raise ConfigError(f"{path}: its logits are not hidden @ W^T (a bias, scale or soft-cap follows the head): such a model is not supported")


@torch.no_grad()
def check_slots(model: nn.Module, path: str, attention: str):
    """Switch `model` to the KV slots and compare prefill and decode of 8 tokens with the plain forward pass."""
    ids, last, cache = torch.arange(8, device=model.device)[None], torch.tensor([7], device=model.device), KVCache(1, 8)
    expected = last_hidden(model, ids)[0, -1]
    model.set_attn_implementation(attention)
    last_hidden(model, ids[:, :-1], slot_step=Prefill(cache, last - 7))
    if not agree(expected, last_hidden(model, ids[:, -1:], position_ids=last[None], slot_step=Decode(cache, last, 8))[0, 0]):
        raise ConfigError(f"{path}: more than attention remembers earlier tokens (recurrent or convolution layers): such a model is not supported")


def head_weight(model: nn.Module) -> Tensor:
    return model.get_output_embeddings().weight


def last_hidden(model: nn.Module, ids: Tensor, **kwargs) -> Tensor:
    """Hidden states before the head: ids int64 [B,T] -> [B,T,D]. Right padding needs no mask: attention is causal."""
    return model.base_model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state


def stop_ids(path: str, tokenizer) -> set[int]:
    """Every id that ends a response: those of the generation config, and the tokenizer's."""
    ids = {tokenizer.eos_token_id} - {None}
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # no generation_config.json
        named = AutoConfig.from_pretrained(path).eos_token_id
    ids |= set(named if isinstance(named, list) else [named]) - {None}
    if not ids:
        raise ConfigError(f"{path}: neither tokenizer nor generation config names a stop token: add eos_token_id")
    return ids


def shared_vocabulary(config: Config) -> tuple[object, set[int], int, list[str]]:
    """Student tokenizer, stop ids, number of ids both heads know, and what the user should be told.

    Raises ConfigError when teacher and student do not read text alike: the same id must mean the same token.
    One tokenizer with heads padded to different sizes is fine: both are cut to the smaller.
    """
    student, teacher = load_tokenizer("--student", config.student_path), load_tokenizer("--teacher", config.teacher_path)
    probe = "The 3 answers: 47+58=105, naïve 你好\n\tdef f(x): return x**2"
    if student.get_vocab() != teacher.get_vocab() or student(probe).input_ids != teacher(probe).input_ids:
        raise ConfigError(
            f"--teacher {config.teacher_path} and --student {config.student_path} have different tokenizers "
            f"({len(teacher)} and {len(student)} tokens): choose two models of one family"
        )
    paths = (config.student_path, config.teacher_path)
    settings = [AutoConfig.from_pretrained(path).get_text_config() for path in paths]
    sizes = [item.vocab_size for item in settings]
    stops = [stop_ids(path, tokenizer) for path, tokenizer in zip(paths, (student, teacher))]
    notes = []
    for path, item in zip(paths, settings):
        if config.max_sequence > getattr(item, "max_position_embeddings", config.max_sequence):
            notes.append(f"{path} was made for {item.max_position_embeddings} positions, a sequence may have {config.max_sequence}")
    if sizes[0] != sizes[1]:
        notes.append(f"student head has {sizes[0]} rows, teacher {sizes[1]}: both are cut to the first {min(sizes)} ids")
    if stops[0] != stops[1]:
        notes.append(f"student stops at {sorted(stops[0])}, teacher at {sorted(stops[1])}: the student's are used, watch truncated_fraction")
    limit = min(sizes) - (config.loss == "stratified_reverse_kl")
    if config.loss != "sampled_reverse_kl" and config.top_k > limit:
        raise ConfigError(f"--top-k is {config.top_k}, the vocabulary has {min(sizes)} ids: {limit} is the most for {config.loss}")
    return student, stops[0], min(sizes), notes


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def flatten_parameters(model: nn.Module) -> Tensor:
    """Move all parameters into one buffer [P] and make them views of it; tied weights occur once. One copy refreshes all."""
    parameters = list(model.parameters())
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    offset = 0
    for p in parameters:
        view = flat[offset : offset + p.numel()].view(p.shape)
        view.copy_(p.data)
        p.data = view
        offset += p.numel()
    return flat
