"""Sampled and stratified reverse KL: a chunk of logits in, loss out, the gradient where the logits were. One kernel.

    loss   sum_exact sg[e^s (s - t)] s  -  (1/N) sum_draws sg[w A] s        see losses.py
    c_k    e^{s_k} (s_k - t_k)  at the exact columns,  -w_k A_k / N  at the draws,  0 before both

s_k = z[ids_k] - logsumexp(z). The sampled loss has draws only; the stratified one the sampler's top-K as exact
columns and draws from the rest. A = t - s or t - b by SIGNAL, w by CORRECTION, both decided at compile time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import launch_loss, row_gather, row_logsumexp, row_scatter
from losses import DECOUPLED_CAP, PPO_CLIP

HIGHEST, LOWEST, CAP = (tl.constexpr(x) for x in (1 + PPO_CLIP, 1 - PPO_CLIP, DECOUPLED_CAP))


@triton.jit
def importance_weight(s, b, advantage, m2_threshold, CORRECTION: tl.constexpr):
    """losses.importance_weight, of one sample each."""
    ratio = tl.exp(s - b)
    if CORRECTION == "none":
        ratio = tl.full(s.shape, 1.0, tl.float32)
    elif CORRECTION == "ppo":
        ratio = tl.where(((advantage >= 0) & (ratio > HIGHEST)) | ((advantage < 0) & (ratio < LOWEST)), 0.0, ratio)
    elif CORRECTION == "decoupled":
        ratio = tl.where(ratio > CAP, 0.0, ratio)
    elif CORRECTION == "m2po":
        ratio = tl.where((s - b) * (s - b) > m2_threshold, 0.0, ratio)
    else:
        tl.static_assert(CORRECTION == "is", "unknown correction")
    return ratio


@triton.jit
def sampled_reverse_kl_kernel(
    logits,  # [n,V] float32 or bfloat16, read and overwritten through grad
    grad,  # the same memory in the gradient's dtype, rows equally many bytes apart
    ids,  # [n,C] int64, read; -1: none
    teacher_logp,  # [n,C] float32, read
    behavior_logp,  # [n,C] float32, read
    loss,  # [n] float32, written
    student_logp,  # [n,C] float32, written
    c,  # [n,C] float32, scratch
    V, C, grad_stride, first_exact, first_draw, m2_threshold,
    SIGNAL: tl.constexpr, CORRECTION: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    lse = row_logsumexp(logits + n * V, V, LANES, DEPTH)
    k, there, s = row_gather(logits + n * V, ids + n * C, lse, C, CANDIDATES)
    t = tl.load(teacher_logp + n * C + k, mask=k < C, other=0.0)
    b = tl.load(behavior_logp + n * C + k, mask=k < C, other=0.0)
    advantage = t - (s if SIGNAL == "current" else b)
    draw = -importance_weight(s, b, advantage, m2_threshold, CORRECTION) * advantage / (C - first_draw)
    exact = tl.exp(s) * (s - t)
    coefficient = tl.where(k < first_draw, tl.where(k >= first_exact, exact, 0.0), draw)
    coefficient = tl.where(there, coefficient, 0.0)
    tl.store(loss + n, tl.sum(tl.where(k >= first_exact, coefficient * s, 0.0), 0))
    tl.store(student_logp + n * C + k, s, mask=k < C)
    tl.store(c + n * C + k, coefficient, mask=k < C)
    tl.debug_barrier()  # every thread sees the whole of c
    row_scatter(logits + n * V, grad + n * grad_stride, ids + n * C, c + n * C, lse, V, C, LANES, DEPTH, CANDIDATES)


def sampled_reverse_kl(
    logits: Tensor, ids: Tensor, teacher_logp: Tensor, behavior_logp: Tensor, dtype: torch.dtype,
    first_exact: int = 0, first_draw: int = 0, signal: str = "current", correction: str = "is", m2_threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What sparse_reverse_kl takes and returns, with behavior_logp float32 [n,C] beside teacher_logp.

    Columns [first_exact, first_draw) are summed exactly, those from first_draw on are draws.
    """
    if correction == "m2po" and m2_threshold is None:
        raise ValueError("correction m2po needs m2_threshold, computed over the whole update")
    return launch_loss(
        sampled_reverse_kl_kernel, logits, dtype, (ids, teacher_logp, behavior_logp), first_exact, first_draw, m2_threshold or 0.0,
        SIGNAL=signal, CORRECTION=correction,
    )  # fmt: skip
