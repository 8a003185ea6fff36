"""Claims about the losses, against float64 and against exact expectations over a small vocabulary."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import LOSS_CONFIGS, label

from generate import draws_per_position, propose
from kernels.head import fused_loss
from losses import (
    CORRECTIONS, M2_BUDGET, candidate_columns, forward_kl, importance_weight, make_loss, reverse_kl_estimate,
    sampled_reverse_kl, second_moment_threshold, sparse_reverse_kl, stratified_reverse_kl,
)  # fmt: skip

V = 8


def policies(seed=0, lag=0.7, vocab=V):
    """Logits of student, teacher and a stale sampler, float64 [V]."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(vocab, dtype=torch.float64, generator=generator) * 1.5
    teacher = student + torch.randn(vocab, dtype=torch.float64, generator=generator)
    sampler = student + lag * torch.randn(vocab, dtype=torch.float64, generator=generator)
    return student, teacher.log_softmax(-1), sampler.log_softmax(-1)


def exact_reverse_kl_gradient(student, t):
    z = student.clone().requires_grad_()
    s = z.log_softmax(-1)
    (s.exp() * (s - t)).sum().backward()
    return z.grad


def gradient(loss_of_logp, student):
    z = student.clone().requires_grad_()
    loss_of_logp(z.log_softmax(-1)).sum().backward()
    return z.grad


def expected_gradient(student, t, b, **options):
    """Exact mean over the sampler's N=1 draws of the sampled loss's gradient."""
    total = torch.zeros_like(student)
    for i in range(len(student)):
        one = torch.tensor([[i]])
        pick = lambda x: x.expand(1, -1).gather(1, one)  # noqa: E731, B023
        total += b[i].exp() * gradient(lambda s: sampled_reverse_kl(pick(s[None]), pick(t[None]), pick(b[None]), **options), student)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_current_signal_with_importance_weights_has_zero_bias_at_any_lag(seed):
    for lag in (0.0, 0.3, 2.0):
        student, t, b = policies(seed, lag)
        torch.testing.assert_close(expected_gradient(student, t, b), exact_reverse_kl_gradient(student, t), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("signal, correction", set(itertools.product(("current", "rollout"), CORRECTIONS)) - {("current", "is")})
def test_every_other_variant_is_biased_under_lag_and_unbiased_without(signal, correction):
    threshold = second_moment_threshold(torch.tensor([0.5, 0.1])) if correction == "m2po" else None
    options = dict(signal=signal, correction=correction, m2_threshold=threshold)
    student, t, b = policies(1, lag=1.0)
    exact = exact_reverse_kl_gradient(student, t)
    assert (expected_gradient(student, t, b, **options) - exact).norm() > 0.05 * exact.norm()
    fresh = student.log_softmax(-1)
    torch.testing.assert_close(expected_gradient(student, t, fresh, **options), exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_stratified_is_unbiased_at_any_lag(top_k):
    for lag in (0.0, 2.0):
        student, t, b = policies(2, lag)
        top = b.topk(top_k).indices
        rest = torch.tensor([i for i in range(V) if i not in top])
        tail_b = b[rest].log_softmax(-1)
        total = torch.zeros_like(student)
        for i, logp in zip(rest, tail_b):
            one = lambda x: x[i].view(1, 1)  # noqa: E731, B023
            loss = lambda s: stratified_reverse_kl(s[top][None], t[top][None], one(s), one(t), logp.view(1, 1))  # noqa: E731, B023
            total += logp.exp() * gradient(loss, student)
        torch.testing.assert_close(total, exact_reverse_kl_gradient(student, t), rtol=1e-9, atol=1e-11)


def test_sparse_reverse_kl_is_biased_even_without_lag():
    student, t, b = policies(3, lag=0.0)
    top = b.topk(3).indices
    exact = exact_reverse_kl_gradient(student, t)
    assert (gradient(lambda s: sparse_reverse_kl(s[top], t[top]), student) - exact).norm() > 0.05 * exact.norm()


def test_forward_kl_gradient_is_softmax_times_support_mass_minus_teacher():
    student, t, _ = policies(4)
    top = t.topk(4).indices
    expected = student.softmax(-1) * t[top].exp().sum()
    expected[top] -= t[top].exp()
    torch.testing.assert_close(gradient(lambda s: forward_kl(s[top], t[top]), student), expected)


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_teacher_equal_to_student_gives_zero_loss_signal(config):
    """Zero value; for forward KL the gradient vanishes once the support is everything, for sparse only the +1 is left."""
    student, _, _ = policies(5)
    columns = config.columns["total"].stop
    ids = torch.arange(columns)[None] % V
    s = student.log_softmax(-1)[None].gather(1, ids).requires_grad_()
    same = s.detach().clone()
    loss = make_loss(config, m2_threshold=1.0)(s, same, same)
    assert loss.abs().max() < 1e-12
    assert reverse_kl_estimate(config.loss, config.columns, s, same, same).abs().max() < 1e-12
    if config.loss in ("sampled_reverse_kl", "stratified_reverse_kl"):
        loss.sum().backward()
        assert s.grad.abs().max() < 1e-12


def test_a_truncated_forward_kl_may_be_negative_and_still_teaches():
    s, t = torch.tensor([[-0.5]], requires_grad=True), torch.tensor([[-2.0]])
    loss = forward_kl(s, t)
    loss.sum().backward()
    assert loss < 0 and s.grad == -t.exp()


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_losses_are_finite_with_finite_gradients_for_very_unlikely_candidates(config):
    columns = config.columns["total"].stop
    s = torch.full((2, columns), -80.0, requires_grad=True)
    loss = make_loss(config, m2_threshold=1.0)(s, torch.full_like(s, -90.0), torch.full_like(s, -85.0))
    loss.sum().backward()
    assert loss.isfinite().all() and s.grad.isfinite().all()


def test_ppo_drops_samples_only_where_the_clipped_surrogate_is_flat():
    ratio = torch.tensor([[1.3, 1.3, 0.7, 0.7, 1.1]])
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    b = torch.zeros(1, 5)
    weight = importance_weight(ratio.log() + b, b, advantage, "ppo")
    torch.testing.assert_close(weight, torch.tensor([[0.0, 1.3, 0.7, 0.0, 1.1]]))


def test_decoupled_drops_behaviour_weights_above_its_cap():
    ratio = torch.tensor([[4.9, 5.1, 0.01]])
    weight = importance_weight(ratio.log(), torch.zeros(1, 3), torch.ones(1, 3), "decoupled")
    torch.testing.assert_close(weight, torch.tensor([[4.9, 0.0, 0.01]]))


def test_m2po_keeps_the_most_samples_whose_mean_square_stays_in_the_budget():
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(50, 4, generator=generator) * 0.5
    threshold = second_moment_threshold(log_ratio)
    squares = log_ratio.double().square().flatten().sort().values
    kept = squares[squares <= threshold]
    assert kept.mean() <= M2_BUDGET < squares[: len(kept) + 1].mean()
    assert second_moment_threshold(torch.full((3,), 1.0)) == -1.0
    weight = importance_weight(torch.full((1, 3), 1.0), torch.zeros(1, 3), torch.ones(1, 3), "m2po", -1.0)
    assert (weight == 0).all()


def test_m2po_drops_nothing_where_all_is_within_the_budget():
    assert second_moment_threshold(torch.full((3,), 1e-8)) == float("inf")  # as rounding leaves it without lag
    log_ratio = torch.tensor([[1e-8, 3e-8]])
    assert (importance_weight(log_ratio, torch.zeros(1, 2), torch.ones(1, 2), "m2po", second_moment_threshold(log_ratio[:, :1])) > 0).all()


def test_a_loss_of_ones_own_gets_the_samplers_top_k_and_no_other_loss_by_accident():
    config = SimpleNamespace(loss="no_loss_yet", top_k=3, num_samples=4, columns=candidate_columns("no_loss_yet", 3, 4))
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    ids, logp = propose(logits, torch.rand(5, draws_per_position("no_loss_yet", 4)), "no_loss_yet", 3)
    assert ids.shape[1] == config.columns["total"].stop == 4
    assert torch.equal(ids[:, config.columns["top"]], logits.topk(3).indices)
    torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, ids))
    assert fused_loss(config) is None
    with pytest.raises(ValueError, match="does not know the loss 'no_loss_yet'"):
        make_loss(config)(logp, logp, logp)


def test_reverse_kl_estimate_is_unbiased_for_every_loss():
    student, t, b = policies(6, lag=0.5)
    s, exact = student.log_softmax(-1), None
    exact = (s.exp() * (s - t)).sum()
    top = b.topk(3).indices
    rest = torch.tensor([i for i in range(V) if i not in top])
    tail_b = b[rest].log_softmax(-1)
    total = 0.0
    columns = candidate_columns("stratified_reverse_kl", 3, 1)
    for i, logp in zip(rest, tail_b):
        ids = torch.cat([top[:1], top, i[None]])[None]
        behavior = torch.cat([b[ids[0, :4]], logp[None]])[None]
        total += logp.exp() * reverse_kl_estimate("stratified_reverse_kl", columns, s[ids], t[ids], behavior)[0]
    torch.testing.assert_close(total, exact)
    drawn = SimpleNamespace(columns=candidate_columns("forward_kl", 2, 1))
    mean = sum(
        b[i].exp() * reverse_kl_estimate("forward_kl", drawn.columns, *(x[[i, 0, 1]][None] for x in (s, t, b)))[0] for i in range(V)
    )
    torch.testing.assert_close(mean, exact)


def test_an_unknown_correction_is_refused():
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="unknown correction 'clip'"):
        importance_weight(one, one, one, "clip")
    with pytest.raises(ValueError, match="m2_threshold"):
        importance_weight(one, one, one, "m2po")
