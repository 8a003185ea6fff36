"""The LM head in chunks of positions: losses and their gradients without logits [T,V].

Letters of shapes: serial.py. A chunk has G of the T positions. Every loss here is a function of
the log-probabilities s = z[ids] - logsumexp(z) of the candidates, with logits z = scale * h W^T. So
its gradient with respect to one row of logits needs only c_k = dL/ds_k:

    dL/dz_j = sum_{k: ids_k = j} c_k  -  softmax(z)_j * sum_k c_k

`candidate_loss` computes it in the forward pass, chunk by chunk, in place of the logits. Then
dh = g W and dW += g^T h. These are three matrix products in all. Nothing is recomputed, and the
memory is O(G V) for any T.

On a GPU one Triton kernel turns a chunk of logits into loss and gradient (kernels/fused_loss.py).
Without a GPU, and in float64, plain torch does. docs/kernels.md has the derivation.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels.fused_loss import fused_loss
from kernels.terms import TERMS, given

# What a bfloat16 head product is rounded to; docs/kernels.md compares.
LOGITS_DTYPE = torch.float32


def uses_triton(tensor):
    return tensor.is_cuda and tensor.dtype != torch.float64


def head_logits(hidden, weight, scale=1.0):
    """scale * h W^T: [G,F], [V,F] -> [G,V].

    Summed in float32 and rounded to LOGITS_DTYPE, or to the dtype of `hidden` where that is wider.
    """
    kind = torch.promote_types(hidden.dtype, LOGITS_DTYPE)
    if hidden.is_cuda and hidden.dtype != kind:
        logits = torch.mm(hidden, weight.t(), out_dtype=kind)
    else:
        logits = hidden.to(kind) @ weight.to(kind).t()
    return logits if scale == 1.0 else logits.mul_(scale)


def logit_chunks(hidden, weight, scale, chunk):
    """Yield (positions, their logits [G,V]). The caller may overwrite the logits.

    The caller deletes its logits before it asks for the next, or two chunks would exist.
    """
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        yield part, head_logits(hidden[part], weight, scale)


def gather(logits, ids):
    """Log-probabilities of ids int64 [G,C], and logsumexp [G]; dtype of the logits."""
    logsumexp = logits.logsumexp(-1)
    return logits.gather(1, ids) - logsumexp[:, None], logsumexp


def loss_and_gradient(loss, logits, ids, t, b, dtype):
    """A loss on one chunk: (its value [G], student_logp [G,C], gradient [G,V] of `dtype`).

    The gradient overwrites the logits.
    """
    terms = TERMS.get(type(loss))
    if terms and uses_triton(logits):
        return fused_loss(terms, logits, ids, t, b, dtype, *loss_columns(loss))
    return unfused_loss(loss, logits, ids, t, b, dtype)


def loss_columns(loss):
    """(first column that carries a loss, first of these that is a draw), for the fused kernel.

    A loss with top ids or tail draws does not train on column 0, the emitted token.
    """
    if loss.num_columns == loss.draws.stop:  # draws only
        return 0, 0
    return loss.top.start, loss.tail.start


def unfused_loss(loss, logits, ids, t, b, dtype):
    """The same for any `loss.value`, by autograd through the candidates alone."""
    s, logsumexp = gather(logits, ids)
    with torch.enable_grad():
        value = loss.value(s.requires_grad_(), t, b)
        (c,) = torch.autograd.grad(value.sum(), s)
    if uses_triton(logits):
        _, _, gradient = fused_loss(given, logits, ids, c, c, dtype, 0, 0)
    else:
        softmax = logits.sub_(logsumexp[:, None]).exp_()  # [G,V], in place
        softmax.mul_(-c.sum(-1, keepdim=True))
        gradient = softmax.scatter_add_(1, ids, c).to(dtype)  # equal ids add up
    return value.detach(), s.detach(), gradient


class CandidateLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, t, b, loss, scale, chunk):
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        student_logp = torch.empty_like(t)  # [T,C]
        grad_hidden = torch.empty_like(hidden)  # [T,F]
        kind = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=kind)  # [V,F]
        compute_weight = weight.to(hidden.dtype)  # the float32 master, rounded once for all chunks
        for part, logits in logit_chunks(hidden, compute_weight, scale, chunk):
            tables = (ids[part], t[part], b[part])
            value, student_logp[part], g = loss_and_gradient(loss, logits, *tables, hidden.dtype)
            total += value.sum(dtype=torch.float64)
            grad_hidden[part] = torch.mm(g, compute_weight).mul_(scale)
            add_product(grad_weight, g.t(), hidden[part], scale)
            del logits, g
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(student_logp)
        return total, student_logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden * grad_total, grad_weight, *[None] * 6


def add_product(total, a, b, scale):
    """total += scale * a b, summed in the dtype of `total`.

    A bfloat16 product of each chunk would be rounded once a chunk.
    """
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=scale)


def candidate_loss(hidden, weight, ids, t, b, loss, scale=1.0, chunk=1024):
    """Sum of a losses.Loss over positions, with gradients to `hidden` and `weight`.

    hidden [T,F] sets the dtype of the products. The gradient of weight [V,F] is summed in float32
    and rounded once to the dtype of weight. ids int64 [T,C] are the candidates, t and b [T,C] the
    log-probabilities that teacher and sampler gave them. At most `chunk` rows of logits exist at
    once. T may be 0: the graph stays connected and the loss is 0.

    Returns (loss summed over T, float64 scalar; student_logp [T,C], detached).
    """
    return CandidateLoss.apply(hidden, weight, ids, t, b, loss, scale, chunk)
