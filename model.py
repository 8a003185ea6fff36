"""A causal LM as this project uses it: its hidden states, its head, its parameters.

Letters of shapes: serial.py. support/load.py loads a model and makes sure that it fits.
"""

from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import vector_to_parameters
from transformers.modeling_layers import GradientCheckpointingLayer

from support.config import Config


def last_hidden(model, ids, **kwargs):
    """Hidden states before the head: ids int64 [B,L] -> [B,L,F].

    Right padding needs no mask, because attention is causal.
    """
    return model.base_model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state


def head_weight(model):
    """[V,F]"""
    return model.get_output_embeddings().weight


def predicting_positions(prompt_len: int, length: int):
    """Where in the sequence the hidden states stand that predict the response.

    This is the one-token shift of the whole project: token r of the response is predicted at
    prompt_len - 1 + r. `length` counts prompt and response, stop token included.
    """
    return slice(prompt_len - 1, length - 1)


def response_hidden(model, channel, rows):
    """Hidden states that predict the responses of `rows`, one after the other: [T,F].

    Without rows the result is empty, but the model has run: ranks that share it stay in step.
    """
    longest = max(channel.length[rows], default=1)
    ids = channel.tokens[rows or [0], :longest].to(model.device, torch.int64)  # [rows,longest]
    hidden = last_hidden(model, ids)  # [rows,longest,F]
    parts = [hidden[0, :0]]  # [0,F]: `cat` wants at least one
    for of_row, row in zip(hidden, rows):
        span = predicting_positions(int(channel.prompt_len[row]), int(channel.length[row]))
        parts.append(of_row[span])
    return torch.cat(parts)


def row_batches(channel, rows, budget: int):
    """`rows` in groups for one forward pass each, longest first.

    A group padded to its longest has at most `budget` tokens. At most a third of it is padding.
    """
    batches: list[list[int]] = []
    longest = 0  # of the last group
    for row in sorted(rows, key=lambda row: -int(channel.length[row])):
        length = int(channel.length[row])
        is_similar = 3 * length >= 2 * longest > 0
        if is_similar and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = length
    return batches


def layers_of(model):
    """The decoder layers. transformers gives all of them one base class."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def fuse_norms(model):
    """Every RMSNorm in one kernel a call; transformers has eight.

    Only where the numbers are the same: Gemma and Qwen3.5 scale by 1 + weight, and keep their own.
    """
    for module in model.modules():
        is_placed = hasattr(module, "_hf_hook")  # accelerate moves its input between GPUs
        if type(module).__name__.endswith("RMSNorm") and not is_placed and is_rms_norm(module):
            module.forward = partial(rms_norm, module)


def is_rms_norm(module):
    """Is the module F.rms_norm with a weight? Compared in float32."""
    if getattr(module, "weight", None) is None or epsilon(module) is None:
        return False
    copy = deepcopy(module).float()
    x = torch.randn(4, *copy.weight.shape, device=copy.weight.device) + 1.0  # not of mean 0
    return torch.allclose(copy(x), rms_norm(copy, x), rtol=1e-5, atol=1e-6)


def epsilon(norm):
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def rms_norm(module, x):
    """[...,F] -> [...,F]. A weight of another dtype, or autocast, would make it eight kernels."""
    weight = module.weight.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, weight.shape, weight, epsilon(module))


def compute_dtype(config: Config, device: torch.device):
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if config.dtype == "auto" else config.dtype)


def trained_part(model):
    """The text decoder and the head. An image tower beside them has no gradient."""
    return nn.ModuleList([model.get_decoder(), model.get_output_embeddings()])


def flat_parameters(model, dtype=torch.float32):
    """A copy of all trained parameters [P]. Tied weights occur once."""
    parameters = trained_part(model).parameters()
    return torch.cat([p.detach().to(dtype).flatten() for p in parameters])


def flatten_parameters(model):
    """Move the trained parameters into one buffer [P] and make them views of it.

    One copy then refreshes all.
    """
    flat = flat_parameters(model, head_weight(model).dtype)
    vector_to_parameters(flat, trained_part(model).parameters())
    return flat
