"""What the kernels share: one program per row of logits, read for log-probabilities, overwritten by the gradient.

    n  rows (positions of a chunk)      V  vocabulary      C  candidates of a position

The mathematics is in kernels/head.py. Traffic a row: the logits are read twice and the gradient is written once; how much of the
second read the L2 cache serves depends on V (docs/kernels.md). An id of -1 means that there is no candidate: s = 0, c = 0.

The gradient goes where the logits were. It has the dtype of the next matrix product, so that no pass over it is
needed to convert it: a bfloat16 gradient of float32 logits fills the first half of its row's bytes. Equal ids add up
without atomics: each of them stores the same sum, taken in the same order.

`gather` and `scatter` are those two steps as kernels of their own, for every loss without a fused one. Left out:
autotuning (one launch shape per vocabulary size), float64 (plain torch), vocabularies split over several programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_logsumexp(row, V, LANES: tl.constexpr, DEPTH: tl.constexpr):
    """logsumexp of a row: a running maximum and sum in every lane, joined at the end. float32."""
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peak = tl.full([LANES], -1e38, tl.float32)  # finite: a lane beyond V must not make -inf minus -inf
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, V, DEPTH * LANES):
        z = tl.load(row + start + offsets, mask=start + offsets < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[None, :]), 0)
        peak = higher
    top = tl.max(peak, 0)
    return top + tl.log(tl.sum(total * tl.exp(peak - top), 0))


@triton.jit
def row_gather(row, ids_row, lse, C, CANDIDATES: tl.constexpr):
    """(column numbers, where there is a candidate, its log-probability or 0), each [CANDIDATES]."""
    k = tl.arange(0, CANDIDATES)
    ids = tl.load(ids_row + k, mask=k < C, other=-1)
    there = ids >= 0
    z = tl.load(row + ids, mask=there, other=0.0).to(tl.float32)
    return k, there, tl.where(there, z - lse, 0.0)


@triton.jit
def row_scatter(row, grad_row, ids_row, c_row, lse, V, C, LANES: tl.constexpr, DEPTH: tl.constexpr, CANDIDATES: tl.constexpr):
    """Overwrite a row of logits with the gradient; c [C], in memory, is 0 where there is no candidate."""
    NARROW: tl.constexpr = grad_row.dtype.element_ty.primitive_bitwidth < row.dtype.element_ty.primitive_bitwidth
    PART: tl.constexpr = max(1, min(CANDIDATES, 8192 // CANDIDATES))  # all pairs at once would not fit into registers
    k, there, s = row_gather(row, ids_row, lse, C, CANDIDATES)
    ids = tl.load(ids_row + k, mask=k < C, other=-1)
    c_sum = tl.sum(tl.load(c_row + k, mask=k < C, other=0.0), 0)
    at_ids = -tl.exp(s) * c_sum
    for first in range(0, C, PART):
        j = first + tl.arange(0, PART)
        other_ids = tl.load(ids_row + j, mask=j < C, other=-1)
        other_c = tl.load(c_row + j, mask=j < C, other=0.0)
        at_ids += tl.sum(tl.where(ids[:, None] == other_ids[None, :], other_c[None, :], 0.0), 1)
    tl.debug_barrier()  # every thread has read its candidates' logits; from here on they are overwritten
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, V, DEPTH * LANES):
        z = tl.load(row + start + offsets, mask=start + offsets < V, other=float("-inf")).to(tl.float32)
        if NARROW:
            tl.debug_barrier()  # this block's gradient covers logits of this block and earlier ones
        tl.store(grad_row + start + offsets, (-tl.exp(z - lse) * c_sum).to(grad_row.dtype.element_ty), mask=start + offsets < V)
    tl.debug_barrier()  # the candidates' entries are stored last, over what the loop left there
    tl.store(grad_row + ids, at_ids.to(grad_row.dtype.element_ty), mask=there)


@triton.jit
def gather_kernel(
    logits,  # [n,V] float32 or bfloat16, read
    grad,  # unused: every row kernel takes the same first arguments
    ids,  # [n,C] int64, read; -1: none
    logp,  # [n,C] float32, written
    logsumexp,  # [n] float32, written
    V, C, grad_stride, LANES: tl.constexpr, DEPTH: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    lse = row_logsumexp(logits + n * V, V, LANES, DEPTH)
    k, _, s = row_gather(logits + n * V, ids + n * C, lse, C, CANDIDATES)
    tl.store(logp + n * C + k, s, mask=k < C)
    tl.store(logsumexp + n, lse)


@triton.jit
def scatter_kernel(
    logits,  # [n,V] float32 or bfloat16, read and overwritten through grad
    grad,  # the same memory in the gradient's dtype, rows equally many bytes apart
    ids,  # [n,C] int64, read; -1: none
    c,  # [n,C] float32, read
    logsumexp,  # [n] float32, read
    V, C, grad_stride, LANES: tl.constexpr, DEPTH: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row_scatter(logits + n * V, grad + n * grad_stride, ids + n * C, c + n * C, tl.load(logsumexp + n), V, C, LANES, DEPTH, CANDIDATES)


def launch(kernel, logits: Tensor, dtype: torch.dtype, columns: tuple[Tensor, ...], outputs: tuple[Tensor, ...], *scalars, **constants) -> Tensor:
    """Run a row kernel: kernel(logits, grad, *columns, *outputs, V, C, grad_stride, *scalars); returns grad [n,V].

    `dtype`: the gradient's; grad is the memory of logits, each row where its logits began. `columns` and `outputs` have
    n rows, the first is ids [n,C]. One launch shape per V: LANES * DEPTH logits a step, up to 16 of them a thread,
    8 to 32 warps. Raises ValueError on what the kernels cannot take.
    """
    (n, V), C = logits.shape, columns[0].shape[1]
    if logits.dtype not in (torch.float32, torch.bfloat16) or dtype.itemsize > logits.dtype.itemsize or V >= 2**30:
        raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype}, gradient {dtype}: float32 or bfloat16 are needed, below 2^30 ids")
    for tensor in (logits, *columns, *outputs):
        if tensor.dim() == 2 and tensor is not logits and tensor.shape[1] != C:
            raise ValueError(f"{tuple(tensor.shape)}: needs {C} columns, as many as ids")
        if not tensor.is_contiguous() or tensor.device != logits.device or tensor.shape[0] != n:
            raise ValueError(f"{tuple(tensor.shape)} on {tensor.device}: needs {n} contiguous rows on {logits.device}")
    grad = logits.view(dtype)[:, :V]
    if n:
        kernel[(n,)](logits, grad, *columns, *outputs, V, C, grad.stride(0), *scalars, **constants, **launch_shape(V, C))
    return grad


def launch_shape(vocab: int, candidates: int) -> dict:
    lanes = min(8192, max(256, triton.next_power_of_2(vocab) // 8))
    return {"LANES": lanes, "DEPTH": 2, "CANDIDATES": triton.next_power_of_2(candidates), "num_warps": max(8, min(32, lanes // 256))}


def launch_loss(kernel, logits: Tensor, dtype: torch.dtype, columns: tuple[Tensor, ...], *scalars, **constants) -> tuple[Tensor, Tensor, Tensor]:
    """Run a fused loss; returns (loss float32 [n], student_logp float32 [n,C], gradient [n,V])."""
    student_logp, c = logits.new_empty(2, *columns[0].shape, dtype=torch.float32)
    loss = logits.new_empty(len(logits), dtype=torch.float32)
    grad = launch(kernel, logits, dtype, columns, (loss, student_logp, c), *scalars, **constants)
    return loss, student_logp, grad


def gather(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given ids: logits [n,V], ids int64 [n,C] -> (float32 [n,C], logsumexp float32 [n])."""
    logp, logsumexp = (logits.new_empty(shape, dtype=torch.float32) for shape in (ids.shape, len(logits)))
    launch(gather_kernel, logits, logits.dtype, (ids,), (logp, logsumexp))
    return logp, logsumexp


def scatter(logits: Tensor, ids: Tensor, c: Tensor, logsumexp: Tensor, dtype: torch.dtype) -> Tensor:
    """Overwrite logits [n,V] with the gradient, given c = dL/ds float32 [n,C]; returns it as `dtype` [n,V]."""
    return launch(scatter_kernel, logits, dtype, (ids, c, logsumexp), ())
