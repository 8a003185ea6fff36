"""Claims about the losses: against float64, and exact expectations over a small vocabulary."""

import itertools

import pytest
import torch
from conftest import LOSS_CONFIGS, corrected, label

import losses
from losses import LOSSES, Greedy, Proposal, make_loss
from support.config import builtin

V = 8


def loss_of(loss, m2_bound=float("inf"), **options):
    loss = make_loss(corrected(loss, **options))
    loss.m2_bound = m2_bound
    return loss


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


def expected_gradient(student, t, b, loss="sampled_reverse_kl", **options):
    """Exact mean over the sampler's N=1 draws of a sampled loss's gradient."""
    loss = loss_of(loss, num_samples=1, **options)
    total = torch.zeros_like(student)
    for i in range(len(student)):
        pick = lambda x: x[i].view(1, 1)  # noqa: E731, B023
        value = lambda s: loss.value(pick(s), pick(t), pick(b))  # noqa: E731, B023
        total += b[i].exp() * gradient(value, student)
    return total


def outcomes(loss, b):
    """All that a position may draw, as (ids [C], behaviour [C], probability); the top is b's.

    Without a tail all draws vary. With one they are those of the tail, and column 0 an id of it.
    """
    top = b.topk(loss.top.stop - loss.top.start).indices
    count = loss.tail.stop - loss.tail.start
    if count == 0:
        for drawn in itertools.product(range(len(b)), repeat=loss.draws.stop):
            ids = torch.cat([torch.tensor(drawn), top])
            yield ids, b[ids], b[list(drawn)].sum().exp()
        return
    rest = torch.tensor([i for i in range(len(b)) if i not in top])
    logp = b[rest].log_softmax(-1)
    for drawn in itertools.product(range(len(rest)), repeat=count):
        drawn = list(drawn)
        ids = torch.cat([rest[:1], top, rest[drawn]])
        yield ids, torch.cat([b[ids[:-count]], logp[drawn]]), logp[drawn].sum().exp()


def gradients_of_outcomes(loss, student, t, b):
    """(probability, gradient) of all that a position may draw."""
    for ids, behavior, p in outcomes(loss, b):
        rows = (t[ids][None], behavior[None])
        yield p, gradient(lambda s: loss.value(s[ids][None], *rows), student)  # noqa: B023


def mean_and_variance(loss, student, t, b):
    found = list(gradients_of_outcomes(loss, student, t, b))
    mean = sum(p * g for p, g in found)
    return mean, sum(p * (g - mean).square().sum() for p, g in found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss", ["sampled_reverse_kl", "sampled_current_is"])
def test_current_signal_with_importance_weights_has_zero_bias_at_any_lag(loss, seed):
    for lag in (0.0, 0.3, 2.0):
        student, t, b = policies(seed, lag)
        mean, exact = expected_gradient(student, t, b, loss), exact_reverse_kl_gradient(student, t)
        torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-11)


ESTIMATORS = [
    dict(loss="sampled_reverse_kl", num_samples=1),
    dict(loss="sampled_reverse_kl", num_samples=3),
    *[
        dict(loss="stratified_reverse_kl", top_k=k, num_samples=n)
        for k, n in ((1, 1), (3, 1), (6, 1), (3, 2), (4, 3))
    ],
    dict(loss="sampled_current_is", num_samples=2),
    dict(loss="plain_stratified", top_k=3, num_samples=2),
    dict(loss="top_k_and_emitted", top_k=3),
    dict(loss="top_k_baseline", top_k=3, num_samples=2),
]


@pytest.mark.parametrize("baseline_from", [2, 8])
@pytest.mark.parametrize(
    "options", ESTIMATORS, ids=lambda options: " ".join(map(str, options.values()))
)
def test_an_estimator_with_importance_weights_is_exactly_unbiased_at_any_lag(
    options, baseline_from, monkeypatch
):
    """Its mean over all draws of a small vocabulary; also a baseline of two draws adds no bias."""
    monkeypatch.setattr(losses, "BASELINE_DRAWS", baseline_from)
    for lag in (0.0, 2.0):
        student, t, b = policies(2, lag, vocab=7)
        mean, _ = mean_and_variance(loss_of(**options), student, t, b)
        torch.testing.assert_close(
            mean, exact_reverse_kl_gradient(student, t), rtol=1e-9, atol=1e-11
        )


def variances(kinds, seed, vocab, lag, count, top_k, trials=2000):
    """Variance of the gradient of each kind, from the same `trials` rollouts of one position."""
    student, t, b = policies(seed, lag, vocab)
    found = []
    for kind in kinds:
        loss = loss_of(kind, num_samples=count, top_k=top_k)
        uniforms = torch.rand(
            trials,
            loss.num_uniforms,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(0),
        )
        ids, behavior = loss.propose(b.repeat(trials, 1), uniforms)
        logits = student.repeat(trials, 1).requires_grad_()
        loss.value(logits.log_softmax(-1).gather(1, ids), t[ids], behavior).sum().backward()
        found.append(float(logits.grad.var(0).sum()))
    return found


@pytest.mark.parametrize(
    "kind, plain",
    [("sampled_reverse_kl", "sampled_current_is"), ("stratified_reverse_kl", "plain_stratified")],
)
def test_the_baseline_of_many_draws_makes_the_variance_smaller_and_few_draws_have_none(kind, plain):
    ratios = []
    for seed in range(5):
        with_baseline, without = variances(
            (kind, plain), seed, vocab=100, lag=0.3, count=16, top_k=16
        )
        ratios.append(with_baseline / without)
    assert sum(ratios) / len(ratios) < 0.95 and max(ratios) < 1.1
    s, t, b = (torch.randn(5, 12, dtype=torch.float64) for _ in range(3))
    for count in (1, 7):
        ours, without = (loss_of(name, top_k=4, num_samples=count) for name in (kind, plain))
        columns = ours.num_columns
        assert torch.equal(
            *(
                loss.value(s[:, :columns], t[:, :columns], b[:, :columns])
                for loss in (ours, without)
            )
        )


def test_a_baseline_is_the_mean_of_the_other_draws():
    x = torch.randn(3, 8, dtype=torch.float64)
    others = (x.sum(-1, keepdim=True) - x) / 7
    torch.testing.assert_close(losses.less_others(x), x - others)
    assert torch.equal(losses.less_others(x[:, :7]), x[:, :7])


def at_top(loss, student, t, b):
    """Gradient of a loss of the sampler's top K alone, with an emitted token that is none of them,
    and the top K.
    """
    order = b.argsort(descending=True)
    K = loss.top.stop - loss.top.start
    ids = order[[K, *range(K)]]
    row = (t[ids][None], b[ids][None])
    return gradient(lambda s: loss.value(s[ids][None], *row), student), order[:K]


def guess_of_the_edge(s, t, top):
    """m of SparseReverseKL, from its definition: the larger one of two guesses."""
    edge = top[len(top) // 4 :]
    p, q = s.exp(), t.exp()
    weights = p[edge] / p[edge].sum()
    mean = (weights * (s - t)[edge]).sum()
    inside = mean - (p[edge].sum() / q[edge].sum()).log()
    return torch.maximum(mean, inside + ((1 - p[top].sum()) / (1 - q[top].sum())).log())


@pytest.mark.parametrize("top_k", [1, 3, 4, 11])
@pytest.mark.parametrize("lag", [0.0, 0.7])
def test_the_error_of_sparse_reverse_kl_is_that_of_its_guess_and_the_shape_of_the_rest(top_k, lag):
    """The closed form of docs/topk.md, at the logits of the top K and at the others."""
    student, t, b = policies(3, lag, vocab=16)
    ours, top = at_top(loss_of("sparse_reverse_kl", top_k=top_k), student, t, b)
    s = student.log_softmax(-1)
    p, d = s.exp(), s - t
    out = torch.ones(16, dtype=torch.bool)
    out[top] = False
    mass = p[top].sum()
    mean_rest = (p * d)[out].sum() / p[out].sum()
    miss = guess_of_the_edge(s, t, top) - mean_rest
    expected = torch.where(out, p * (mean_rest - d + mass * miss), -p * (1 - mass) * miss)
    error = ours - exact_reverse_kl_gradient(student, t)
    torch.testing.assert_close(error, expected, rtol=1e-6, atol=1e-9)
    assert error.norm() > 0.01 * ours.norm()  # it is biased


def test_sparse_reverse_kl_is_exact_at_the_top_if_the_rest_is_like_its_edge():
    """Each of 3 ids of the edge has a twin outside; the first of 4 is another."""
    student = torch.tensor([2.0, 1.0, 0.8, 0.5, 1.0, 0.8, 0.5], dtype=torch.float64)
    teacher = torch.tensor([-1.0, 0.3, -0.9, 1.1, 0.3, -0.9, 1.1], dtype=torch.float64)
    t, b = teacher.log_softmax(-1), student.log_softmax(-1)
    loss = loss_of("sparse_reverse_kl", top_k=4)
    ids = torch.tensor([4, 0, 1, 2, 3])
    row = (t[ids][None], b[ids][None])
    ours = gradient(lambda s: loss.value(s[ids][None], *row), student)
    exact = exact_reverse_kl_gradient(student, t)
    torch.testing.assert_close(ours[:4], exact[:4], rtol=1e-6, atol=1e-9)
    assert (ours[4:] - exact[4:]).norm() > 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_reverse_kl_over_all_ids_is_exact(dtype):
    """Nothing is left to guess: rounding decides what the rest is, and it may not matter."""
    for seed in range(5):
        student, t, b = (x.to(dtype) for x in policies(seed, lag=0.0, vocab=12))
        loss = loss_of("sparse_reverse_kl", top_k=12)
        ids = torch.cat([b.argmin()[None], b.argsort(descending=True)])
        row = (t[ids][None], b[ids][None])
        ours = gradient(lambda s: loss.value(s[ids][None], *row), student)  # noqa: B023
        torch.testing.assert_close(
            ours, exact_reverse_kl_gradient(student, t), rtol=1e-4, atol=1e-5
        )


# Form of docs/topk.md -> its m, and what its c are divided by; of p, D, q at the top K.
GUESSES = {
    "truncated_reverse_kl": lambda p, d, q: (-1.0, 1.0),
    "score_top_k": lambda p, d, q: (0.0, 1.0),
    "centred_top_k": lambda p, d, q: ((p * d).sum() / p.sum(), 1.0),
    "renormalised_top_k": lambda p, d, q: ((p * d).sum() / p.sum(), p.sum()),
    "bucket_top_k": lambda p, d, q: (((1 - p.sum()) / (1 - q.sum())).log(), 1.0),
}


@pytest.mark.parametrize("loss", GUESSES)
def test_every_form_of_a_top_k_is_a_guess_of_the_mean_outside(loss):
    student, t, b = policies(3, vocab=12)
    ours, top = at_top(loss_of(loss, top_k=5), student, t, b)
    s = student.log_softmax(-1)
    p, d, q = s.exp()[top], (s - t)[top], t.exp()[top]
    m, divisor = GUESSES[loss](p, d, q)
    c = torch.zeros_like(s).scatter(0, top, p * (d - m) / divisor)
    torch.testing.assert_close(ours, c - s.exp() * c.sum())


def test_the_values_of_forms_that_are_divergences():
    """Of 5 ids and a bucket, and of 5 ids renormalised."""
    student, t, b = policies(4, vocab=12)
    s, top = student.log_softmax(-1), b.topk(5).indices
    p, q = s.exp()[top], t.exp()[top]
    ids = torch.cat([top[:1], top])
    row = (s[ids][None], t[ids][None], b[ids][None])
    with_rest = [torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (p, q)]
    alone = [x / x.sum() for x in (p, q)]
    for loss, (x, y) in (("bucket_top_k", with_rest), ("renormalised_top_k", alone)):
        torch.testing.assert_close(loss_of(loss, top_k=5).value(*row)[0], (x * (x / y).log()).sum())
    t_top = t.topk(5).indices
    p, q = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (s.exp()[t_top], t.exp()[t_top]))
    ids = torch.cat([t_top[:1], t_top])
    value = loss_of("bucket_forward_kl", top_k=5).value(*(x[ids][None] for x in (s, t, b)))
    torch.testing.assert_close(value[0], (q * (q / p).log()).sum())


@pytest.mark.parametrize("loss", ["bucket_forward_kl", "forward_kl"])
def test_only_the_bucket_gives_forward_kl_its_minimum_at_the_teacher(loss):
    t = policies(4, vocab=12)[1]
    top = t.topk(5).indices
    ids = torch.cat([top[:1], top])
    row = (t[ids][None], t[ids][None])
    at_teacher = gradient(lambda s: loss_of(loss, top_k=5).value(s[ids][None], *row), t)
    assert (at_teacher.norm() < 1e-12) == (loss == "bucket_forward_kl")


def test_forward_kl_gradient_is_softmax_times_support_mass_minus_teacher():
    student, t, _ = policies(4)
    order = t.argsort(descending=True)
    top, ids = order[:4], order[[6, 0, 1, 2, 3]]
    expected = student.softmax(-1) * t[top].exp().sum()
    expected[top] -= t[top].exp()
    loss = loss_of("forward_kl", top_k=4)
    ours = gradient(lambda s: loss.value(s[ids][None], t[ids][None], t[ids][None]), student)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_teacher_equal_to_student_gives_zero_loss_signal(config):
    """Forward KL's gradient vanishes once the support is everything."""
    student, _, _ = policies(5)
    loss = make_loss(config)
    loss.m2_bound = 1.0
    ids = torch.arange(loss.num_columns)[None] % V
    s = student.log_softmax(-1)[None].gather(1, ids).requires_grad_()
    same = s.detach().clone()
    value = loss.value(s, same, same)
    assert value.abs().max() < 1e-12
    assert loss.reverse_kl(s, same, same).abs().max() < 1e-12
    if config.loss != "forward_kl":
        value.sum().backward()
        assert s.grad.abs().max() < 1e-12


def test_a_truncated_forward_kl_may_be_negative_and_still_teaches():
    s, t = torch.tensor([[-3.0, -0.5]], requires_grad=True), torch.tensor([[-1.0, -2.0]])
    value = loss_of("forward_kl", top_k=1).value(s, t, t)
    value.sum().backward()
    assert value < 0 and s.grad[0, 1] == -t[0, 1].exp() and s.grad[0, 0] == 0


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_losses_are_finite_with_finite_gradients_for_very_unlikely_candidates(config):
    loss = make_loss(config)
    loss.m2_bound = 1.0
    s = torch.full((2, loss.num_columns), -80.0, requires_grad=True)
    value = loss.value(s, torch.full_like(s, -90.0), torch.full_like(s, -85.0))
    value.sum().backward()
    assert value.isfinite().all() and s.grad.isfinite().all()


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_the_columns_of_a_loss_are_what_its_formula_reads(config):
    """A column outside of them has no gradient, and every column within has one."""
    loss, N, K = make_loss(config), config.num_samples, config.top_k
    wanted = {
        "forward_kl": (1, K, 0),
        "sparse_reverse_kl": (1, K, 0),
        "stratified_reverse_kl": (1, K, N),
    }.get(config.loss, (N, 0, 0))
    stops = list(itertools.accumulate(wanted))
    assert (loss.draws, loss.top, loss.tail) == tuple(map(slice, [0, *stops[:2]], stops))
    teachers = K if config.loss == "forward_kl" else 0
    assert (loss.num_columns, loss.teacher_top) == (sum(wanted), teachers)
    assert (loss.num_proposed, loss.num_uniforms) == (sum(wanted) - teachers, wanted[0] + wanted[2])
    assert config.num_candidates == loss.num_columns
    loss.m2_bound = 1.0
    s = (-2.0 - 0.01 * torch.arange(loss.num_columns)[None]).requires_grad_()
    loss.value(s, torch.full_like(s, -3.0), torch.full_like(s, -1.9)).sum().backward()
    read = [column for part in (loss.top, loss.tail) for column in range(part.start, part.stop)]
    read = read or list(range(loss.draws.stop))
    assert s.grad[0].nonzero().flatten().tolist() == read


# The others are the studies'.
SHIPPED = ("forward_kl", "sparse_reverse_kl", "sampled_reverse_kl", "stratified_reverse_kl")


def test_the_names_of_the_losses_are_those_of_their_classes():
    for name in SHIPPED:
        assert type(make_loss(builtin(loss=name))) is LOSSES[name]
        assert LOSSES[name].__name__.lower() == name.replace("_", "")


def test_no_shipped_loss_has_the_value_of_another_by_accident():
    kinds = [LOSSES[name] for name in SHIPPED]
    for kind in kinds:
        assert all(other is kind or kind.value is not other.value for other in kinds)
        assert not any(issubclass(kind, other) for other in kinds if other is not kind)


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_every_loss_passes_its_own_check(config):
    make_loss(config).check()


def test_a_config_may_be_made_where_gradients_are_off():
    """The check of its loss needs one."""
    with torch.no_grad():
        assert builtin(loss="forward_kl", top_k=3).num_candidates == 4


def test_a_proposal_without_settings_is_the_emitted_token_alone():
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(5, 1, dtype=torch.float64)
    proposal = Proposal()
    assert proposal.num_columns == proposal.num_uniforms == 1
    ids, logp = proposal.propose(logits.clone(), uniforms)
    assert ids.shape == (5, 1)
    torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, ids))
    ids, _ = Greedy().propose(logits, uniforms[:, :0])
    assert torch.equal(ids[:, 0], logits.argmax(-1))


@pytest.mark.parametrize(
    "config",
    [
        builtin(loss="forward_kl", top_k=2),
        builtin(loss="sparse_reverse_kl", top_k=3),
        builtin(loss="sampled_reverse_kl", num_samples=2),
        corrected("sampled_rollout_ppo", num_samples=1),
        builtin(loss="stratified_reverse_kl", top_k=3, num_samples=1),
    ],
    ids=label,
)
def test_reverse_kl_estimate_is_unbiased_for_every_loss(config):
    student, t, b = policies(6, lag=0.5)
    s = student.log_softmax(-1)
    loss, mean = make_loss(config), 0.0
    for ids, behavior, p in outcomes(loss, b):
        mean += p * loss.reverse_kl(s[ids][None], t[ids][None], behavior[None])[0]
    torch.testing.assert_close(mean, (s.exp() * (s - t)).sum())
