"""A causal LM as this project uses it: its hidden states, its head, its stop tokens, its
parameters.

Letters of shapes: serial.py. `checks.load_model` loads a model and makes sure that it fits.
"""

import torch
from torch.nn.utils import vector_to_parameters
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from config import Config, InputError


def last_hidden(model, ids, **kwargs):
    """Hidden states before the head: ids int64 [B,L] -> [B,L,D].

    Right padding needs no mask, because attention is causal.
    """
    return model.base_model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state


def head_weight(model):
    """[V,D]"""
    return model.get_output_embeddings().weight


def predicting_positions(prompt_len: int, length: int):
    """Where in the sequence the hidden states stand that predict the response.

    This is the one-token shift of the whole project: token r of the response is predicted at
    prompt_len - 1 + r. `length` counts prompt and response, stop token included.
    """
    return slice(prompt_len - 1, length - 1)


def response_hidden(model, table, rows):
    """Hidden states that predict the responses of `rows`, one after the other: [T,D].

    Without rows the result is empty, but the model has run: ranks that share it stay in step.
    """
    longest = max(table.length[rows], default=1)
    ids = table.tokens[rows or [0], :longest].to(model.device, torch.int64)
    hidden = last_hidden(model, ids)
    parts = [hidden[0, :0]]
    for of_row, row in zip(hidden, rows):
        span = predicting_positions(int(table.prompt_len[row]), int(table.length[row]))
        parts.append(of_row[span])
    return torch.cat(parts)


def row_batches(table, rows, budget: int):
    """`rows` in groups for one forward pass each, longest first.

    A group padded to its longest has at most `budget` tokens. At most a third of it is padding.
    """
    batches: list[list[int]] = []
    longest = 0  # of the last group
    for row in sorted(rows, key=lambda row: -int(table.length[row])):
        length = int(table.length[row])
        is_similar = 3 * length >= 2 * longest > 0
        if is_similar and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = length
    return batches


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def stop_ids(path: str, tokenizer):
    """Every id that ends a response: those of the generation config, and the tokenizer's."""
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # no generation_config.json
        named = AutoConfig.from_pretrained(path).eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    if not ids:
        raise InputError(
            f"{path}: neither tokenizer nor generation config names a stop token: add eos_token_id"
        )
    return ids


def text_config(path: str):
    return AutoConfig.from_pretrained(path).get_text_config()


def shared_vocabulary(config: Config):
    """Number of ids that both heads know. Heads may be padded to different sizes."""
    paths = (config.student_path, config.teacher_path)
    return min(text_config(path).vocab_size for path in paths)


def compute_dtype(config: Config, device: torch.device):
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def flat_parameters(model, dtype=torch.float32):
    """A copy of all parameters [P]. Tied weights occur once."""
    return torch.cat([p.detach().to(dtype).flatten() for p in model.parameters()])


def flatten_parameters(model):
    """Move all parameters into one buffer [P] and make them views of it. One copy refreshes all."""
    flat = flat_parameters(model, head_weight(model).dtype)
    vector_to_parameters(flat, model.parameters())
    return flat
