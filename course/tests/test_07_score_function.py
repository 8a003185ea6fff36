"""Public tests of exercise 7. A vocabulary of a few ids is small enough to try every draw."""

import torch

from claims import check, close, worth

LOSS = "sampled_reverse_kl"
ONE = {"num_samples": 1}


def distributions(seed: int = 0, vocab: int = 6):
    """Log-probabilities s, t, b [V] of a student, a teacher and an older student, float64."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(3, vocab, generator=random, dtype=torch.float64).log_softmax(-1)


def exact_gradient(s, t):
    """Of KL(student || teacher) with respect to the student's logits [V], by autograd."""
    logits = s.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad((logp.exp() * (logp - t)).sum(), logits)
    return gradient


def mean_gradient(student, s, t, b):
    """The loss's gradient with respect to the logits, a mean over the draws: each id is drawn once,
    and counts as often as the sampler b draws it."""
    _, c = student.loss_and_gradient(LOSS, ONE, s[:, None], t[:, None], b[:, None])
    weighted = b.exp() * c[:, 0]
    return weighted - s.exp() * weighted.sum()


@worth(2)
def test_without_lag_the_mean_gradient_is_exact(student):
    """Without lag (b = s) the mean gradient over the draws is that of the reverse KL."""
    s, t, _ = distributions()
    close(mean_gradient(student, s, t, s), exact_gradient(s, t), "the mean gradient")


@worth(2)
def test_with_lag_the_mean_gradient_is_exact(student):
    """With draws of an older student (b is not s) the mean gradient is still exact."""
    s, t, b = distributions(1)
    close(mean_gradient(student, s, t, b), exact_gradient(s, t), "the mean gradient at a lag")


@worth(1)
def test_the_estimate_of_the_reverse_kl_is_unbiased(student):
    """reverse_kl is KL(student || teacher) on average, also from an older student's draws."""
    s, t, b = distributions(2)
    found = student.reverse_kl_estimate(LOSS, ONE, s[:, None], t[:, None], b[:, None])
    check(tuple(found.shape) == (6,), f"6 positions give the shape {tuple(found.shape)}")
    close((b.exp() * found).sum(), (s.exp() * (s - t)).sum(), "the mean of reverse_kl")
