"""Sampled and stratified reverse KL as the fused kernel computes them.

    loss   sum_top sg[e^s (D - m)] s  +  (1/N) sum_draws sg[e^(s - b) (D - m_i)] s,    D = s - t
    c_k    what sg[...] holds, with 1/N at the draws

The baseline m_i is the mean of D over the other draws, and m the mean over all. With fewer than
BASELINE_DRAWS draws they are 0. losses.StratifiedReverseKL has the top K as exact columns, and
draws from the rest. losses.SampledReverseKL has draws only.
"""

import triton
import triton.language as tl

BASELINE_DRAWS = tl.constexpr(8)  # fewer draws have no baseline


@triton.jit
def sampled_reverse_kl(s, t, b, k, first_draw, C):
    """(terms of the loss, c = dL/ds) of the candidates in columns k: float32, one each."""
    count = C - first_draw
    d = s - t
    drawn = tl.exp(s - b) / count
    if count >= BASELINE_DRAWS:
        d -= tl.sum(tl.where((k >= first_draw) & (k < C), d, 0.0), 0) / count
        drawn = tl.exp(s - b) / (count - 1)
    c = tl.where(k < first_draw, tl.exp(s), drawn) * d
    return c * s, c
