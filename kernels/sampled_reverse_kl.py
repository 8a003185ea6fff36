"""Sampled and stratified reverse KL as the fused kernel computes them.

    loss   sum_top sg[e^s (s - t)] s  +  (1/N) sum_draws sg[e^(s - b) (s - t)] s
    c_k    what sg[...] holds, with 1/N at the draws

losses.StratifiedReverseKL has the top K as exact columns, and draws from the rest.
losses.SampledReverseKL has draws only. The corrections that the paper compares with have no kernel.
They go through gather, plain torch and scatter.
"""

import triton
import triton.language as tl


@triton.jit
def sampled_reverse_kl(s, t, b, k, first_draw, C):
    """(terms of the loss, c = dL/ds) of the candidates in columns k: float32, one each."""
    exact = tl.exp(s)
    drawn = tl.exp(s - b) / (C - first_draw)
    c = tl.where(k < first_draw, exact, drawn) * (s - t)
    return c * s, c
