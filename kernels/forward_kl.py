"""Forward KL as the fused kernel computes it; losses.ForwardKL in Triton.

    loss   sum_k e^{t_k} (t_k - s_k)    over the teacher's top K
    c_k    -e^{t_k}

kernels/shared.py calls the function below between its two passes over a row of logits.
"""

import triton
import triton.language as tl


@triton.jit
def forward_kl(s, t, b, k, first_draw, C):
    """(terms of the loss, c = dL/ds) of the candidates in columns k: float32, one each."""
    weight = tl.exp(t)
    return weight * (t - s), -weight
