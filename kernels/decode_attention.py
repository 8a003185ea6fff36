"""A decode step's attention in Triton: each slot reads its own keys and values, and no others.

Letters of shapes: serial.py. G query heads share a key-value head; D is the size of a value (most
models: E). docs/kernels.md derives the kernel and counts its bytes.

One program serves one slot and one key-value head. It reads that slot's keys and values once, block
by block, for all G query heads. Softmax goes along with a running maximum and sum (online softmax,
arXiv 1805.02867). So a step costs what the slots hold, not what the longest of them holds, and one
CUDA graph serves all lengths. What a slot gets does not depend on its neighbours, to the last bit.
The loop begins at a multiple of BLOCK. So each block has a key that is seen, and the running
maximum is finite after the first.

Left out: several programs for one long slot (split-K), paged blocks, shared prefixes.
"""

import torch
import triton
import triton.language as tl
from triton.language import constexpr

LOG2_E = constexpr(1.4426950408889634)  # e^x is 2^(x LOG2_E), and 2^x is one instruction
BLOCK_BYTES = 16_384  # of keys, or of values where those are wider


@triton.jit
def cut(x):
    """float32 without its last 13 bits, as a matrix unit reads it for TF32."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def decode_kernel(
    query,  # [A,H,G,E], read
    keys,  # [S,H,L,E], read
    values,  # [S,H,L,D], read
    position,  # [A] int64, read: where the newest key stands
    out,  # [A,H,G,D], written
    scale,
    window,  # how many keys a slot sees at most
    L,
    G: constexpr,
    E: constexpr,
    D: constexpr,
    ROWS: constexpr,  # G, E and D padded for the matrix units
    KEY_WIDTH: constexpr,
    VALUE_WIDTH: constexpr,
    BLOCK: constexpr,  # keys of a block
    PRECISION: constexpr,
):
    head = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)  # of all slots' heads
    g = tl.arange(0, ROWS)[:, None]  # [ROWS,1]
    e = tl.arange(0, KEY_WIDTH)[None, :]  # [1,KEY_WIDTH]
    d = tl.arange(0, VALUE_WIDTH)[None, :]  # [1,VALUE_WIDTH]
    q = tl.load(query + (head * G + g) * E + e, mask=(g < G) & (e < E), other=0.0).to(tl.float32)
    end = tl.load(position + tl.program_id(0)).to(tl.int32) + 1
    begin = tl.maximum(end - window, 0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)  # of the scores so far
    total = tl.zeros([ROWS], tl.float32)  # of the weights so far, relative to the peak
    mixed = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)  # weights times values
    for start in range(begin // BLOCK * BLOCK, end, BLOCK):
        x = start + tl.arange(0, BLOCK)  # [BLOCK]
        seen = (x >= begin) & (x < end)
        row = (head.to(tl.int64) * L + x)[:, None]  # of all slots' keys
        k = tl.load(keys + row * E + e, mask=seen[:, None] & (e < E), other=0.0).to(tl.float32)
        v = tl.load(values + row * D + d, mask=seen[:, None] & (d < D), other=0.0).to(tl.float32)
        score = tl.dot(q, k.T, input_precision=PRECISION) * (scale * LOG2_E)  # [ROWS,BLOCK]
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        if PRECISION == "tf32":  # or the total would have more than the product
            weight = cut(weight)
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weight, v, input_precision=PRECISION)
        peak = higher
    tl.store(out + (head * G + g) * D + d, mixed / total[:, None], mask=(g < G) & (d < D))


def decode_attention(query, keys, values, position, scale, window):
    """Attention of one new token in each of the slots [0, A).

    query [A,H,G,E], keys [S,H,L,E] and values [S,H,L,D], all float32 or all bfloat16; position
    int64 [A] in [0,L). Slot a sees the keys at (position[a] - window, position[a]], with `window`
    None all up to position[a]. Returns [A,H,G,D] in the dtype of the query.
    """
    active, heads, group, size = query.shape
    assert keys.is_contiguous() and values.is_contiguous()
    out = query.new_empty(active, heads, group, values.shape[3])
    length = keys.shape[2]
    window = length if window is None else window
    tensors = (query.contiguous(), keys, values, position, out)  # in the kernel's order
    shape = launch_shape(group, size, values.shape[3], keys.dtype)
    decode_kernel[(active, heads)](*tensors, scale, window, length, **shape)
    return out


def launch_shape(group: int, key_size: int, value_size: int, dtype):
    """The kernel's constants. bfloat16 is exact in TF32; float32 takes three such products.

    With many rows or wide heads fewer blocks are in flight, so that 99 KiB of shared memory do.
    """
    widths = [max(16, triton.next_power_of_2(size)) for size in (key_size, value_size)]
    rows = max(16, triton.next_power_of_2(group))
    return {
        "G": group,
        "E": key_size,
        "D": value_size,
        "ROWS": rows,
        "KEY_WIDTH": widths[0],
        "VALUE_WIDTH": widths[1],
        "BLOCK": max(16, min(128, BLOCK_BYTES // (max(widths) * dtype.itemsize))),
        "PRECISION": "tf32" if dtype == torch.bfloat16 else "tf32x3",
        "num_warps": 8,
        "num_stages": 1 if rows * max(widths) * dtype.itemsize > 8192 else 3,
    }
