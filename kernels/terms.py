"""What the fused kernel computes from a position's candidates: losses.py in Triton.

Each function gets s, t and b of the candidates in columns k, float32. It returns the terms of the
loss and their derivatives c = dL/ds. The compiler inlines it between the kernel's two passes over a
row of logits (fused_loss.py). Columns from `first_draw` on are draws, `C` is their end.

A loss that TERMS does not have is differentiated by autograd, and `given` hands its derivative to
the kernel.
"""

import triton
import triton.language as tl

import losses

BASELINE_DRAWS = tl.constexpr(losses.BASELINE_DRAWS)


@triton.jit
def forward_kl(s, t, b, k, first_draw, C):
    """sum_k e^t (t - s) over the teacher's top K; c = -e^t."""
    weight = tl.exp(t)
    return weight * (t - s), -weight


@triton.jit
def sparse_reverse_kl(s, t, b, k, first_draw, C):
    """sum_k e^s (s - t) over the sampler's top K; c = e^s (s - t + 1)."""
    weight = tl.exp(s)
    return weight * (s - t), weight * (s - t + 1.0)


@triton.jit
def sampled_reverse_kl(s, t, b, k, first_draw, C):
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
def given(s, t, b, k, first_draw, C):
    """The derivative is known. It stands where the kernel expects t."""
    return t, t


# By the very class: a loss that inherits from one of these and overrides `value` is not in here.
TERMS = {
    losses.ForwardKL: forward_kl,
    losses.SparseReverseKL: sparse_reverse_kl,
    losses.SampledReverseKL: sampled_reverse_kl,
    losses.StratifiedReverseKL: sampled_reverse_kl,
}
