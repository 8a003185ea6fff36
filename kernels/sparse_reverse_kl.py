"""Sparse reverse KL: a chunk of logits in, loss out, the gradient where the logits were.

    loss   sum_k e^{s_k} (s_k - t_k)    over the sampler's top K, the columns from `first` on
    c_k    e^{s_k} (s_k - t_k + 1)

s_k = z[ids_k] - logsumexp(z), see losses.SparseReverseKL. The columns before `first` carry no loss;
their s is returned all the same.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.shared import launch_loss, row_gather, row_logsumexp, row_scatter


@triton.jit
def sparse_reverse_kl_kernel(
    logits,  # [G,V] float32 or bfloat16, read and overwritten through grad
    grad,  # the same memory in the gradient's dtype, rows equally many bytes apart
    ids,  # [G,C] int64, read; -1: none
    teacher_logp,  # [G,C] float32, read
    loss,  # [G] float32, written
    student_logp,  # [G,C] float32, written
    c,  # [G,C] float32, scratch
    V,
    C,
    grad_stride,
    first,
    LANES: constexpr,
    CANDIDATES: constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    row, grad_row = logits + g * V, grad + g * grad_stride
    lse = row_logsumexp(row, V, LANES)
    k, found, s = row_gather(row, ids + g * C, lse, C, CANDIDATES)
    t = tl.load(teacher_logp + g * C + k, mask=k < C, other=0.0)
    counts = (found >= 0) & (k >= first)
    value = tl.where(counts, tl.exp(s) * (s - t), 0.0)
    derivative = tl.where(counts, tl.exp(s) * (s - t + 1.0), 0.0)
    tl.store(loss + g, tl.sum(value, 0))
    tl.store(student_logp + g * C + k, s, mask=k < C)
    tl.store(c + g * C + k, derivative, mask=k < C)
    tl.debug_barrier()  # every thread sees the whole of c
    row_scatter(row, grad_row, ids + g * C, c + g * C, lse, V, C, LANES, CANDIDATES)


def sparse_reverse_kl(logits, ids, teacher_logp, dtype, first):
    """Loss and gradient of a chunk.

    logits [G,V] float32 or bfloat16, ids int64 [G,C] (-1: none), teacher_logp float32 [G,C]
    -> (loss [G] and student_logp [G,C], float32; gradient [G,V] as `dtype`, in the memory of
    logits).
    """
    return launch_loss(sparse_reverse_kl_kernel, logits, dtype, (ids, teacher_logp), first)
