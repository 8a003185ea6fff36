"""Hidden tests of exercise 11."""

import math

import torch

from claims import check, close, worth
from test_11_estimator import candidates, check_mean, check_variance, columns_of, situation


def plain_variance(s, t, b):
    """Variance of the score-function gradient of 32 draws, summed over the logits."""
    score = torch.eye(len(s), dtype=torch.float64) - s.exp()
    of_draw = ((s - b).exp() * (s - t))[:, None] * score
    probs = b.exp()[:, None]
    return float((probs * of_draw**2).sum() - ((probs * of_draw).sum(0) ** 2).sum()) / 32


@worth(1)
def test_the_mean_gradient_is_exact_elsewhere(student):
    """The mean gradient is exact at flat distributions, peaked ones and larger lags, too."""
    for seed, slope, lag in ((4, 0.0, 1.3), (5, 1.5, 0.0), (6, 1.5, 1.0)):
        s, t, b = situation(seed, slope, lag)
        check_mean(student, s, t, b, seed, f"at slope {slope} and lag {lag}")


@worth(1)
def test_positions_do_not_mix(student):
    """Each position has a value of its own, as if it were alone."""
    counts = columns_of(student)
    rows = []
    for seed in range(9):
        s, t, b = situation(seed, slope=1.0, lag=0.7)
        ids, behavior = candidates(counts, b, 1, seed)
        rows.append(torch.stack([s[ids], t[ids], behavior]))
    tables = torch.cat(rows, 1)
    value, c = student.estimator_gradient(*tables)
    check(bool(c.any()), "the derivative is 0 everywhere")
    alone, c_alone = student.estimator_gradient(*tables[:, 3:4])
    close(alone, value[3:4], "the value of a position that is alone")
    close(c_alone, c[3:4], "the derivative of a position that is alone")


@worth(1)
def test_its_variance_is_below_half(student):
    """Its variance is below half of that of 32 plain draws, without lag and with it."""
    for seed, slope, lag in ((8, 1.5, 0.0), (9, 1.5, 0.7), (10, 2.0, 0.7)):
        s, t, b = situation(seed, slope, lag)
        where = f"at slope {slope} and lag {lag}"
        check_variance(student, s, t, b, seed, plain_variance(s, t, b), 0.5, where)


@worth(1)
def test_it_is_finite_at_the_edges(student):
    """In float32 the derivative is finite where ratios are e^40 or e^-60, where all draws agree,
    where student and teacher agree, and where the top has all of the mass."""
    draws, top, tail = columns_of(student)
    column = torch.arange(draws + top + tail)
    is_top = (column >= draws) & (column < draws + top)
    half = math.log(0.5 / max(1, top))  # log-probability where the top shares half of the mass

    def table(of_top, of_others):
        return torch.where(is_top, float(of_top), float(of_others))[None]

    teacher = table(-2.0, -9.0)
    cases = {
        "where ratios are e^40": (table(half, -5.0), teacher, table(half - 40.0, -45.0)),
        "where ratios are e^-60": (table(half - 60.0, -65.0), teacher, table(half, -5.0)),
        "where s and b are below -100": (table(half, -130.0), teacher, table(half, -140.0)),
        "where student and teacher agree": (table(half, -5.0),) * 3,
        "where the top has all of the mass": (
            table(half + math.log(2), -40.0),
            teacher,
            table(half + math.log(2), -3.0),
        ),
    }
    for where, tables in cases.items():
        value, c = student.estimator_gradient(*tables)
        is_finite = value.isfinite().all() and c.isfinite().all()
        check(bool(is_finite), f"{where} the value or the derivative is not a finite number")
        is_found = bool(c.any()) or "ratios are e^40" not in where
        check(is_found, f"{where} the derivative is 0 everywhere")
