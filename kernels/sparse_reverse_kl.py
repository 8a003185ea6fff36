"""Sparse reverse KL: a chunk of logits in, loss out, the gradient where the logits were. One kernel.

    loss   sum_k e^{s_k} (s_k - t_k)        over the sampler's top-K ids, columns `first` on; see losses.py
    c_k    e^{s_k} (s_k - t_k + 1)

s_k = z[ids_k] - logsumexp(z). The columns before `first` carry no loss; their s is returned all the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import launch_loss, row_gather, row_logsumexp, row_scatter


@triton.jit
def sparse_reverse_kl_kernel(
    logits,  # [n,V] float32 or bfloat16, read and overwritten through grad
    grad,  # the same memory in the gradient's dtype, rows equally many bytes apart
    ids,  # [n,C] int64, read; -1: none
    teacher_logp,  # [n,C] float32, read
    loss,  # [n] float32, written
    student_logp,  # [n,C] float32, written
    c,  # [n,C] float32, scratch
    V, C, grad_stride, first, LANES: tl.constexpr, DEPTH: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    lse = row_logsumexp(logits + n * V, V, LANES, DEPTH)
    k, there, s = row_gather(logits + n * V, ids + n * C, lse, C, CANDIDATES)
    t = tl.load(teacher_logp + n * C + k, mask=k < C, other=0.0)
    counts = there & (k >= first)
    tl.store(loss + n, tl.sum(tl.where(counts, tl.exp(s) * (s - t), 0.0), 0))
    tl.store(student_logp + n * C + k, s, mask=k < C)
    tl.store(c + n * C + k, tl.where(counts, tl.exp(s) * (s - t + 1.0), 0.0), mask=k < C)
    tl.debug_barrier()  # every thread sees the whole of c
    row_scatter(logits + n * V, grad + n * grad_stride, ids + n * C, c + n * C, lse, V, C, LANES, DEPTH, CANDIDATES)


def sparse_reverse_kl(logits: Tensor, ids: Tensor, teacher_logp: Tensor, dtype: torch.dtype, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n,V] float32 or bfloat16, ids int64 [n,C] (-1: none), teacher_logp float32 [n,C] ->
    (loss [n], student_logp [n,C], gradient [n,V] as `dtype` in the memory of logits), the first two float32."""
    return launch_loss(sparse_reverse_kl_kernel, logits, dtype, (ids, teacher_logp), first)
