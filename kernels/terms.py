"""What the fused kernel computes from a position's candidates: losses.py in Triton.

Each function gets s, t and b of the candidates in columns k, float32. It returns the terms of the
loss and their derivatives c = dL/ds. The compiler inlines it between the kernel's two passes over a
row of logits (fused_loss.py). The loss is about the columns from `first` up to `C`; those from
`first_draw` on are draws.

A loss that TERMS does not have is differentiated by autograd, and `given` hands its derivative to
the kernel.
"""

import triton
import triton.language as tl

import losses

BASELINE_DRAWS = tl.constexpr(losses.BASELINE_DRAWS)
EPSILON = tl.constexpr(losses.EPSILON)


@triton.jit
def forward_kl(s, t, b, k, first, first_draw, C):
    """sum_k e^t (t - s) over the teacher's top K; c = -e^t."""
    weight = tl.exp(t)
    return weight * (t - s), -weight


@triton.jit
def rest(mass):
    return tl.maximum(1.0 - mass, EPSILON)


@triton.jit
def peak_and_sum(logp, is_in):
    """The largest of some log-probabilities, and sum e^(logp - largest): e^logp may be 0 at all."""
    peak = tl.max(tl.where(is_in, logp, -1e38), 0)
    return peak, tl.sum(tl.where(is_in, tl.exp(logp - peak), 0.0), 0)


@triton.jit
def sparse_reverse_kl(s, t, b, k, first, first_draw, C):
    """sum_top sg[e^s (D - m)] s with D = s - t; c is what sg[...] holds.

    m is the mean of D over the edge of the top K, all but its first quarter, plus what the
    log-ratio of masses of the rest is above that of the edge.
    """
    is_top = (k >= first) & (k < C)
    is_edge = is_top & (k >= first + (C - first) // 4)
    d = s - t
    p = tl.where(is_top, tl.exp(s), 0.0)
    q = tl.where(is_top, tl.exp(t), 0.0)
    s_peak, s_sum = peak_and_sum(s, is_edge)
    t_peak, t_sum = peak_and_sum(t, is_edge)
    mean_edge = tl.sum(tl.where(is_edge, tl.exp(s - s_peak) * d, 0.0), 0) / s_sum
    log_ratio = s_peak - t_peak + tl.log(s_sum / t_sum)
    rest_log_ratio = tl.log(rest(tl.sum(p, 0)) / rest(tl.sum(q, 0)))
    m = mean_edge + tl.maximum(rest_log_ratio - log_ratio, 0.0)
    c = p * (d - m)
    return c * s, c


@triton.jit
def sampled_reverse_kl(s, t, b, k, first, first_draw, C):
    """sum_top sg[e^s (D - m)] s + (1/N) sum_draws sg[e^(s - b) (D - m_i)] s, with D = s - t.

    c is what sg[...] holds, with 1/N at the draws. m_i is the mean of D over the other draws, and m
    the mean over all of them; with fewer than BASELINE_DRAWS draws both are 0.
    """
    count = C - first_draw
    d = s - t
    drawn = tl.exp(s - b) / count
    if count >= BASELINE_DRAWS:
        d -= tl.sum(tl.where((k >= first_draw) & (k < C), d, 0.0), 0) / count
        # D_i less the mean of the others is count / (count - 1) times D_i less the mean of all.
        drawn = tl.exp(s - b) / (count - 1)
    c = tl.where(k < first_draw, tl.exp(s), drawn) * d
    return c * s, c


@triton.jit
def given(s, t, b, k, first, first_draw, C):
    """The derivative is known. It stands where the kernel expects t."""
    return t, t


# By the very class: a loss that inherits from one of these and overrides `value` is not in here.
TERMS = {
    losses.ForwardKL: forward_kl,
    losses.SparseReverseKL: sparse_reverse_kl,
    losses.SampledReverseKL: sampled_reverse_kl,
    losses.StratifiedReverseKL: sampled_reverse_kl,
}
