"""Claims about what only studies compare with: experiments/corrections.py."""

import pytest
import torch
from conftest import CORRECTED, LOSS_CONFIGS, corrected, label
from test_losses import exact_reverse_kl_gradient, expected_gradient, policies

from experiments.corrections import (
    CORRECTIONS,
    M2_BUDGET,
    SIGNALS,
    importance_weight,
    moves_away,
    second_moment_bound,
)
from losses import make_loss


@pytest.mark.parametrize("name", sorted({*CORRECTED} - {"sampled_current_is"}))
def test_every_variant_but_one_is_biased_under_lag_and_unbiased_without(name):
    bound = 0.01 if "m2po" in name else float("inf")
    student, t, b = policies(1, lag=1.0)
    exact = exact_reverse_kl_gradient(student, t)
    stale = expected_gradient(student, t, b, name, m2_bound=bound)
    assert (stale - exact).norm() > 0.05 * exact.norm()
    fresh = expected_gradient(student, t, student.log_softmax(-1), name, m2_bound=bound)
    torch.testing.assert_close(fresh, exact, rtol=1e-9, atol=1e-11)


def test_a_name_says_signal_and_correction():
    for signal in SIGNALS:
        for correction in CORRECTIONS:
            loss = make_loss(corrected(f"sampled_{signal}_{correction}"))
            assert (loss.signal, loss.correction) == (signal, correction)


def test_the_signal_decides_with_whom_the_teacher_is_compared():
    s, t, b = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -3.0]]), torch.tensor([[-1.5, -2]])
    for signal, other in (("current", s), ("rollout", b)):
        loss = make_loss(corrected(f"sampled_{signal}_none", num_samples=2))
        torch.testing.assert_close(loss.value(s, t, b), (-(t - other) * s).mean(-1))


@pytest.mark.parametrize("correction, expected", [
    ("none", [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("is", [1.3, 1.3, 0.7, 0.7, 5.1, 0.1]),
    ("ppo", [0.0, 1.3, 0.7, 0.0, 0.0, 0.1]),  # 0 only where the clipped surrogate is flat
    ("decoupled", [1.3, 1.3, 0.7, 0.7, 0.0, 0.1]),
    ("tis", [1.3, 1.3, 0.7, 0.7, 2.0, 0.1]),
    ("icepop", [1.3, 1.3, 0.7, 0.7, 0.0, 0.0]),
    # Of those that move away from the sampler, the squares above the bound.
    ("m2po", [1.3, 1.3, 0.7, 0.7, 0.0, 0.1]),
    ("m2po_areal", [1.3, 1.3, 0.7, 0.7, 0.0, 0.0]),
])  # fmt: skip
def test_what_a_correction_makes_of_a_ratio(correction, expected):
    ratio = torch.tensor([[1.3, 1.3, 0.7, 0.7, 5.1, 0.1]])
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    weight = importance_weight(ratio.log(), advantage, correction, bound=1.0)
    torch.testing.assert_close(weight, torch.tensor([expected]))


def test_m2po_bounds_the_largest_square_at_which_the_capped_mean_is_within_the_budget():
    """By hand: squares .01, .04, .09, 1; capped at .09 their mean is .0575, at .04 it is .0325."""
    squares = torch.tensor([1.0, 0.01, 0.09, 0.04])
    assert second_moment_bound(squares, is_capped=True) == pytest.approx(0.04)
    # .025; with .09 it is .0467.
    assert second_moment_bound(squares, is_capped=False) == pytest.approx(0.04)
    assert second_moment_bound(squares, is_capped=True, budget=0.06) == pytest.approx(0.09)
    for is_capped in (True, False):
        # As rounding leaves it without lag.
        assert second_moment_bound(torch.full((3,), 1e-8), is_capped) == float("inf")
        assert second_moment_bound(torch.full((3,), 1.0), is_capped) == -1.0
        assert second_moment_bound(torch.zeros(0), is_capped) == float("inf")
        squares = (
            (torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 0.5).square().double()
        )
        bound = second_moment_bound(squares, is_capped)
        kept = squares.flatten().sort().values
        above = kept[kept > bound][0]

        def mean(v):
            within = squares.clamp(max=v) if is_capped else squares[squares <= v]  # noqa: B023
            return within.mean()

        assert mean(bound) <= M2_BUDGET < mean(above)


@pytest.mark.parametrize("config", [c for c in LOSS_CONFIGS if "m2po" not in c.loss], ids=label)
def test_no_other_loss_asks_for_the_whole_update(config):
    make_loss(config).look_ahead(None, None)  # it looks at nothing


@pytest.mark.parametrize("config", [c for c in LOSS_CONFIGS if "m2po" in c.loss], ids=label)
def test_m2po_drops_by_the_bound_that_it_finds_in_the_samples_of_all_ranks(config):
    loss = make_loss(config)
    is_capped = loss.correction == "m2po"
    ratios = torch.tensor([0.01, -0.1, 0.25, -1.5, 1.5])[:, None].expand(-1, loss.num_columns)
    s = torch.full((5, loss.num_columns), -2.0)
    t, b = s - 1, s - ratios
    squares = loss.squares(s, t, b)
    away = moves_away(ratios, loss.advantage(s, t, b))
    watched = away if is_capped else torch.ones_like(away)
    torch.testing.assert_close(squares.flatten().float(), ratios.square()[watched].flatten())
    tables = [(s, None, t, b)]
    others = torch.full((100,), 1e-6)
    loss.look_ahead(tables, lambda value: [value, others])
    together = torch.cat([squares.flatten(), others])
    assert loss.m2_bound == second_moment_bound(together, is_capped)
    loss.look_ahead(tables, lambda value: [value])
    assert loss.m2_bound == second_moment_bound(squares, is_capped)
    assert torch.equal(
        loss.value(s, t, b) == 0, ((ratios.square() > loss.m2_bound) & watched).all(-1)
    )
