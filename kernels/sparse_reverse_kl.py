"""Sparse reverse KL as the fused kernel computes it; losses.SparseReverseKL in Triton.

    loss   sum_k e^{s_k} (s_k - t_k)    over the sampler's top K
    c_k    e^{s_k} (s_k - t_k + 1)

kernels/shared.py calls the function below between its two passes over a row of logits.
"""

import triton
import triton.language as tl


@triton.jit
def sparse_reverse_kl(s, t, b, k, first_draw, C):
    """(terms of the loss, c = dL/ds) of the candidates in columns k: float32, one each."""
    weight = tl.exp(s)
    return weight * (s - t), weight * (s - t + 1.0)
