"""Public tests of exercise 11: claims about every unbiased estimator of the gradient.

They draw the candidates of many positions by themselves, as Proposal lays them out. A `propose` of
your own is not called.
"""

import numpy as np
import torch

from claims import check, worth

WIDEST = 33  # columns
POSITIONS = 40_000
# Variance of the gradient of 32 plain draws at situation(3, 2.0), summed over the logits.
PLAIN = 0.00750


def situation(seed: int, slope: float, lag: float = 0.0, vocab: int = 48):
    """Log-probabilities s, t, b [V] of a student, a teacher and an older student, float64.

    `slope`: how steeply the probabilities fall from the first id to the last. No id is so rare that
    it is drawn at a few positions only: then a standard error would say little.
    """
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, vocab, generator=random, dtype=torch.float64).clamp(-2, 2)
    student = 0.3 * noise[0] - slope * torch.arange(1, vocab + 1).double().log()
    logits = torch.stack([student, student + noise[1], student + lag * noise[2]])
    return (0.9 * logits.softmax(-1) + 0.1 / vocab).log()


def exact_gradient(s, t):
    """Of KL(student || teacher) with respect to the student's logits [V], by autograd."""
    logits = s.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad((logp.exp() * (logp - t)).sum(), logits)
    return gradient


def columns_of(student):
    """How many draws, top and tail columns it has."""
    found = student.estimator_columns()
    counts = [found[name][1] - found[name][0] for name in ("draws", "top", "tail")]
    draws, top, tail = counts
    right = {"draws": [0, draws], "top": [draws, draws + top], "tail": [draws + top, sum(counts)]}
    right |= {"width": sum(counts), "teacher_top": 0}
    check(min(counts) >= 0, f"its columns are {found}: one of the numbers is negative")
    check(draws >= 1, "it has no draw: column 0 is the emitted token")
    check(found == right, f"its columns are {found}, those of Proposal would be {right}")
    check(top > 0 or tail == 0, "it has a tail without a top, and Proposal draws none then")
    check(sum(counts) <= WIDEST, f"it has {sum(counts)} candidates, {WIDEST} are allowed")
    return counts


def candidates(counts, b, positions: int, seed: int):
    """ids and behavior_logp [T,C] of so many positions, drawn from the sampler b [V]."""
    draws, top, tail = counts
    random = np.random.default_rng(seed)
    probs = b.exp().numpy()
    probs /= probs.sum()
    order = np.argsort(-probs)
    outside = probs.copy()
    outside[order[:top]] = 0.0
    outside /= outside.sum()
    drawn = random.choice(len(b), (positions, draws), p=probs)
    exact = np.tile(order[:top], (positions, 1))
    rest = random.choice(len(b), (positions, tail), p=outside)
    ids = np.concatenate([drawn, exact, rest], 1)
    density = np.concatenate([probs[drawn], probs[exact], outside[rest]], 1)
    return torch.from_numpy(ids), torch.from_numpy(np.log(density))


def gradients(student, s, t, b, seed: int):
    """Its gradient with respect to the logits at every position [T,V]."""
    ids, behavior = candidates(columns_of(student), b, POSITIONS, seed)
    _, c = student.estimator_gradient(s[ids], t[ids], behavior)
    check(bool(c.isfinite().all()), "its derivative is not a finite number everywhere")
    found = torch.zeros(POSITIONS, len(s), dtype=torch.float64).scatter_add(1, ids, c)
    return found - c.sum(-1, keepdim=True) * s.exp()


def check_mean(student, s, t, b, seed: int, where: str):
    """The mean gradient is exact, up to 5 standard errors of the mean. Returns the gradients."""
    found = gradients(student, s, t, b, seed)
    right = exact_gradient(s, t)
    mean, error = found.mean(0), found.std(0) / POSITIONS**0.5
    excess = (mean - right).abs() - 5 * error
    worst = int(excess.argmax())
    check(
        bool(excess.max() <= 1e-5 * right.abs().max()),
        f"{where} the mean gradient over {POSITIONS} positions is biased: at logit {worst} it is "
        f"{float(mean[worst]):.4g} with a standard error of {float(error[worst]):.2g}, "
        f"{float(right[worst]):.4g} is right",
    )
    return found


def check_variance(student, s, t, b, seed: int, plain: float, limit: float, where: str):
    """Its variance is below `limit` times `plain`. That of a biased estimator does not count."""
    found = check_mean(student, s, t, b, seed, where)
    share = float(found.var(0).sum()) / plain
    check(
        share < limit,
        f"{where} its variance is {share:.3g} times that of 32 plain draws, "
        f"less than {limit} is asked for",
    )


@worth(1)
def test_the_class_can_be_made(student):
    """Mine(config) is a Loss, and its value has one entry for each position."""
    width = student.estimator_columns()["width"]
    random = torch.Generator().manual_seed(0)
    for positions in (7, 1):
        tables = -3 * torch.rand(3, positions, width, generator=random) - 0.1
        value, _ = student.estimator_gradient(*tables)
        shape = tuple(value.shape)
        check(shape == (positions,), f"{positions} positions give a value of the shape {shape}")


@worth(1)
def test_there_are_at_most_33_candidates(student):
    """The candidates are laid out as Proposal does, 33 columns at most."""
    columns_of(student)


@worth(1)
def test_without_lag_the_mean_gradient_is_exact(student):
    """Without lag the mean gradient is that of the reverse KL."""
    s, t, _ = situation(1, slope=1.5)
    check_mean(student, s, t, s, 1, "without lag")


@worth(2)
def test_with_lag_the_mean_gradient_is_exact(student):
    """With an older student's candidates the mean gradient is still exact."""
    s, t, b = situation(2, slope=1.0, lag=0.7)
    check_mean(student, s, t, b, 2, "with lag")


@worth(1)
def test_its_variance_is_below_that_of_plain_sampling(student):
    """Where the mass lies on a few ids, its variance is below 0.9 of that of 32 plain draws."""
    s, t, _ = situation(3, slope=2.0)
    check_variance(student, s, t, s, 3, PLAIN, 0.9, "without lag")
