"""The KV cache of the decode slots, and the attention function that owns it.

    S  slots     n  sequences of this call     T  longest sequence     L  positions attended to
    H  query heads     q  query positions

transformers calls `slot_attention` in every layer (AttentionInterface) with the `slot_step` keyword that the generator
gave to the model's forward. A step knows what to write and what may be seen: Prefill or Decode.

Left out: paged blocks, prefix sharing, a fused decode kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from config import ConfigError


class KVCache:
    """Keys and values of every slot, [S, kv heads, T, head size] each, made when a layer first writes."""

    def __init__(self, slots: int, max_len: int):
        self.slots, self.max_len = slots, max_len
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, *like: Tensor) -> tuple[Tensor, Tensor]:
        if index not in self.layers:
            self.layers[index] = tuple(x.new_zeros(self.slots, x.shape[1], self.max_len, x.shape[3]) for x in like)
        return self.layers[index]

    def move(self, source: int, target: int, length: int):
        for keys, values in self.layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]


@dataclass
class Prefill:
    """Whole prompts into fresh slots: `slots` int64 [n]."""

    cache: KVCache
    slots: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        keys, values = self.cache.layer(layer, key, value)
        length = key.shape[2]
        keys[self.slots, :, :length] = key
        values[self.slots, :, :length] = value
        mask = None
        if window is not None and length > window:
            at = torch.arange(length, device=key.device)
            mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - window)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        ).transpose(1, 2)


@dataclass
class Decode:
    """One new token for each of slots [0, n), written at `position` int64 [n]; positions below L are looked at."""

    cache: KVCache
    position: Tensor
    length: int
    mask_by_window: dict = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        keys, values = self.cache.layer(layer, key, value)
        n, kv_heads, _, size = key.shape
        slots = torch.arange(n, device=key.device)
        keys[slots, :, self.position] = key[:, :, 0]
        values[slots, :, self.position] = value[:, :, 0]
        grouped = query.view(n, kv_heads, -1, size)  # query heads of one kv head side by side: no copy of the cache
        return F.scaled_dot_product_attention(
            grouped, keys[:n, :, : self.length], values[:n, :, : self.length], attn_mask=self.mask(window, query.dtype), scale=scaling
        ).reshape(n, 1, -1, value.shape[3])

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """-inf at positions a query may not see [n,1,1,L]: the future, whatever an earlier tenant left, and past the window."""
        if window not in self.mask_by_window:
            now = self.position.clamp(max=self.length - 1)[:, None]  # idle slots of a padded graph may be past it
            at = torch.arange(self.length, device=now.device)[None]
            hidden = at > now if window is None else (at > now) | (at <= now - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self.mask_by_window[window] = mask[:, None, None, :]
        return self.mask_by_window[window]


def slot_attention(module, query, key, value, attention_mask, scaling, sliding_window=None, slot_step=None, **kwargs):
    """The function every attention layer calls (transformers.AttentionInterface): [n,H,q,D] -> [n,q,H,D]."""
    for name in ("softcap", "s_aux"):  # logit soft-capping (Gemma 2) and attention sinks (gpt-oss)
        if kwargs.get(name) is not None:
            raise ConfigError(f"{type(module).__name__} wants attention with {name}, which the KV slots do not have")
    return slot_step.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register("kv_slots", slot_attention)
