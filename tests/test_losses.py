"""Claims about the losses, against float64 and against exact expectations over a small
vocabulary."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import LOSS_CONFIGS, ROOT, label

import losses
from support.config import Config, InputError
from support.data import Prompt
from experiments.baselines import M2_BUDGET, importance_weight, moves_away, second_moment_bound
from losses import CORRECTIONS, LOSSES, Greedy, Loss, Proposal, make_loss
from serial import Serial

V = 8


def loss_of(loss, m2_bound=float("inf"), **options):
    loss = make_loss(Config(loss=loss, **options))
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


def expected_gradient(student, t, b, **options):
    """Exact mean over the sampler's N=1 draws of the sampled loss's gradient."""
    loss = loss_of("sampled_reverse_kl", num_samples=1, **options)
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
def test_current_signal_with_importance_weights_has_zero_bias_at_any_lag(seed):
    for lag in (0.0, 0.3, 2.0):
        student, t, b = policies(seed, lag)
        torch.testing.assert_close(
            expected_gradient(student, t, b),
            exact_reverse_kl_gradient(student, t),
            rtol=1e-9,
            atol=1e-11,
        )


VARIANTS = sorted(set(itertools.product(("current", "rollout"), CORRECTIONS)) - {("current", "is")})


@pytest.mark.parametrize("signal, correction", VARIANTS)
def test_every_other_variant_is_biased_under_lag_and_unbiased_without(signal, correction):
    bound = 0.01 if correction.startswith("m2po") else float("inf")
    options = dict(signal=signal, correction=correction, m2_bound=bound)
    student, t, b = policies(1, lag=1.0)
    exact = exact_reverse_kl_gradient(student, t)
    assert (expected_gradient(student, t, b, **options) - exact).norm() > 0.05 * exact.norm()
    fresh = student.log_softmax(-1)
    torch.testing.assert_close(
        expected_gradient(student, t, fresh, **options), exact, rtol=1e-9, atol=1e-11
    )


ESTIMATORS = [
    dict(loss="sampled_reverse_kl", num_samples=1),
    dict(loss="sampled_reverse_kl", num_samples=3),
    *[
        dict(loss="stratified_reverse_kl", top_k=k, num_samples=n)
        for k, n in ((1, 1), (3, 1), (6, 1), (3, 2), (4, 3))
    ],
    dict(loss="plain_sampled", num_samples=2),
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
    """Its mean over all draws of a small vocabulary.
    With few draws too, a baseline that is switched on adds no bias."""
    monkeypatch.setattr(losses, "BASELINE_DRAWS", SimpleNamespace(value=baseline_from))
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
    [("sampled_reverse_kl", "plain_sampled"), ("stratified_reverse_kl", "plain_stratified")],
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


def test_sparse_reverse_kl_is_biased_even_without_lag():
    student, t, b = policies(3, lag=0.0)
    order = b.argsort(descending=True)
    ids = order[[5, 0, 1, 2]]  # the emitted token, the top
    loss = loss_of("sparse_reverse_kl", top_k=3)
    exact = exact_reverse_kl_gradient(student, t)
    ours = gradient(lambda s: loss.value(s[ids][None], t[ids][None], b[ids][None]), student)
    assert (ours - exact).norm() > 0.05 * exact.norm()


def test_sparse_reverse_kl_is_the_reverse_kl_of_its_support_and_no_more():
    student, t, b = policies(3)
    order = b.argsort(descending=True)
    top, ids = order[:3], order[[5, 0, 1, 2]]
    loss = loss_of("sparse_reverse_kl", top_k=3)
    ours = gradient(lambda s: loss.value(s[ids][None], t[ids][None], b[ids][None]), student)
    expected = gradient(lambda s: s[top].exp() * (s[top] - t[top]), student)
    torch.testing.assert_close(ours, expected)


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
    """Zero value; for forward KL the gradient vanishes once the support is everything,
    for sparse only the +1 is left."""
    student, _, _ = policies(5)
    loss = make_loss(config)
    loss.m2_bound = 1.0
    ids = torch.arange(loss.num_columns)[None] % V
    s = student.log_softmax(-1)[None].gather(1, ids).requires_grad_()
    same = s.detach().clone()
    value = loss.value(s, same, same)
    assert value.abs().max() < 1e-12
    assert loss.reverse_kl(s, same, same).abs().max() < 1e-12
    if config.loss in ("sampled_reverse_kl", "stratified_reverse_kl"):
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


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_only_m2po_asks_for_the_whole_update_and_drops_by_the_bound_that_it_finds(config):
    loss = make_loss(config)
    if not config.correction.startswith("m2po"):
        loss.look_ahead(None, None)  # it looks at nothing
        return
    ratios = torch.tensor([0.01, -0.1, 0.25, -1.5, 1.5])[:, None].expand(-1, loss.num_columns)
    s = torch.full((5, loss.num_columns), -2.0)
    t, b = s - 1, s - ratios
    squares = loss.squares(s, t, b)
    away = moves_away(ratios, loss.advantage(s, t, b))
    watched = away if config.correction == "m2po" else torch.ones_like(away)
    torch.testing.assert_close(squares.flatten().float(), ratios.square()[watched].flatten())
    tables = [(s, None, t, b)]
    loss.look_ahead(tables, lambda value: [value, torch.full((100,), 1e-6)])  # of another rank
    assert loss.m2_bound == second_moment_bound(
        torch.cat([squares.flatten(), torch.full((100,), 1e-6)]), config.correction == "m2po"
    )
    loss.look_ahead(tables, lambda value: [value])
    assert loss.m2_bound == second_moment_bound(squares, config.correction == "m2po")
    assert torch.equal(
        loss.value(s, t, b) == 0, ((ratios.square() > loss.m2_bound) & watched).all(-1)
    )


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_the_columns_of_a_loss_are_what_its_formula_reads(config):
    """A column outside of them has no gradient, and every column within has one."""
    loss, N, K = make_loss(config), config.num_samples, config.top_k
    wanted = {
        "forward_kl": (1, K, 0),
        "sparse_reverse_kl": (1, K, 0),
        "sampled_reverse_kl": (N, 0, 0),
        "stratified_reverse_kl": (1, K, N),
    }[config.loss]
    stops = list(itertools.accumulate(wanted))
    assert (loss.draws, loss.top, loss.tail) == tuple(map(slice, [0, *stops[:2]], stops))
    teachers = K if config.loss == "forward_kl" else 0
    assert (loss.num_columns, loss.teacher_top) == (sum(wanted), teachers)
    assert (loss.num_proposed, loss.num_uniforms) == (sum(wanted) - teachers, wanted[0] + wanted[2])
    assert config.num_candidates == loss.num_columns
    loss.m2_bound = 1.0
    s = torch.full((1, loss.num_columns), -2.0, requires_grad=True)
    loss.value(s, torch.full_like(s, -3.0), torch.full_like(s, -1.9)).sum().backward()
    read = [column for part in (loss.top, loss.tail) for column in range(part.start, part.stop)]
    read = read or list(range(loss.draws.stop))
    assert s.grad[0].nonzero().flatten().tolist() == read


# The others are the studies'.
SHIPPED = ("forward_kl", "sparse_reverse_kl", "sampled_reverse_kl", "stratified_reverse_kl")


def test_the_names_of_the_losses_are_those_of_their_classes():
    for name in SHIPPED:
        assert type(make_loss(Config(loss=name))) is LOSSES[name]
        assert LOSSES[name].__name__.lower() == name.replace("_", "")


def test_no_loss_falls_through_to_another_by_accident():
    with pytest.raises(InputError, match="--loss is no_loss_yet: one of forward_kl, sparse"):
        Config(loss="no_loss_yet")
    with pytest.raises(KeyError, match="no_loss_yet"):
        make_loss(SimpleNamespace(loss="no_loss_yet", signal="current", correction="is"))
    x = torch.zeros(1, 1)
    with pytest.raises(NotImplementedError):
        Loss().value(x, x, x)
    assert Loss.triton_terms is None and not hasattr(Proposal(), "value")
    kinds = [LOSSES[name] for name in SHIPPED]
    for kind in kinds:
        assert kind.value is not Loss.value
        assert all(other is kind or kind.value is not other.value for other in kinds)
        assert not any(issubclass(kind, other) for other in kinds if other is not kind)


def test_a_loss_that_names_no_candidates_gets_the_emitted_token_alone():
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(5, 1, dtype=torch.float64)
    for proposal in (Loss(), Proposal()):
        assert proposal.num_columns == proposal.num_uniforms == 1
        ids, logp = proposal.propose(logits.clone(), uniforms)
        assert ids.shape == (5, 1)
        torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, ids))
    ids, _ = Greedy().propose(logits, uniforms[:, :0])
    assert torch.equal(ids[:, 0], logits.argmax(-1))


@pytest.fixture
def example(monkeypatch):
    """The README's example, as if it stood at the end of losses.py. It may stand there."""
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```\n<!-- /example -->", text, re.S)
    monkeypatch.setitem(LOSSES, "jeffreys_kl", None)  # what the code sets is taken back
    exec(compile(code, "README.md", "exec"), vars(losses).copy())


def jeffreys(s, t):
    return (s.exp() - t.exp()) * (s - t)


def test_the_example_of_the_readme_gets_the_candidates_that_it_names(example):
    loss = make_loss(Config(loss="jeffreys_kl", top_k=3, num_samples=2))
    assert (
        type(loss).__name__ == "JeffreysKL" and loss.triton_terms is None and loss.teacher_top == 0
    )
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, logp = loss.propose(logits.clone(), uniforms)
    assert ids.shape == logp.shape == (50, loss.num_columns) == (50, 1 + 3 + 2)
    full, top = logits.log_softmax(-1), logits.topk(3).indices
    assert torch.equal(ids[:, 1:4], top)
    torch.testing.assert_close(logp[:, :4], full.gather(1, ids[:, :4]))
    tail = full.scatter(1, top, float("-inf")).log_softmax(-1)
    torch.testing.assert_close(logp[:, 4:], tail.gather(1, ids[:, 4:]))
    assert logp.isfinite().all()
    cumulative = tail.double().exp().cumsum(-1)
    for column, uniform in zip((4, 5), (1, 2)):  # the interval of the drawn id holds its number
        above = cumulative.gather(1, ids[:, column, None])[:, 0]
        below = above - tail.double().exp().gather(1, ids[:, column, None])[:, 0]
        u = uniforms[:, uniform]
        assert (below - 1e-6 <= u).all() and (u <= above + 1e-6).all()


@pytest.mark.parametrize("lag", [0.0, 1.0])
def test_the_example_of_the_readme_has_the_value_and_gradient_of_what_it_says(example, lag):
    """Exactly, as a mean over the draws of the tail: the Jeffreys divergence is a plain sum."""
    student, t, b = policies(7, lag)
    loss = make_loss(Config(loss="jeffreys_kl", top_k=3, num_samples=1))
    exact = jeffreys(student.log_softmax(-1), t).sum()
    value, grad = 0.0, torch.zeros_like(student)
    for ids, behavior, p in outcomes(loss, b):
        one = lambda s: loss.value(s[ids][None], t[ids][None], behavior[None])  # noqa: E731, B023
        value += p * one(student.log_softmax(-1))[0]
        grad += p * gradient(one, student)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(grad, gradient(lambda s: jeffreys(s, t), student))


def test_the_example_of_the_readme_trains(example, model_dir, tokenizer):
    """One update with tiny models, the metric and the gradient against dense logits."""
    config = Config(
        loss="jeffreys_kl",
        top_k=3,
        batch_size=4,
        max_new_tokens=6,
        max_grad_norm=1e9,
        head_chunk=5,
        student=model_dir(seed=0),
        teacher=model_dir(seed=1),
    )
    prompts = [Prompt(text, tokenizer(text).input_ids) for text in ("a12+b34=", "a56+b78+c90=")]
    run = Serial(config, 0, prompts, [])
    reference = type(run.learner.model).from_pretrained(config.student_path)
    rows = []
    batch = run.tickets.batch
    run.tickets.batch = lambda version: rows.append(batch(version)) or rows[-1]
    metrics = run.update()
    table, parts = run.channel, []
    for row in rows[0]:
        length, first = int(table.length[row]), int(table.prompt_len[row])
        count = length - first
        logits = reference(table.tokens[row : row + 1, :length].long()).logits[0, first - 1 : -1]
        s = logits.log_softmax(-1).gather(1, table.candidate_ids[row, :count].long())
        t, b = table.teacher_logp[row, :count], table.behavior_logp[row, :count]
        terms = jeffreys(s, t)
        parts.append(terms[:, 1:4].sum(-1) + (terms[:, 4:] / b[:, 4:].exp()).mean(-1))
    expected = torch.cat(parts).mean()
    expected.backward()
    assert metrics["tokens"] == len(torch.cat(parts))
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3) and norm > 0
    moved = zip(run.learner.parameters, reference.parameters())
    assert any(not torch.equal(ours, before) for ours, before in moved)


@pytest.mark.parametrize(
    "config",
    [
        Config(loss="forward_kl", top_k=2),
        Config(loss="sparse_reverse_kl", top_k=3),
        Config(loss="sampled_reverse_kl", num_samples=2),
        Config(loss="sampled_reverse_kl", num_samples=1, signal="rollout", correction="ppo"),
        Config(loss="stratified_reverse_kl", top_k=3, num_samples=1),
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


def test_a_kernel_belongs_to_the_value_it_was_written_for():
    """Who overrides `value` alone would train the parent's loss on a GPU."""

    class Mine(losses.StratifiedReverseKL):
        def value(self, s, t, b):
            return 2 * super().value(s, t, b)

    class Renamed(losses.StratifiedReverseKL):
        pass

    config = Config(top_k=3)
    assert (
        Mine(config).triton_terms is None
        and Renamed(config).triton_terms
        and losses.StratifiedReverseKL(config).triton_terms
    )
