"""Exercise 7: score-function reverse KL."""

import torch


def loss_and_gradient(loss: str, settings: dict, s, t, b):
    """(value [T], its derivative with respect to s [T,C]) of a loss of losses.LOSSES."""
    from losses import LOSSES
    from support.config import builtin

    s = s.clone().requires_grad_()
    value = LOSSES[loss](builtin(loss=loss, **settings)).value(s, t, b)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    return value.detach(), gradient


def reverse_kl_estimate(loss: str, settings: dict, s, t, b):
    """Loss.reverse_kl of each position [T]."""
    from losses import LOSSES
    from support.config import builtin

    return LOSSES[loss](builtin(loss=loss, **settings)).reverse_kl(s, t, b)
