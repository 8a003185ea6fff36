"""The Triton kernels: one program a row of logits reads it twice and writes the gradient.

Letters of shapes: serial.py; G rows are the positions of a chunk. kernels/head.py has the
mathematics. How much of the second read the L2 cache serves depends on V (docs/kernels.md).

The gradient goes where the logits were. It has the dtype of the next matrix product, so no pass is
needed to convert it: a bfloat16 gradient of float32 logits fills the first half of its row's bytes.
Equal ids add up without atomics: each of them stores the same sum, taken in the same order.

`fused_loss` does it all in one launch. What a loss computes from its candidates is a Triton
function (kernels/sparse_reverse_kl.py, kernels/sampled_reverse_kl.py) that the compiler inlines.
`gather` and `scatter` are the two passes as kernels of their own, for losses without such a
function.

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
def row_gather(row, ids_row, lse, C, CANDIDATES: constexpr):
    """(columns k, ids, log-probabilities), [CANDIDATES] each; those from C on are padding."""
    k = tl.arange(0, CANDIDATES)
    ids = tl.load(ids_row + k, mask=k < C, other=0)
    return k, ids, tl.load(row + ids).to(tl.float32) - lse


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
def row_scatter(
    row,
    grad_row,
    ids_row,
    c_row,  # [C] in memory
    lse,
    V,
    C,
    LANES: constexpr,
    CANDIDATES: constexpr,
):
    """Overwrite a row of logits with the gradient."""
    GRAD: constexpr = grad_row.dtype.element_ty
    NARROW: constexpr = GRAD.primitive_bitwidth < row.dtype.element_ty.primitive_bitwidth
    k, ids, s = row_gather(row, ids_row, lse, C, CANDIDATES)
    c_sum = tl.sum(tl.load(c_row + k, mask=k < C, other=0.0), 0)
    at_ids = gradient_at_candidates(s, ids, ids_row, c_row, c_sum, C, CANDIDATES)
    # Every thread has read its candidates' logits; from here on they are overwritten.
    tl.debug_barrier()
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, V, DEPTH * LANES):
        at = start + offsets
        z = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        if NARROW:
            tl.debug_barrier()  # the gradient covers logits of this block and of earlier ones
        tl.store(grad_row + at, (-tl.exp(z - lse) * c_sum).to(GRAD), mask=at < V)
    tl.debug_barrier()  # the candidates' entries come last, over what the loop left there
    tl.store(grad_row + ids, at_ids.to(GRAD), mask=k < C)


@triton.jit
def gather_kernel(
    logits,  # [G,V] float32 or bfloat16, read
    grad,  # unused: every row kernel takes the same first arguments
    ids,  # [G,C] int64, read
    logp,  # [G,C] float32, written
    logsumexp,  # [G] float32, written
    V,
    C,
    grad_stride,
    LANES: constexpr,
    CANDIDATES: constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    lse = row_logsumexp(logits + g * V, V, LANES)
    k, _, s = row_gather(logits + g * V, ids + g * C, lse, C, CANDIDATES)
    tl.store(logp + g * C + k, s, mask=k < C)
    tl.store(logsumexp + g, lse)


@triton.jit
def scatter_kernel(
    logits,  # [G,V] float32 or bfloat16, read and overwritten through grad
    grad,  # the same memory in the gradient's dtype, rows equally many bytes apart
    ids,  # [G,C] int64, read
    c,  # [G,C] float32, read
    logsumexp,  # [G] float32, read
    V,
    C,
    grad_stride,
    LANES: constexpr,
    CANDIDATES: constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    lse = tl.load(logsumexp + g)
    row, grad_row = logits + g * V, grad + g * grad_stride
    row_scatter(row, grad_row, ids + g * C, c + g * C, lse, V, C, LANES, CANDIDATES)


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
    TERMS: constexpr,  # (s, t, b, k, first_draw, C) -> (terms of the loss, c)
    LANES: constexpr,
    CANDIDATES: constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    row, grad_row = logits + g * V, grad + g * grad_stride
    lse = row_logsumexp(row, V, LANES)
    k, _, s = row_gather(row, ids + g * C, lse, C, CANDIDATES)
    t = tl.load(teacher_logp + g * C + k, mask=k < C, other=0.0)
    b = tl.load(behavior_logp + g * C + k, mask=k < C, other=0.0)
    terms, derivative = TERMS(s, t, b, k, first_draw, C)
    counts = (k >= first) & (k < C)
    tl.store(loss + g, tl.sum(tl.where(counts, terms, 0.0), 0))
    tl.store(student_logp + g * C + k, s, mask=k < C)
    tl.store(c + g * C + k, tl.where(counts, derivative, 0.0), mask=k < C)
    tl.debug_barrier()  # every thread sees the whole of c
    row_scatter(row, grad_row, ids + g * C, c + g * C, lse, V, C, LANES, CANDIDATES)


def launch(kernel, logits, dtype, columns, outputs, *others):
    """Run kernel(logits, grad, *columns, *outputs, V, C, grad_stride, *others) on every row.

    `columns` have G rows; the first is ids [G,C], in [0,V). Returns grad [G,V] of `dtype`: the
    memory of logits, each row where its logits began. Raises ValueError on logits and columns that
    the kernels cannot take.
    """
    V, C = logits.shape[1], columns[0].shape[1]
    check_logits(logits, dtype)
    for tensor in columns:
        check_rows(tensor, logits, C)
    grad = logits.view(dtype)[:, :V]
    if len(logits):
        tensors = (logits, grad, *columns, *outputs)
        on_every_row = kernel[(len(logits),)]
        on_every_row(*tensors, V, C, grad.stride(0), *others, **launch_shape(V, C))
    return grad


def check_logits(logits, dtype):
    is_wide_enough = dtype.itemsize <= logits.dtype.itemsize
    is_known = logits.dtype in (torch.float32, torch.bfloat16) and logits.is_contiguous()
    if not (is_known and is_wide_enough):
        raise ValueError(
            f"logits {tuple(logits.shape)} {logits.dtype}, gradient {dtype}: contiguous rows of "
            "float32 or bfloat16 are needed"
        )


def check_rows(tensor, logits, C):
    G = len(logits)
    is_here = tensor.device == logits.device and tensor.is_contiguous()
    if not is_here or tensor.shape not in ((G,), (G, C)):
        raise ValueError(
            f"{tuple(tensor.shape)} on {tensor.device}: "
            f"needs {G} contiguous rows of {C} columns on {logits.device}"
        )


def launch_shape(vocab, candidates):
    """One shape per V: LANES * DEPTH logits a step, up to 16 a thread, 8 to 32 warps."""
    lanes = min(8192, max(256, triton.next_power_of_2(vocab) // 8))
    return {
        "LANES": lanes,
        "CANDIDATES": triton.next_power_of_2(candidates),
        "num_warps": max(8, min(32, lanes // 256)),
    }


def fused_loss(terms, logits, ids, t, b, dtype, first, first_draw):
    """Loss and gradient of a chunk in one launch.

    `terms` is the Triton function of the loss. logits [G,V] float32 or bfloat16, ids int64 [G,C],
    t and b float32 [G,C]. The columns before `first` carry no loss; those from `first_draw` on are
    draws. Returns (loss [G] and student_logp [G,C], float32; gradient [G,V] as `dtype`, in the
    memory of logits).
    """
    student_logp, c = logits.new_empty(2, *ids.shape, dtype=torch.float32)
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    outputs = (loss, student_logp, c)
    grad = launch(loss_kernel, logits, dtype, (ids, t, b), outputs, first, first_draw, terms)
    return loss, student_logp, grad


def gather(logits, ids):
    """Log-probabilities of ids int64 [G,C]: (float32 [G,C], logsumexp float32 [G])."""
    logp = logits.new_empty(ids.shape, dtype=torch.float32)
    logsumexp = logits.new_empty(len(logits), dtype=torch.float32)
    launch(gather_kernel, logits, logits.dtype, (ids,), (logp, logsumexp))
    return logp, logsumexp


def scatter(logits, ids, c, logsumexp, dtype):
    """Overwrite logits [G,V] with the gradient, given c = dL/ds float32 [G,C]."""
    return launch(scatter_kernel, logits, dtype, (ids, c, logsumexp), ())
