"""What a decode slot remembers of its sequence, and the attention function over it.

Letters of shapes: serial.py. In addition, X is the number of positions attended to.

A generator's model has the attention "kv_slots". In every attention layer transformers then calls
`slot_attention` (AttentionInterface), with the `slot_step` that the generator gave to the model's
forward. A step knows what to write and what may be seen. Layers with a convolution or a recurrent
state (Qwen3.5 and other hybrids) get the same step as `past_key_values`.

Left out: paged blocks, prefix sharing.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from kernels.decode_attention import decode_attention
from kernels.head import uses_triton
from model import last_hidden
from support.config import InputError, refusal, require
from support.load import agree, probe_ids


@dataclass
class KVCache:
    """Keys and values of every slot and layer, [S,H,L,E] each, H being the key-value heads.

    A layer's tensors are made when it first writes. `states`: of convolution and recurrent layers,
    name -> [S,...].
    """

    slots: int
    max_len: int
    layers: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)

    def layer(self, index: int, key, value):
        """The tensors of one layer; `key` and `value` [A,H,X,E] show their shape and dtype."""
        if index not in self.layers:
            shapes = [(self.slots, x.shape[1], self.max_len, x.shape[3]) for x in (key, value)]
            self.layers[index] = key.new_zeros(shapes[0]), value.new_zeros(shapes[1])
        return self.layers[index]

    def move(self, source: int, target: int, length: int):
        """Copy the first `length` positions of one slot to another."""
        for keys, values in self.layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]
        for state in self.states.values():
            state[target] = state[source]


class Step(Cache):
    """A forward pass over slots, as layers with states see it: transformers' Cache interface.

    `slots` says which of [S,...] are theirs. A prefill finds no state before it.
    """

    layers = ()  # transformers' own are not used
    is_first = False

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Called by attention layers. `attend` keeps keys and values."""
        return key, value

    def is_recording_past(self, layer_idx):
        return False

    def get_conv_state(self, layer_idx, state_idx=0):
        """[A,channels,width]. While decoding a view, which the layer may change in place."""
        return self.state("conv", layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx, state_idx=0):
        return self.state("recurrent", layer_idx, state_idx)

    def update_conv_state(self, new, layer_idx, state_idx=0, conv_kernel_size=None, **kwargs):
        """Inputs `new` [A,channels,X] follow those kept. The last `conv_kernel_size` are kept."""
        width = conv_kernel_size or new.shape[-1]
        before = self.get_conv_state(layer_idx, state_idx)
        if before is None:  # zeros stand before the first input
            before = new.new_zeros(*new.shape[:2], max(0, width - new.shape[2]))
        inputs = torch.cat([before, new], -1)
        self.keep(("conv", layer_idx, state_idx), inputs[..., -width:])
        return inputs

    def update_recurrent_state(self, new, layer_idx, state_idx=0, **kwargs):
        self.keep(("recurrent", layer_idx, state_idx), new)
        return new

    def state(self, *name):
        return None if self.is_first else self.cache.states[name][self.slots]

    def keep(self, name, new):
        if name not in self.cache.states:
            self.cache.states[name] = new.new_zeros(self.cache.slots, *new.shape[1:])
        self.cache.states[name][self.slots] = new


@dataclass
class Prefill(Step):
    """Whole prompts into fresh slots: `slots` int64 [A]."""

    cache: KVCache
    slots: Tensor
    is_first = True

    def attend(self, layer, query, key, value, scaling, window):
        """query [A,heads,X,E], key and value [A,H,X,E] -> [A,X,heads,E]."""
        keys, values = self.cache.layer(layer, key, value)  # [S,H,L,E]
        length = key.shape[2]
        keys[self.slots, :, :length] = key
        values[self.slots, :, :length] = value
        mask = None
        if window is not None and length > window:
            mask = may_see(torch.arange(length, device=key.device), length, window)
            # With a mask, CUDA's fast kernels want as many key-value heads as query heads.
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        options = {"is_causal": mask is None, "scale": scaling, "enable_gqa": mask is None}
        out = F.scaled_dot_product_attention(query, key, value, mask, **options)
        return out.transpose(1, 2)


@dataclass
class Decode(Step):
    """One new token for each of the slots [0, A), written at `position` int64 [A]."""

    cache: KVCache
    position: Tensor
    masks: dict = field(default_factory=dict)  # window -> mask, shared by the layers

    @property
    def slots(self):
        return slice(len(self.position))

    def attend(self, layer, query, key, value, scaling, window):
        """query [A,heads,1,E], key and value [A,H,1,E] -> [A,1,heads,E]."""
        keys, values = self.cache.layer(layer, key, value)  # [S,H,L,E]
        active, heads, _, size = key.shape
        slots = torch.arange(active, device=key.device)
        keys[slots, :, self.position] = key[:, :, 0]
        values[slots, :, self.position] = value[:, :, 0]
        # The query heads of one key-value head stand side by side, so the cache is not copied.
        grouped = query.view(active, heads, -1, size)  # [A,H,query heads of each,E]
        if uses_triton(grouped):
            out = decode_attention(grouped, keys, values, self.position, scaling, window)
        else:
            mask = self.mask(window, query.dtype)
            known = [x[:active, :, : mask.shape[-1]] for x in (keys, values)]  # [A,H,X,E]
            out = F.scaled_dot_product_attention(grouped, *known, mask, scale=scaling)
        return out.reshape(active, 1, -1, value.shape[3])

    def mask(self, window, dtype):
        """-inf at hidden positions, else 0: [A,1,1,X], X being the longest slot's."""
        if window not in self.masks:
            hidden = ~may_see(self.position, int(self.position.max()) + 1, window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[window] = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        return self.masks[window]


def may_see(now, length: int, window: int | None):
    """Which of the positions [0, length) queries at `now` [n] may see: bool [n,length].

    Hidden are the future, with whatever an earlier rollout left there, and what the sliding window
    has passed.
    """
    at = torch.arange(length, device=now.device)
    seen = at <= now[:, None]
    return seen if window is None else seen & (at > now[:, None] - window)


def slot_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """What every attention layer calls (transformers.AttentionInterface)."""
    layer = type(module).__name__
    for name in ("softcap", "s_aux"):  # logit soft-capping (Gemma 2), attention sinks (gpt-oss)
        if kwargs.get(name) is not None:
            raise InputError(f"{layer} wants attention with {name}, which the KV slots do not have")
    if "slot_step" not in kwargs:
        raise InputError(f"{layer} does not pass on what the KV slots need")
    step, window = kwargs["slot_step"], kwargs.get("sliding_window")
    return step.attend(module.layer_idx, query, key, value, scaling, window), None


AttentionInterface.register("kv_slots", slot_attention)


# ---- do the slots hold all that a model remembers? --------------------------------------------


@torch.no_grad()
def switch_to_slots(model, length: int):
    """Give the model the attention "kv_slots". Its sequences have up to `length` tokens.

    Raises InputError unless the last token, decoded through the slots, gets the hidden state that
    the model's own attention gives it. Then the slots are the model's only memory.
    """
    ids = probe_ids(model, length)
    expected = last_hidden(model, ids)[0, -1]  # [F]
    model.set_attn_implementation("kv_slots")
    with refusal(f"{model.name_or_path} is not supported"):
        with refusal("its code does not fit the KV slots"):
            found, cache = last_through_slots(model, ids)
        why = """the KV slots do not hold all that it remembers of earlier tokens (a window that its
            attention layers do not pass on, or memory outside of transformers' Cache interface)"""
        require(agree(expected, found), why)
    model.slot_states = cache.states


def last_through_slots(model, ids):
    """The last hidden state [F] of ids [1,X]: all but the last are prefilled, the last decoded.

    Returns it and the cache of this one slot.
    """
    position = torch.full_like(ids[0, :1], ids.shape[1] - 1)  # [1]
    cache = KVCache(slots=1, max_len=ids.shape[1])
    first = Prefill(cache, torch.zeros_like(position))
    last_hidden(model, ids[:, :-1], slot_step=first, past_key_values=first)
    require(cache.layers, "its attention is its own, the KV slots cannot take its place")
    step = Decode(cache, position)
    options = {"position_ids": position[None], "slot_step": step, "past_key_values": step}
    return last_hidden(model, ids[:, -1:], **options)[0, 0], cache
