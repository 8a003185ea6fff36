"""The LM head in chunks of positions: log-probabilities and loss gradients without [N,V] logits.

    N  positions      n  positions of one chunk      D  hidden size      V  vocabulary      C  candidates

Every loss here is a function of candidate log-probabilities s = z[ids] - logsumexp(z) with logits
z = scale * h W^T, so its gradient with respect to one row of logits needs only c_k = dL/ds_k:

    dL/dz_j = sum_{k: ids_k = j} c_k  -  softmax(z)_j * sum_k c_k

`candidate_loss` computes that in the forward pass, chunk by chunk and in place of the logits, and with it
dh = g W and dW += g^T h: three matrix products in all, nothing recomputed, memory O(n V) whatever N is.

On a GPU a chunk goes through Triton: the loss's own kernel if it has one, else `gather`, the loss in plain torch,
`scatter`. Without a GPU, and in float64, plain torch does all of it. docs/kernels.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_DTYPE = torch.float32  # what a bfloat16 head product is rounded to for the loss; docs/decisions.md compares


def uses_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64


def head_logits(hidden: Tensor, weight: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale * h W^T: [n,D], [V,D] -> [n,V], accumulated in float32 and rounded to `dtype`. float64 inputs stay float64."""
    if hidden.dtype in (torch.float32, torch.float64, dtype):
        logits = hidden @ weight.t()
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=dtype)
    else:
        logits = hidden.float() @ weight.float().t()
    return logits if scale == 1.0 else logits.mul_(scale)


def logit_chunks(
    hidden: Tensor, weight: Tensor, scale: float, chunk: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their logits [n,V]); the buffer is the caller's to overwrite."""
    for start in range(0, hidden.shape[0], chunk):
        rows = slice(start, min(start + chunk, hidden.shape[0]))
        yield rows, head_logits(hidden[rows], weight, scale, dtype)


def gather(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ids, 0 where an id is -1: logits [n,V], ids int64 [n,C] -> ([n,C], logsumexp [n])."""
    if uses_triton(logits):
        from kernels import rows  # Triton is loaded where it is used

        return rows.gather(logits, ids)
    logsumexp = logits.logsumexp(-1)
    return (logits.gather(1, ids.clamp(min=0)) - logsumexp[:, None]).masked_fill_(ids < 0, 0.0), logsumexp


def scatter(logits: Tensor, ids: Tensor, c: Tensor, logsumexp: Tensor, dtype: torch.dtype) -> Tensor:
    """Overwrite logits [n,V] with the gradient, given c = dL/ds [n,C] (0 where an id is -1); returns it as `dtype`."""
    if uses_triton(logits):
        from kernels import rows

        return rows.scatter(logits, ids, c, logsumexp, dtype)
    softmax = logits.sub_(logsumexp[:, None]).exp_()
    return softmax.mul_(-c.sum(-1, keepdim=True)).scatter_add_(1, ids.clamp(min=0), c).to(dtype)


@torch.no_grad()
def candidate_logp(hidden: Tensor, weight: Tensor, ids: Tensor, scale: float = 1.0, chunk: int = 1024) -> Tensor:
    """Log-probabilities of given ids: hidden [N,D], weight [V,D], ids int64 [N,C] -> [N,C]. No gradient."""
    logp = torch.empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for rows, logits in logit_chunks(hidden, weight, scale, chunk):
        logp[rows] = gather(logits, ids[rows])[0]
        del logits  # before the next chunk's are made
    return logp


def fused_loss(config, m2_threshold: float | None = None) -> Callable | None:
    """The Triton kernel of the configured loss, the counterpart of losses.make_loss; None where there is none.

    A function (logits [n,V], ids, teacher_logp, behavior_logp [n,C], dtype) -> (loss [n], student_logp [n,C], gradient
    [n,V] of that dtype in the memory of logits).
    """
    top, tail = config.columns["top"].start, config.columns["tail"].start

    def fused(logits: Tensor, ids: Tensor, t: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        from kernels.sampled_reverse_kl import sampled_reverse_kl
        from kernels.sparse_reverse_kl import sparse_reverse_kl

        if config.loss == "sparse_reverse_kl":
            return sparse_reverse_kl(logits, ids, t, dtype, top)
        if config.loss == "stratified_reverse_kl":
            return sampled_reverse_kl(logits, ids, t, b, dtype, top, tail)
        return sampled_reverse_kl(logits, ids, t, b, dtype, 0, 0, config.signal, config.correction, m2_threshold)

    return fused if config.loss in ("sparse_reverse_kl", "sampled_reverse_kl", "stratified_reverse_kl") else None


def unfused_loss(loss: Callable, logits: Tensor, ids: Tensor, t: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What a fused loss returns, for any `loss(student_logp, teacher_logp, behavior_logp)` -> [n]."""
    s, logsumexp = gather(logits, ids)
    with torch.enable_grad():
        value = loss(s.requires_grad_(), t, b)
        (c,) = torch.autograd.grad(value.sum(), s)
    return value.detach(), s.detach(), scatter(logits, ids, c.masked_fill(ids < 0, 0.0).contiguous(), logsumexp, dtype)


class _CandidateLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, teacher_logp, behavior_logp, loss, fused, scale, chunk):
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        student_logp = torch.empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        compute_weight = weight.to(hidden.dtype)
        for rows, logits in logit_chunks(hidden, compute_weight, scale, chunk, LOGITS_DTYPE):
            candidates = ids[rows], teacher_logp[rows], behavior_logp[rows]
            if fused and uses_triton(logits):
                value, student_logp[rows], g = fused(logits, *candidates, hidden.dtype)
            else:
                value, student_logp[rows], g = unfused_loss(loss, logits, *candidates, hidden.dtype)
            total += value.sum(dtype=torch.float64)
            grad_hidden[rows] = torch.mm(g, compute_weight).mul_(scale)
            add_product(grad_weight, g.t(), hidden[rows], scale)
            del logits, g  # one chunk's memory, before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(student_logp)
        return total, student_logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None, None, None, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float):
    """total += scale * a b, summed in total's dtype: a bfloat16 product of each chunk would be rounded once a chunk."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=scale)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=scale)


def candidate_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, teacher_logp: Tensor, behavior_logp: Tensor, loss: Callable,
    fused: Callable | None = None, scale: float = 1.0, chunk: int = 1024,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum of a loss over positions, with gradients to `hidden` and `weight`, never holding more than `chunk` rows of logits.

    hidden [N,D] sets the dtype of the products, weight [V,D] (a float32 master) that of its own gradient. ids int64 [N,C]:
    candidates; -1 where there is none, with teacher_logp and behavior_logp [N,C] 0 there. `loss(student_logp, teacher_logp,
    behavior_logp)` [n,C] -> [n] is the specification (losses.make_loss), `fused` its kernel (fused_loss), used on a GPU.
    N may be 0: the graph stays connected, the loss is 0. Returns (loss summed over N, float64 scalar; student_logp [N,C], detached).
    """
    return _CandidateLoss.apply(hidden, weight, ids, teacher_logp, behavior_logp, loss, fused, scale, chunk)
