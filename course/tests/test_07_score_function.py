"""Public tests of exercise 7. The vocabulary is small enough to try every way to draw."""

import torch

from claims import check, close, worth

LOSS = "sampled_reverse_kl"


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


def every_draw(b, draws: int):
    """Each row is one way in which the draws may come: (ids [T,N], how often it comes [T])."""
    ids = torch.cartesian_prod(*[torch.arange(len(b))] * draws).reshape(-1, draws)
    return ids, b[ids].sum(-1).exp()


def mean_gradient(student, s, t, b, draws: int):
    """The loss's gradient with respect to the student's logits [V], a mean over all ways in which
    the sampler b may draw."""
    ids, share = every_draw(b, draws)
    value, c = student.loss_and_gradient(LOSS, {"num_samples": draws}, s[ids], t[ids], b[ids])
    check(value.shape == share.shape, f"{len(ids)} positions give the shape {tuple(value.shape)}")
    of_id = torch.zeros(len(s), dtype=s.dtype)
    of_id.index_add_(0, ids.flatten(), (share[:, None] * c).flatten())
    return of_id - s.exp() * of_id.sum()


@worth(1)
def test_without_lag_the_mean_gradient_is_exact(student):
    """Without lag (b = s) the mean gradient over the draws is that of the reverse KL."""
    s, t, _ = distributions()
    close(mean_gradient(student, s, t, s, 1), exact_gradient(s, t), "the mean gradient")


@worth(1)
def test_with_lag_the_mean_gradient_is_exact(student):
    """With draws of an older student (b is not s) the mean gradient is still exact."""
    s, t, b = distributions(1)
    close(mean_gradient(student, s, t, b, 1), exact_gradient(s, t), "the mean gradient at a lag")


@worth(1)
def test_with_several_draws_the_mean_gradient_is_exact(student):
    """With 3 draws for each position the mean gradient is still exact, without lag and with it."""
    s, t, b = distributions(2)
    for sampler, lag in ((s, "without lag"), (b, "at a lag")):
        found = mean_gradient(student, s, t, sampler, 3)
        close(found, exact_gradient(s, t), f"the mean gradient of 3 draws {lag}")


@worth(1)
def test_with_a_baseline_the_mean_gradient_is_exact(student):
    """With 8 draws there is a baseline. The mean gradient over all 6561 ways to draw 8 of 3 ids is
    still exact; and of brackets that are the same for all draws of a position nothing is left."""
    s, t, b = distributions(3, vocab=3)
    found = mean_gradient(student, s, t, b, 8)
    close(found, exact_gradient(s, t), "the mean gradient of 8 draws")
    random = torch.Generator().manual_seed(4)
    s, b = -5 * torch.rand(2, 6, 8, generator=random, dtype=torch.float64)
    bracket = torch.arange(-2.0, 4.0, dtype=torch.float64)[:, None]  # log s - log t
    _, c = student.loss_and_gradient(LOSS, {"num_samples": 8}, s, s - bracket, b)
    worst = float(c.abs().max())
    check(
        worst < 1e-9,
        f"8 draws have the same bracket, and a derivative is {worst:.6g} in size: 0 is right",
    )


@worth(1)
def test_the_estimate_of_the_reverse_kl_is_unbiased(student):
    """reverse_kl is KL(student || teacher) on average, also from draws of an older student, and
    for any number of draws."""
    s, t, b = distributions(2)
    for draws, said in ((1, "1 draw"), (3, "3 draws")):
        ids, share = every_draw(b, draws)
        settings = {"num_samples": draws}
        found = student.reverse_kl_estimate(LOSS, settings, s[ids], t[ids], b[ids])
        shape = tuple(found.shape)
        check(shape == share.shape, f"{len(ids)} positions give the shape {shape}")
        right = (s.exp() * (s - t)).sum()
        close((share * found).sum(), right, f"the mean of reverse_kl with {said}")
