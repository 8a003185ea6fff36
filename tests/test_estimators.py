"""Claims about the estimators of experiments/other_estimators.py, on a small vocabulary."""

import pytest
import torch

from channel import Rollout
from experiments import other_estimators, top_k
from experiments.other_estimators import OTHERS, inclusion, squared_error
from experiments.real_model import Response
from losses import make_loss
from support.config import builtin

UNBIASED = [name for name in OTHERS if "biased" not in name]


def response(lag: float, copies: int, vocab: int = 40, seed: int = 0) -> Response:
    """One position, `copies` times."""
    generator = torch.Generator().manual_seed(seed)
    z = 1.5 * torch.randn(vocab, generator=generator)
    t = z + torch.randn(vocab, generator=generator)
    b = z + lag * torch.randn(vocab, generator=generator)
    tables = [x.expand(copies, -1).contiguous() for x in (z, z, t, b)]
    return Response(Rollout([0]), tables[0], *(x.log_softmax(-1) for x in tables[1:]))


@pytest.mark.parametrize("lag", [0.0, 1.0])
@pytest.mark.parametrize("name", OTHERS)
def test_only_the_cut_ratios_are_biased(name, lag):
    """The mean gradient of 20,000 draws, in standard errors."""
    r = response(lag, copies=20_000)
    g = OTHERS[name](r, torch.Generator().manual_seed(1)).double()
    error = g.mean(0) - r.exact()[0].double()
    deviations = (error / (g.std(0) / len(g) ** 0.5)).abs().max()
    is_biased = name not in UNBIASED and lag > 0  # without lag all ratios are 1
    assert deviations > 6 if is_biased else deviations < 4.5


def test_inclusion_probabilities_add_up_and_follow_the_sampler():
    b = (3 * torch.randn(5, 60, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    pi = inclusion(b, 16)
    torch.testing.assert_close(pi.sum(-1), torch.full((5,), 16.0, dtype=torch.float64))
    assert (pi <= 1 + 1e-12).all() and (pi == 1).any()
    below = pi < 1
    ratio = pi / b.double().exp()
    for row, kept in zip(ratio, below):
        assert row[kept].max() / row[kept].min() < 1 + 1e-9


def test_the_best_proposal_and_the_best_constant_are_no_worse_than_the_default():
    r = response(0.3, copies=4000)
    errors = {
        name: squared_error([r], gradient, draws=1)
        for name, gradient in other_estimators.estimators().items()
        if "16 + 16" in name or "knows all" in name
    }
    default = errors.pop(other_estimators.DEFAULT)
    assert len(errors) == 2 and all(error < 1.02 * default for error in errors.values())


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_last_guess_of_the_study_is_that_of_the_loss(k):
    """c = p (D - m), so m can be read off the derivative."""
    r = response(0.0, copies=3)
    s, t = (x.double() for x in (r.s, r.t))
    ids = s.topk(k, dim=-1).indices
    top_s, top_t = (x.gather(1, ids) for x in (s, t))
    row = torch.cat([top_s[:, :1], top_s], 1).requires_grad_()
    teacher = torch.cat([top_t[:, :1], top_t], 1)
    loss = make_loss(builtin(loss="sparse_reverse_kl", top_k=k))
    (c,) = torch.autograd.grad(loss.value(row, teacher, row).sum(), row)
    m = (top_s - top_t) - c[:, 1:] / top_s.exp()
    *_, ours = top_k.guesses(top_s, top_t).values()
    torch.testing.assert_close(m, ours[:, None].expand_as(m))


def test_the_study_compares_guesses_with_the_mean_outside():
    """A teacher that is the student outside of the top K: the mean there is a constant."""
    r = response(0.0, copies=2, vocab=80)
    s = r.s.double()
    top = s.topk(8, dim=-1).indices
    t = (s + 0.7).scatter(1, top, s.gather(1, top) - 1.0)  # need not be normalised
    lines = top_k.lines_of(s, t, s, {"model": "m", "moment": 0, "lag": 0})
    found = {line["guess"]: line for line in lines if line["k"] == 8}
    zero = found["0 (score)"]
    assert zero["truth"] == pytest.approx(-0.7) and zero["bias"] == pytest.approx(0.7)
    outside = 1 - s.exp().gather(1, top).sum(-1)
    assert zero["outside"] == pytest.approx(float(outside.mean()))
    assert found["mean of the top (centred, renormalised)"]["rms"] == pytest.approx(1.7)
