"""The Triton kernel: one program a row of logits reads it twice and writes the gradient.

Letters of shapes: serial.py; G rows are the positions of a chunk. kernels/head.py has the
mathematics. How much of the second read the L2 cache serves depends on V (docs/kernels.md).

The gradient goes where the logits were. It is stored in the dtype that the next matrix product
wants: a bfloat16 gradient of float32 logits fills the first half of its row's bytes. Equal ids add
up without atomics: each of them stores the same sum, taken in the same order.

What a loss computes from its candidates is a Triton function of terms.py, which the compiler
inlines.

Left out: autotuning (one launch shape per vocabulary size), float64 (plain torch), vocabularies
split over several programs.
"""

import torch
import triton
import triton.language as tl
from triton.language import constexpr

DEPTH = constexpr(2)  # loads of LANES logits that are in flight at once


@triton.jit
def row_logsumexp(row, V, LANES: constexpr):
    """logsumexp of a row, float32: a running maximum and sum in every lane, joined at the end."""
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peak = tl.full([LANES], -1e38, tl.float32)  # finite: -inf minus -inf would be NaN beyond V
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, V, DEPTH * LANES):
        at = start + offsets
        z = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[None, :]), 0)
        peak = higher
    top = tl.max(peak, 0)
    return top + tl.log(tl.sum(total * tl.exp(peak - top), 0))


@triton.jit
def gradient_at_candidates(s, ids, ids_row, c_row, c_sum, C, CANDIDATES: constexpr):
    """dL/dz at the candidates' ids [CANDIDATES]; candidates with equal ids get the same sum."""
    # All pairs at once would not fit into registers.
    PART: constexpr = max(1, min(CANDIDATES, 8192 // CANDIDATES))
    at_ids = -tl.exp(s) * c_sum
    for first in range(0, C, PART):
        j = first + tl.arange(0, PART)
        other_ids = tl.load(ids_row + j, mask=j < C, other=0)
        other_c = tl.load(c_row + j, mask=j < C, other=0.0)
        is_same = ids[:, None] == other_ids[None, :]
        at_ids += tl.sum(tl.where(is_same, other_c[None, :], 0.0), 1)
    return at_ids


@triton.jit
def overwrite_row(row, grad_row, lse, c_sum, V, LANES: constexpr):
    """The gradient where no candidate is: -softmax * c_sum."""
    GRAD: constexpr = grad_row.dtype.element_ty
    NARROW: constexpr = GRAD.primitive_bitwidth < row.dtype.element_ty.primitive_bitwidth
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, V, DEPTH * LANES):
        at = start + offsets
        z = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        if NARROW:
            tl.debug_barrier()  # the gradient covers logits of this block and of earlier ones
        tl.store(grad_row + at, (-tl.exp(z - lse) * c_sum).to(GRAD), mask=at < V)


@triton.jit
def loss_kernel(
    logits,  # [G,V] float32 or bfloat16, read and overwritten through grad
    grad,  # the same memory in the gradient's dtype, rows equally many bytes apart
    ids,  # [G,C] int64, read
    teacher_logp,  # [G,C] float32, read
    behavior_logp,  # [G,C] float32, read
    loss,  # [G] float32, written
    student_logp,  # [G,C] float32, written
    c,  # [G,C] float32, scratch
    V,
    C,
    grad_stride,
    first,  # the columns before it carry no loss
    first_draw,
    TERMS: constexpr,  # (s, t, b, k, first, first_draw, C) -> (terms of the loss, c)
    LANES: constexpr,
    CANDIDATES: constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    row, grad_row = logits + g * V, grad + g * grad_stride
    ids_row, c_row = ids + g * C, c + g * C
    lse = row_logsumexp(row, V, LANES)
    k = tl.arange(0, CANDIDATES)  # columns from C on are padding
    at = tl.load(ids_row + k, mask=k < C, other=0)
    s = tl.load(row + at).to(tl.float32) - lse
    t = tl.load(teacher_logp + g * C + k, mask=k < C, other=0.0)
    b = tl.load(behavior_logp + g * C + k, mask=k < C, other=0.0)
    terms, derivative = TERMS(s, t, b, k, first, first_draw, C)
    counts = (k >= first) & (k < C)
    derivative = tl.where(counts, derivative, 0.0)
    c_sum = tl.sum(derivative, 0)
    tl.store(loss + g, tl.sum(tl.where(counts, terms, 0.0), 0))
    tl.store(student_logp + g * C + k, s, mask=k < C)
    tl.store(c_row + k, derivative, mask=k < C)
    # Every thread sees the whole of c, and has read its candidates' logits before they go.
    tl.debug_barrier()
    at_ids = gradient_at_candidates(s, at, ids_row, c_row, c_sum, C, CANDIDATES)
    overwrite_row(row, grad_row, lse, c_sum, V, LANES)
    tl.debug_barrier()  # the candidates' entries come last, over what the loop left there
    tl.store(grad_row + at, at_ids.to(grad_row.dtype.element_ty), mask=k < C)


def fused_loss(terms, logits, ids, t, b, dtype, first, first_draw):
    """Loss and gradient of a chunk in one launch.

    `terms` is the Triton function of the loss. logits [G,V] float32 or bfloat16, ids int64 [G,C] in
    [0,V), t and b float32 [G,C]. The columns before `first` carry no loss; those from `first_draw`
    on are draws. Returns (loss [G] and student_logp [G,C], float32; gradient [G,V] as `dtype`, in
    the memory of logits, each row where its logits began). `dtype` is no wider than the logits'.
    """
    V, C = logits.shape[1], ids.shape[1]
    assert logits.is_contiguous() and dtype.itemsize <= logits.dtype.itemsize
    ids, t, b = (x.contiguous() for x in (ids, t, b))
    student_logp, c = logits.new_empty(2, *ids.shape, dtype=torch.float32)
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    grad = logits.view(dtype)[:, :V]  # [G,V]; a narrower dtype has more columns, V are used
    # In the order of the kernel's arguments.
    tables = (logits, grad, ids, t, b, loss, student_logp, c)
    sizes = (V, C, grad.stride(0), first, first_draw)
    loss_kernel[(len(logits),)](*tables, *sizes, terms, **launch_shape(V, C))  # a program a row
    return loss, student_logp, grad


def launch_shape(vocab, candidates):
    """One shape per V: LANES * DEPTH logits a step, up to 16 a thread, 8 to 32 warps."""
    lanes = min(8192, max(256, triton.next_power_of_2(vocab) // 8))
    warps = max(8, min(32, lanes // 256))
    return {"LANES": lanes, "CANDIDATES": triton.next_power_of_2(candidates), "num_warps": warps}
