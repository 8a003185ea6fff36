"""The LM head in chunks of positions: log-probabilities and loss gradients without [N,V] logits.

    N  positions      n  positions of one chunk      D  hidden size      V  vocabulary      C  candidates

Every loss here is a function of candidate log-probabilities s = z[ids] - logsumexp(z) with logits
z = scale * h W^T, so its gradient with respect to one row of logits needs only c_k = dL/ds_k:

    dL/dz_j = sum_{k: ids_k = j} c_k  -  softmax(z)_j * sum_k c_k

`candidate_loss` computes that in the forward pass, chunk by chunk and in place of the logits, and with it
dh = g W and dW += g^T h: three matrix products in all, nothing recomputed, memory O(n V) whatever N is.
Plain torch on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def head_logits(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    """scale * h W^T in float32 (float64 for float64 inputs): [n,D], [V,D] -> [n,V], accumulated and kept in float32."""
    if hidden.dtype in (torch.float32, torch.float64):
        logits = hidden @ weight.t()
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().t()
    return logits if scale == 1.0 else logits.mul_(scale)


def logp_chunks(hidden: Tensor, weight: Tensor, scale: float, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, log_softmax of those rows' logits [n,V]); the buffer is the caller's to overwrite."""
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, min(start + chunk, hidden.shape[0]))
        logits = head_logits(hidden[rows], weight, scale)
        yield rows, logits.sub_(logits.logsumexp(-1, keepdim=True))


@torch.no_grad()
def candidate_logp(hidden: Tensor, weight: Tensor, ids: Tensor, scale: float = 1.0, chunk: int = 1024) -> Tensor:
    """Log-probabilities of given ids: hidden [N,D], weight [V,D], ids int64 [N,C] -> [N,C]. No gradient."""
    chunks = logp_chunks(hidden, weight, scale, chunk)
    parts = [logp.gather(1, ids[rows]) for rows, logp in chunks]
    return torch.cat(parts) if parts else hidden.new_zeros(ids.shape)


class _CandidateLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, loss_fn, scale, chunk):
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        student_logp = []
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        compute_weight = weight.to(hidden.dtype)
        for rows, logp in logp_chunks(hidden, compute_weight, scale, chunk):
            s = logp.gather(1, ids[rows]).requires_grad_()
            with torch.enable_grad():
                loss = loss_fn(s, rows).sum(dtype=torch.float64)
            (c,) = torch.autograd.grad(loss, s)
            total += loss.detach()
            student_logp.append(s.detach())
            grad_logits = logp.exp_().mul_(-c.sum(-1, keepdim=True)).scatter_add_(1, ids[rows], c).mul_(scale)
            g = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = g @ compute_weight
            grad_weight += g.t() @ hidden[rows]
        student_logp = torch.cat(student_logp) if student_logp else hidden.new_zeros(ids.shape)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(student_logp)
        return total, student_logp

    @staticmethod
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None, None, None


def candidate_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, loss_fn: Callable[[Tensor, slice], Tensor],
    scale: float = 1.0, chunk: int = 1024,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum of a loss over positions, with gradients to `hidden` and `weight`, never holding more than `chunk` rows of logits.

    hidden [N,D] sets the dtype of the products, weight [V,D] (a float32 master) that of its own gradient; ids int64 [N,C]; `loss_fn(student_logp
    [n,C], rows)` returns the loss of those rows [n], differentiable in student_logp. N may be 0: the graph stays connected, the loss is 0.
    Returns (loss summed over N, float64 scalar; student_logp [N,C], detached).
    """
    return _CandidateLoss.apply(hidden, weight, ids, loss_fn, scale, chunk)
