"""Claims about the kernel of a decode step's attention, run in Triton's interpreter on a CPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from triton.runtime.interpreter import InterpreterBuilder

from kernels.decode_attention import decode_attention, launch_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS, HEADS = 4, 2


def case(group, key_size, value_size, dtype, length, seed=0):
    """query, keys, values and positions; NaN wherever a slot holds nothing of its own yet."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    # Three of four slots are active. The query is laid out as transformers hands it over.
    query = normal(3, 1, HEADS * group, key_size).transpose(1, 2).reshape(3, HEADS, group, key_size)
    keys = normal(SLOTS, HEADS, length, key_size)
    values = normal(SLOTS, HEADS, length, value_size)
    position = torch.randint(length, (3,), generator=generator)
    position[:2] = torch.tensor([length - 1, 0])
    for slot, last in enumerate(position.tolist()):
        keys[slot, :, last + 1 :] = values[slot, :, last + 1 :] = float("nan")
    return [x.to(DEVICE) for x in (query, keys, values, position)]


def attention(query, keys, values, position, scale, window, dtype=torch.float64):
    """By torch, over all positions with a mask: what the kernel must give."""
    at = torch.arange(keys.shape[2], device=keys.device)
    seen = at <= position[:, None]
    if window is not None:
        seen &= at > position[:, None] - window
    keys, values = (x[: len(query)].nan_to_num(0.0).to(dtype) for x in (keys, values))
    mask = seen[:, None, None]
    return F.scaled_dot_product_attention(query.to(dtype), keys, values, mask, scale=scale)


def assert_right(tensors, window, scale=None):
    scale = scale or tensors[0].shape[-1] ** -0.5
    dtype = tensors[0].dtype
    out = decode_attention(*tensors, scale, window)
    exact = attention(*tensors, scale, window)
    error = float((out.double() - exact).abs().max())
    torchs = float((attention(*tensors, scale, window, dtype).double() - exact).abs().max())
    # The interpreter cuts bfloat16 off where a GPU rounds: one step of it instead of half a step.
    assert out.dtype == dtype and error <= (4e-6 if dtype == torch.float32 else max(0.02, torchs))


SIZES = [(64, 64), (80, 80), (128, 128), (256, 256), (192, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_size, value_size", SIZES)
@pytest.mark.parametrize("group", [1, 7, 16])
def test_it_is_attention_over_what_each_slot_sees(group, key_size, value_size, dtype):
    """Lengths below, at and beyond a block; windows inside a block, across blocks, none."""
    block = launch_shape(group, key_size, value_size, dtype)["BLOCK"]
    lengths = [5, block, 2 * block + 1, 3 * block]
    windows = [None, 1, block // 2, block + 3]
    windows = windows[group % 4 :] + windows[: group % 4]  # other pairs for other groups
    for number, (length, window) in enumerate(zip(lengths, windows)):
        assert_right(case(group, key_size, value_size, dtype, length, number), window)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 1000])
def test_the_window_ends_exactly_where_it_should(window):
    """At every position around the edges of blocks, with a scale of its own."""
    for last in (0, 14, 15, 16, 17, 63, 64, 65, 127, 128):
        tensors = case(2, 256, 256, torch.float32, 129, window)
        tensors[3][:] = last
        tensors[1].nan_to_num_(7.0), tensors[2].nan_to_num_(7.0)  # stale keys, if it reads them
        assert_right(tensors, window, scale=0.05)


def test_a_slot_does_not_depend_on_its_neighbours_to_the_last_bit():
    query, keys, values, position = case(4, 64, 64, torch.float32, 200)
    together = decode_attention(query, keys, values, position, 0.125, None)
    for slot in range(3):
        one = slice(slot, slot + 1)
        tensors = (query[one], keys[one], values[one], position[one])
        assert torch.equal(decode_attention(*tensors, 0.125, None)[0], together[slot])
    # Nor on what an earlier rollout left behind its position.
    for x in (keys, values):
        x.nan_to_num_(-3e38)
    assert torch.equal(decode_attention(query, keys, values, position, 0.125, None), together)


def test_large_scores_neither_overflow_nor_vanish():
    """The best key may come first, in the middle or last: the running maximum moves or stays."""
    query, keys, values, position = case(2, 64, 64, torch.float32, 300)
    position[:] = 299
    for x in (keys, values):
        x.nan_to_num_(0.0)
    for best, sign in itertools.product((0, 150, 299), (1, -1)):
        loud = keys.clone()
        loud[:, :, best] = sign * 400 * query.new_ones(64)
        assert_right((query, loud, values, position), None, scale=1.0)


def test_the_kernel_reads_the_cache_where_it_lies():
    """Slots that are not contiguous would be read wrongly: refused instead of copied."""
    query, keys, values, position = case(2, 64, 64, torch.float32, 32)
    with pytest.raises(AssertionError):
        decode_attention(query, keys.transpose(1, 2), values, position, 0.125, None)


@pytest.mark.parametrize("window", [None, 20])
def test_a_slot_costs_what_it_sees_and_not_what_the_cache_holds(window, monkeypatch):
    """Two products a block, and as many blocks as its own keys touch."""
    query, keys, values, position = case(2, 64, 64, torch.float32, 700)
    position[:] = torch.tensor([699, 0, 130])
    keys.nan_to_num_(0.0), values.nan_to_num_(0.0)
    products = []

    def counted(self, *arguments):
        products.append(1)
        return plain(self, *arguments)

    plain = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    decode_attention(query, keys, values, position, 0.125, window)
    block = launch_shape(2, 64, 64, torch.float32)["BLOCK"]
    blocks = [
        last // block - max(0, last + 1 - (window or 700)) // block + 1
        for last in position.tolist()
    ]
    assert len(products) == 2 * HEADS * sum(blocks)
