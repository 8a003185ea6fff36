"""Sampled and stratified reverse KL: logits in, loss out, the gradient where the logits were.

    loss   sum_exact sg[e^s (s - t)] s  -  (1/N) sum_draws sg[w A] s        see losses.py
    c_k    e^{s_k} (s_k - t_k) at the exact columns,  -w_k A_k / N at the draws,  0 before both

s_k = z[ids_k] - logsumexp(z). The sampled loss has draws only. The stratified loss has the
sampler's top K as exact columns, and draws from the rest. SIGNAL chooses A = t - s or A = t - b,
CORRECTION chooses w; the compiler sees both.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from kernels.shared import launch_loss, row_gather, row_logsumexp, row_scatter
from losses import DECOUPLED_CAP, PPO_CLIP

HIGHEST = constexpr(1 + PPO_CLIP)
LOWEST = constexpr(1 - PPO_CLIP)
CAP = constexpr(DECOUPLED_CAP)


@triton.jit
def importance_weight(s, b, advantage, m2_threshold, CORRECTION: constexpr):
    """losses.importance_weight, of one sample each."""
    ratio = tl.exp(s - b)
    if CORRECTION == "none":
        ratio = tl.full(s.shape, 1.0, tl.float32)
    elif CORRECTION == "ppo":
        is_high = (advantage >= 0) & (ratio > HIGHEST)
        is_low = (advantage < 0) & (ratio < LOWEST)
        ratio = tl.where(is_high | is_low, 0.0, ratio)
    elif CORRECTION == "decoupled":
        ratio = tl.where(ratio > CAP, 0.0, ratio)
    elif CORRECTION == "m2po":
        ratio = tl.where((s - b) * (s - b) > m2_threshold, 0.0, ratio)
    else:
        tl.static_assert(CORRECTION == "is", "unknown correction")
    return ratio


@triton.jit
def sampled_reverse_kl_kernel(
    logits,  # [G,V] float32 or bfloat16, read and overwritten through grad
    grad,  # the same memory in the gradient's dtype, rows equally many bytes apart
    ids,  # [G,C] int64, read; -1: none
    teacher_logp,  # [G,C] float32, read
    behavior_logp,  # [G,C] float32, read
    loss,  # [G] float32, written
    student_logp,  # [G,C] float32, written
    c,  # [G,C] float32, scratch
    V,
    C,
    grad_stride,
    first_exact,
    first_draw,
    m2_threshold,
    SIGNAL: constexpr,
    CORRECTION: constexpr,
    LANES: constexpr,
    CANDIDATES: constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    row, grad_row = logits + g * V, grad + g * grad_stride
    lse = row_logsumexp(row, V, LANES)
    k, found, s = row_gather(row, ids + g * C, lse, C, CANDIDATES)
    t = tl.load(teacher_logp + g * C + k, mask=k < C, other=0.0)
    b = tl.load(behavior_logp + g * C + k, mask=k < C, other=0.0)
    advantage = t - (s if SIGNAL == "current" else b)
    weight = importance_weight(s, b, advantage, m2_threshold, CORRECTION)
    draw = -weight * advantage / (C - first_draw)
    exact = tl.where(k >= first_exact, tl.exp(s) * (s - t), 0.0)
    coefficient = tl.where(found >= 0, tl.where(k < first_draw, exact, draw), 0.0)
    value = tl.where(k >= first_exact, coefficient * s, 0.0)
    tl.store(loss + g, tl.sum(value, 0))
    tl.store(student_logp + g * C + k, s, mask=k < C)
    tl.store(c + g * C + k, coefficient, mask=k < C)
    tl.debug_barrier()  # every thread sees the whole of c
    row_scatter(row, grad_row, ids + g * C, c + g * C, lse, V, C, LANES, CANDIDATES)


def sampled_reverse_kl(
    logits,
    ids,
    teacher_logp,
    behavior_logp,
    dtype,
    first_exact=0,
    first_draw=0,
    signal="current",
    correction="is",
    m2_threshold=None,
):
    """What sparse_reverse_kl takes and returns, with behavior_logp float32 [G,C] in addition.

    Columns [first_exact, first_draw) are summed exactly, those from first_draw on are draws.
    Raises ValueError if m2po has no threshold.
    """
    if correction == "m2po" and m2_threshold is None:
        raise ValueError("correction m2po needs m2_threshold, computed over the whole update")
    return launch_loss(
        sampled_reverse_kl_kernel,
        logits,
        dtype,
        (ids, teacher_logp, behavior_logp),
        first_exact,
        first_draw,
        m2_threshold or 0.0,
        SIGNAL=signal,
        CORRECTION=correction,
    )
