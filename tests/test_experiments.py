"""Claims about the staleness study: its expectations and its lags are exact.

One seed gives one result.
"""

import fcntl
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from channel import Rollout, read_rollout
from experiments import (
    claims,
    frontier,
    heal,
    learning_rate,
    real_curves,
    real_model,
    staleness,
    two_by_two,
)
from experiments.estimators import (
    ESTIMATORS,
    Snapshot,
    Spread,
    dense_logit_gradient,
    derivatives,
    expected_logit_gradient,
    measure,
    of_different_groups,
)
from experiments.lagged import CPU, Lagged, flat
from experiments.staleness import (
    BASE,
    HARD,
    LATE,
    NOISY,
    SEEDS,
    STARTS,
    LAGS,
    METHODS,
    STRONG,
    Job,
    canonical,
    grid,
    make,
    run,
    summary,
    task,
)
from experiments.study import results
from kernels.head import unfused_loss
from learner import of_responses
from losses import make_loss
from model import flatten_parameters
from support.load import load_model


def policies(lag, positions=5, vocab=40):
    """log-probabilities of student, teacher and a stale sampler, float64 [T,V]."""
    generator = torch.Generator().manual_seed(0)
    z = 1.5 * torch.randn(positions, vocab, dtype=torch.float64, generator=generator)
    t, b = (
        z + scale * torch.randn(positions, vocab, dtype=torch.float64, generator=generator)
        for scale in (1.0, lag)
    )
    return z.log_softmax(-1), t.log_softmax(-1), b.log_softmax(-1)


UNBIASED = [name for name in ESTIMATORS if name.startswith(("current signal + IS", "stratified"))]
BIASED = [name for name in ESTIMATORS if name not in UNBIASED]


def small(name):
    """The study's settings with a support that fits 40 ids."""
    fields = METHODS[name]
    return replace(BASE, **{**fields, "top_k": min(fields.get("top_k", 8), 8)})


@pytest.mark.parametrize("lag", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("name", UNBIASED)
def test_importance_weights_with_the_current_signal_have_exactly_no_bias_at_any_lag(name, lag):
    s, t, b = policies(lag)
    torch.testing.assert_close(
        expected_logit_gradient(small(name), s, t, b),
        dense_logit_gradient(s, t),
        rtol=1e-9,
        atol=1e-12,
    )


def test_the_rollouts_signal_with_the_ratio_pushes_away_from_the_sampler():
    s, t, b = policies(1.0)
    torch.testing.assert_close(
        expected_logit_gradient(small("rollout signal + IS"), s, t, b),
        dense_logit_gradient(s, t) - dense_logit_gradient(s, b),
    )


@pytest.mark.parametrize("name", BIASED)
def test_the_others_are_biased_under_lag(name):
    s, t, b = policies(1.0)
    exact = dense_logit_gradient(s, t)
    assert (
        expected_logit_gradient(small(name), s, t, b, m2_bound=0.2) - exact
    ).norm() > 0.05 * exact.norm()


def test_the_whole_vocabulary_as_support_is_the_dense_gradient():
    s, t, b = policies(1.0)
    torch.testing.assert_close(
        expected_logit_gradient(replace(BASE, loss="truncated_reverse_kl", top_k=40), s, t, b),
        dense_logit_gradient(s, t),
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_expectation_is_the_mean_of_what_the_generator_draws_and_the_learner_computes(name):
    """20,000 draws at each of three positions, through `propose` and the loss."""
    config, draws, generator = small(name), 20_000, torch.Generator().manual_seed(1)
    s, t, b = (x.float() for x in policies(0.5, positions=3))
    config = replace(config, num_samples=min(config.num_samples, 16))
    exact = expected_logit_gradient(config, s, t, b, m2_bound=0.2)
    s, t, b = (x.repeat_interleave(draws, 0) for x in (s, t, b))
    loss = make_loss(config)
    loss.m2_bound = 0.2
    size = (len(s), loss.num_uniforms)
    uniforms = torch.rand(size, dtype=torch.float64, generator=generator)
    ids, logp = loss.propose(b.clone(), uniforms)
    _, _, g = unfused_loss(loss, s.clone(), ids, t.gather(1, ids), logp, torch.float32)
    g = g.view(3, draws, -1).double()
    standard_error = (g.var(1).sum() / draws).sqrt().clamp(min=1e-6 * exact.norm())
    assert (g.mean(1) - exact).norm() / standard_error < 2  # of the whole vector
    squares = (g - exact.double()[:, None]).square().sum(-1)
    _, c, density = derivatives(config, *(x[::draws] for x in (s, t, b)), m2_bound=0.2)
    claimed = Spread(s[::draws], c, density).total / config.num_samples
    assert ((squares.mean(1) - claimed).abs() <= 4 * squares.std(1) / draws**0.5 + 1e-9).all()


@pytest.mark.parametrize(
    "name", ["current signal + IS", "rollout signal + PPO clip", "stratified 28+4"]
)
def test_the_random_vectors_have_the_covariance_of_one_draw_through_any_linear_map(name):
    s, t, b = policies(1.0)
    _, c, density = derivatives(small(name), s, t, b)
    generator = torch.Generator().manual_seed(0)
    positions, vocab = s.shape
    map_ = torch.randn(6, positions, vocab, dtype=torch.float64, generator=generator)
    v = c[..., None] * (torch.eye(vocab, dtype=s.dtype) - s.exp()[:, None])  # [T, id drawn, V]
    v = v - (density[..., None] * v).sum(1, keepdim=True)
    image = torch.einsum("ptv,tyv->pty", map_, v)
    exact = torch.einsum("ty,pty,qty->pq", density, image, image)
    spread = Spread(s, c, density)
    drawn = torch.stack(
        [torch.einsum("ptv,tv->p", map_, spread.sample(generator)) for _ in range(5_000)]
    )
    torch.testing.assert_close(
        drawn.T @ drawn / len(drawn), exact, rtol=0, atol=0.06 * float(exact.diag().max())
    )


def linear_snapshot(seed, parameters=6):
    """A snapshot whose logits are linear in six parameters, and the map from them: [P,T,V]."""
    snapshot, (s, t, b) = object.__new__(Snapshot), (x.float() for x in policies(1.0))
    map_ = torch.randn(parameters, *s.shape, generator=torch.Generator().manual_seed(seed))
    theta = torch.zeros(parameters, requires_grad=True)
    snapshot.parameters, snapshot.logits = [theta], s + torch.einsum("ptv,p->tv", map_, theta)
    snapshot.s, snapshot.t, snapshot.b = s, t, b
    snapshot.exact = snapshot.gradient(dense_logit_gradient(s, t))
    return snapshot, map_


@pytest.mark.parametrize("name", ["rollout signal + PPO clip", "stratified 28+4"])
def test_the_variance_is_that_of_one_draw_at_one_position(name):
    snapshot, map_ = linear_snapshot(0)
    s, config = snapshot.s, small(name)
    _, c, density = derivatives(config, s, snapshot.t, snapshot.b)
    v = c[..., None] * (torch.eye(s.shape[1]) - s.exp()[:, None])
    v = v - (density[..., None] * v).sum(1, keepdim=True)
    exact = (density[None] * torch.einsum("ptv,tyv->pty", map_, v).square()).sum() / len(s)
    variance = snapshot.variance(config, 3000, torch.Generator().manual_seed(0))
    assert variance == pytest.approx(float(exact), rel=0.05)


def test_bias_scatter_and_variance_are_in_units_of_the_exact_gradient_and_of_one_position():
    groups, config = [linear_snapshot(seed)[0] for seed in (0, 1)], small("current signal, N=16")
    found = measure(groups, config, 48.0, 0)
    scale = float(torch.dot(groups[0].exact, groups[1].exact))
    assert found["variance"] == pytest.approx(48.0 / 16 / scale)
    biases = [group.mean(config, None) - group.exact for group in groups]
    assert found["bias"] ** 2 + found["scatter"] / len(groups[0].s) == pytest.approx(
        sum(float(x.square().sum()) for x in biases) / 2 / scale
    )


@pytest.mark.parametrize("lag", [0, 2])
def test_every_token_is_sampled_by_the_weights_of_exactly_lag_updates_ago(lag):
    lagged = Lagged(
        replace(BASE, batch_size=4, steps=5, **METHODS["stratified 12+4"]), lag, *task()
    )
    versions = [flat(lagged.learner.model)]
    for update in range(5):
        metrics = lagged.update()
        # The sampler's own parameters.
        assert torch.equal(lagged.sampler.weights, versions[max(0, update - lag)])
        assert metrics["lag_max"] == metrics["lag_mean"] == min(lag, update)
        assert (abs(metrics["drift_kl"]) < 1e-5) == (min(lag, update) == 0)
        versions.append(flat(lagged.learner.model))


def short_run(loss, lag, seed):
    return run((Job("weak", loss, lag, seed), 2, 2, 1.0))


@pytest.mark.slow
def test_one_seed_gives_one_result_and_another_seed_another():
    first, again, other = (short_run("forward KL 16", 2, seed) for seed in (0, 0, 1))
    assert (
        first == again != other
        and first[0]["update"] == 2
        and set(first[0]) == set(staleness.COLUMNS)
    )


@pytest.mark.parametrize("name", [name for name in METHODS if canonical(name, 0) != name])
def test_without_lag_signal_and_correction_make_no_difference(name):
    def moved(loss):
        lagged = Lagged(replace(BASE, batch_size=4, steps=2, **METHODS[loss]), 0, *task())
        start = flat(lagged.learner.model)
        for _ in range(2):
            lagged.update()
        return flat(lagged.learner.model) - start

    path, stand_in = moved(name), moved(canonical(name, 0))
    # Adam makes much of rounding where the gradient is nearly zero.
    assert (path - stand_in).norm() < 1e-3 * stand_in.norm()


def test_a_run_without_lag_gives_the_lines_of_all_that_it_stands_for():
    lines = short_run("current signal + IS", 0, 0)
    assert (
        {line["loss"] for line in lines}
        == {name for name in METHODS if canonical(name, 0) == "current signal + IS"}
        >= {"M2PO", "decoupled"}
    )
    assert [{**line, "loss": ""} for line in lines] == len(lines) * [{**lines[0], "loss": ""}]


def test_the_population_bias_has_no_noise_of_the_groups():
    generator = torch.Generator().manual_seed(0)
    mean = torch.ones(1000, dtype=torch.float64)
    groups = [
        mean + 3 * torch.randn(1000, dtype=torch.float64, generator=generator) for _ in range(40)
    ]
    assert (
        of_different_groups(groups, groups) == pytest.approx(1000, rel=0.05)
        and groups[0].square().sum() > 8000
    )


def test_no_run_is_made_twice_and_none_is_missing():
    seeds = (1, 2, SEEDS)  # of the last one only the noisy methods are made
    jobs = grid(STARTS, list(METHODS), LAGS, seeds)
    assert len(set(jobs)) == len(jobs)
    weak = {
        Job("weak", canonical(name, lag), lag, seed)
        for seed in seeds
        for name in METHODS
        for lag in LAGS
        if (lag != 2 or name not in LATE) and (seed < SEEDS or name in NOISY)
    }
    strong = {
        Job("strong", canonical(n, lag), lag, s)
        for s in (1, 2)
        for n in STRONG
        for lag in (0, 8, 32)
    }
    hard = {Job("hard", name, lag, seed) for seed in (1, 2) for name in HARD for lag in (0, 8)}
    assert set(jobs) == weak | strong | hard
    assert {*NOISY, *LATE, *HARD, *STRONG} <= METHODS.keys()


def test_the_summary_is_the_mean_over_seeds_of_the_last_evaluation():
    line = {"start": "weak", "loss": "M2PO", "lag": 8, "update": 80}
    lines = [
        line | {"accuracy": 0.25},
        line | {"accuracy": 0.75},
        line | {"update": 20, "accuracy": 1.0},
        line | {"lag": 0, "accuracy": 1.0},
    ]
    assert summary(lines).split() == "weak M2PO lag 0: 100.0% lag 8: 50.0%".split()


def compared(a, b, **more):
    comparison = claims.Comparison(
        "staleness", **{"metric": "accuracy", **more}, a=("weak", "A", 8), b=("weak", "B", 8)
    )
    return claims.compare(
        comparison, {("weak", "A", 8): dict(enumerate(a)), ("weak", "B", 8): dict(enumerate(b))}
    )


def test_a_comparison_is_answered_by_all_seeds_or_by_the_interval():
    half = [0.5, 0.5, 0.5, 0.5, 0.5]
    # All seeds, though the interval holds 0.
    assert compared([0.9, 0.51, 0.51, 0.51, 0.51], half).answer == "yes"
    assert compared([0.1, 0.49, 0.49, 0.49, 0.49], half).answer == "no"
    # Four of five lean.
    assert compared([0.6, 0.6, 0.6, 0.6, 0.4], half).answer == "leans"
    assert compared([0.4, 0.4, 0.4, 0.4, 0.6], half).answer == "leans to no"
    assert compared([0.6, 0.6, 0.6, 0.4, 0.4], half).answer == "open"
    assert compared([0.6] * 7 + [0.4] * 3, half * 2).answer == "open"
    # The interval is clear, though a seed is on the other side.
    assert compared([0.6] * 9 + [0.49], half * 2).answer == "yes"
    # Too few seeds to count.
    three = compared([0.6, 0.61, 0.62], [0.5] * 3)
    assert three.answer == "yes" and three.wins == three.seeds == 3
    assert (
        compared([0.6, 0.61, 0.9], [0.5] * 3).answer == "open"
        and compared([0.9], [0.5]).answer == "open"
    )


def test_a_seed_below_half_of_the_mean_of_the_better_cell_is_a_collapse():
    half = [0.5] * 5
    assert compared([0.9, 0.9, 0.9, 0.9, 0.3], half).answer == "collapse"
    assert compared([0.9, 0.9, 0.9, 0.9, 0.4], half).answer == "yes"  # the mean is 0.8
    assert compared(half, [0.9, 0.9, 0.9, 0.9, 0.3]).answer == "collapse"
    # The worse cell may collapse: that is why it is worse.
    assert compared(half, [0.1, 0.4, 0.4, 0.4, 0.4]).answer == "yes"
    result = compared([0.9, 0.8, 0.9, 0.9, 0.7], half)
    assert (result.worst_a, result.worst_b) == (0.7, 0.5)
    worst = compared([2.0, 3.0], [1.0, 4.0], metric="reverse_kl", ratio=True, margin=1.0)
    assert (worst.worst_a, worst.worst_b) == (3.0, 4.0) and worst.answer == "open"


def test_the_interval_is_students_over_seeds():
    result = compared([0.1, 0.2, 0.3, 0.4, 0.5], [0.0] * 5)
    assert (result.mean, result.low, result.high) == pytest.approx(
        (0.3, 0.3 - 2.776 * 0.0707107, 0.3 + 2.776 * 0.0707107), rel=1e-4
    )


def test_a_verdict_is_never_more_than_its_comparisons():
    assert (
        claims.verdict(["yes", "yes"]) == "**holds**"
        and claims.verdict(["yes", "open", "no"]) == "**holds in part** (1 yes, 1 open, 1 no)"
    )
    assert (
        claims.verdict(["no", "no"]) == "**does not hold here**"
        and claims.verdict(["open", "open"]) == "**not decided** (2 open)"
    )
    assert claims.verdict(["open", "no"]) == "**does not hold here** (1 open, 1 no)"
    assert claims.verdict(["yes", "leans"]) == "**leans** (1 yes, 1 leans)"
    assert claims.verdict(["collapse", "collapse"]) == "**collapse**"
    assert claims.verdict(["yes", "collapse"]) == "**holds in part** (1 yes, 1 collapse)"
    assert claims.verdict(["open", "collapse"]) == "**not decided** (1 open, 1 collapse)"
    assert claims.verdict(["not run"]) == "**not run yet**"
    assert claims.verdict(["yes", "not run"]) == "**holds** so far; 1 not run"


def test_margins_ratios_and_metrics_of_which_less_is_better():
    assert (
        compared([0.52] * 5, [0.5] * 5, margin=0.05).answer == "no"
        and compared([0.46] * 5, [0.5] * 5, margin=-0.05).answer == "yes"
    )
    assert (
        compared([0.2] * 5, [0.4] * 5, metric="reverse_kl", margin=1.9, ratio=True).answer == "yes"
    )
    halved = compared([0.2] * 5, [0.4] * 5, metric="reverse_kl", margin=2.1, ratio=True)
    assert halved.answer == "no" and halved.mean == pytest.approx(2.0)


def test_every_claim_can_be_rerun_and_its_cells_are_those_of_the_study():
    study = set(claims.staleness.grid(STARTS, list(METHODS), LAGS, range(5)))
    pipeline = set(frontier.grid(list(frontier.METHODS), frontier.STALENESS, 5))
    for claim in claims.CLAIMS:
        for c in claim.comparisons:
            if c.study == "staleness":
                assert set(claims.staleness.jobs_for([c.a, c.b], range(5))) <= study
            elif c.study == "frontier":
                assert set(frontier.jobs_for([c.a, c.b], range(5))) <= pipeline
            elif c.study == "real_curves":
                assert (
                    c.a[0] in real_curves.METHODS
                    and c.b[0] in real_curves.METHODS
                    and c.a[1] in real_curves.LAGS
                )
                assert (
                    len(real_curves.jobs_for([c.a, c.b], range(5))) == 10
                    and c.a[2] == real_curves.STEPS
                )
            elif c.study == "two_by_two":
                for model, loss, lag, *ages in (c.a, c.b):
                    assert loss in two_by_two.LOSSES[model]
                    assert lag in two_by_two.LAGS[model] or ages == ["fresh", "fresh"] and lag == 0
            else:
                assert c.a[0] in METHODS and c.b[0] in METHODS and {c.a[1], c.b[1]} <= set(LAGS)


def test_what_is_proposed_again_comes_from_the_weights_that_it_should(model_dir):
    """Candidates and density of another policy, on the tokens that the first one wrote."""
    prompts, held_out = task()
    config = staleness.setting("weak", "stratified 28+4", seed=0, steps=3)
    config = replace(config, batch_size=4, lr=0.01)
    cells = [(a, b) for a in ("fresh", "old") for b in ("fresh", "old")]
    for prefixes, candidates in cells:
        run = two_by_two.Swapped(config, 2, prompts[:8], held_out[:2], prefixes, candidates)
        for _ in range(2):
            run.update()
        old, new = run.versions[0].clone(), run.versions[-1].clone()
        run.update()
        channel, rows = run.channel, list(range(4))
        proposers = {"fresh": new, "old": old}
        model = load_model(config.path("student"), torch.float32, CPU)
        weights = flatten_parameters(model)
        wrote = {}
        for age, its_weights in proposers.items():
            weights.copy_(its_weights)
            logits = run.logits(model, rows).log_softmax(-1)
            ids = of_responses(channel, rows, channel.candidate_ids).long()
            b = of_responses(channel, rows, channel.behavior_logp)
            wrote[age] = float((logits.gather(1, ids) - b)[:, :29].abs().max())
        other = "old" if candidates == "fresh" else "fresh"
        assert wrote[candidates] < 1e-4 < 1e-2 < wrote[other], (prefixes, candidates, wrote)
        # Tokens: what the policy of the prefixes writes for these tickets.
        weights.copy_(proposers[prefixes])
        tokens = channel.tokens.clone()
        run.sampler.weights.copy_(proposers[prefixes])
        again = [read_rollout(channel, row) for row in rows]
        for rollout in run.sampler.generator.generate(again):
            start = len(rollout.prompt_ids)
            assert tokens[rollout.row, start : rollout.length].tolist() == rollout.response_ids


def test_a_run_that_diverges_has_a_line_in_the_study_of_rates(tmp_path, monkeypatch):
    def diverges(*_):
        raise FloatingPointError("gradient norm is inf")

    monkeypatch.setattr(Lagged, "curve", diverges)
    jobs = [job for job in learning_rate.jobs() if job.loss == "forward KL 16"][:2]
    path = tmp_path / "rates.csv"
    lines = learning_rate.make(path, jobs, workers=1)
    assert [(line["accuracy"], line["reverse_kl"]) for line in lines] == [(0.0, float("inf"))] * 2
    assert learning_rate.make(path, jobs, workers=1) == lines  # nothing is made twice
    assert len(set(learning_rate.jobs())) == len(learning_rate.jobs()) == 240


@pytest.mark.slow
def test_the_flags_of_a_method_start_a_run_in_a_new_process():
    """There nothing but --plugin imports the losses of the studies."""
    code = "import sys; from support.config import parse; print(parse(sys.argv[1:]).num_candidates)"
    for loss in frontier.METHODS:
        flags = frontier.flags(loss)
        run = subprocess.run(
            [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
        )
        assert run.stdout.strip() in ("32", "33"), run.stderr


def test_evaluations_are_taken_off_the_clock_of_the_frontier():
    records = [
        {
            "step": i,
            "wall_seconds": 2.0 * i + i // 2,
            "tokens": 100,
            "lag_max": 1,
            "lag_mean": 0.5,
            "drift_kl": 0.0,
            **dict.fromkeys(frontier.BUSY, 0.5),
        }
        for i in (1, 2, 3, 4)
    ]
    records[1]["eval_accuracy"], records[3]["eval_accuracy"] = 0.5, 0.95
    line = frontier.measure(records, [1.0, 1.0], every=2)
    assert (
        line["tokens_per_second"],
        line["seconds_to_90"],
        line["updates_to_90"],
        line["accuracy"],
    ) == (50.0, 8.0, 4, 0.95)
    records[3]["eval_accuracy"] = 0.6
    assert frontier.measure(records, [1.0, 1.0], every=2)["seconds_to_90"] is None


def test_the_teacher_gets_no_time_off_the_clock():
    names = [
        {"ph": "M", "tid": tid, "args": {"name": name}}
        for tid, name in enumerate(("generator 0", "teacher 0", "learner"))
    ]
    spans = [
        (0, "evaluate", 0, 5),
        (0, "decode", 5, 10),
        (0, "evaluate", 10, 14),
        (1, "score", 9, 11),
        (1, "score", 13, 20),
        (2, "update", 0, 20),
    ]
    events = names + [
        {"ph": "X", "tid": tid, "name": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6}
        for tid, name, begin, end in spans
    ]
    # Of 4 seconds the teacher worked 1 + 1.
    assert frontier.off_the_clock(events) == [pytest.approx(2.0)]


@pytest.fixture
def without_training(monkeypatch):
    """Lines of the study made up, the same every time."""

    def run(arguments):
        job, steps, every, norm = arguments
        numbers = {
            column: 0.125 * (job.lag + job.seed)
            for column in staleness.COLUMNS
            if column not in staleness.KINDS
        }
        updates = range(every, steps + 1, every)
        return [
            {**vars(job), "loss": name, **numbers, "max_grad_norm": norm, "update": update}
            for name in staleness.names(job)
            for update in updates
        ]

    monkeypatch.setattr(staleness, "run", run)


def test_a_study_is_continued_not_repeated_and_not_mixed(tmp_path, without_training):
    path, jobs = tmp_path / "s.csv", [Job("weak", "forward KL 16", lag, 0) for lag in (2, 8)]
    first = make(path, jobs[:1], steps=2, every=1, workers=1)
    both = make(path, jobs, steps=2, every=1, workers=1)
    assert both[:2] == first and [line["lag"] for line in both] == [2, 2, 8, 8]
    text = path.read_bytes()
    assert make(path, jobs, steps=2, every=1, workers=1) == both and path.read_bytes() == text
    with pytest.raises(SystemExit, match=r"after \[1, 2\] updates, these are \[20, 40, 60, 80\]"):
        make(path, jobs)
    with pytest.raises(SystemExit, match=r"holds evaluations"):
        make(path, jobs, steps=2, every=2)
    make(tmp_path / "coarse.csv", jobs[:1], steps=2, every=2, workers=1)
    with pytest.raises(SystemExit, match=r"after \[2\] updates, these are \[1, 2\]"):
        make(tmp_path / "coarse.csv", jobs[:1], steps=2, every=1)
    with pytest.raises(SystemExit, match="--max-grad-norm 1, this is 5"):
        make(path, jobs, steps=2, every=1, max_grad_norm=5.0)
    for cut in (2, len(text.splitlines()[-1]) + 1):  # in the last number; the last line
        path.write_bytes(text[:-cut])
        assert make(path, jobs, steps=2, every=1, workers=1) == both and path.read_bytes() == text
    with open(path, "a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(SystemExit, match="is being written by another study"):
            make(path, [*jobs, Job("weak", "forward KL 16", 0, 0)], steps=2, every=1, workers=1)
    path.write_bytes(text.splitlines()[0])  # stopped within the first line
    assert make(path, jobs, steps=2, every=1, workers=1) == both and path.read_bytes() == text
    header, line = text.splitlines(keepends=True)[:2]
    # No accuracy.
    path.write_bytes(header + b",".join(line.split(b",")[:6] + [b""] + line.split(b",")[7:]))
    with pytest.raises(SystemExit, match="line 2 is damaged"):
        make(path, jobs, steps=2, every=1)
    path.write_bytes(text.replace(b"KL 16,8", b"KL 16,eight", 1))
    with pytest.raises(SystemExit, match="line 4 is damaged"):
        make(path, jobs, steps=2, every=1)
    path.write_text("a,b\n")
    with pytest.raises(SystemExit, match="does not have the columns start,loss"):
        make(path, jobs, steps=2, every=1)


def test_a_loss_that_is_new_adds_its_lines_and_removes_none(
    tmp_path, monkeypatch, without_training
):
    job, new = (
        Job("weak", "current signal + IS, N=4", 0, 0),
        {"mine": {**METHODS["rollout signal + PPO clip"], "num_samples": 4}},
    )
    make(tmp_path / "s.csv", [job], steps=1, every=1, workers=1)
    before = (tmp_path / "s.csv").read_text()
    monkeypatch.setattr(staleness, "METHODS", METHODS | new)
    lines = make(tmp_path / "s.csv", [job], steps=1, every=1, workers=1)
    assert (tmp_path / "s.csv").read_text().startswith(before) and [
        line["loss"] for line in lines
    ] == [job.loss, "mine"]


def test_a_process_that_dies_ends_the_study_instead_of_hanging_it():
    with pytest.raises(BrokenProcessPool):
        list(results(os._exit, [1, 1, 1], 2))


def test_the_pages_with_tables_are_those_that_the_command_writes(tmp_path, monkeypatch):
    committed = [page.read_text() for page in claims.PAGES]
    pages = [tmp_path / page.name for page in claims.PAGES]
    for page, text in zip(pages, committed):
        page.write_text(re.sub(r"(<!-- [a-z ]+ -->\n)", r"\1an old line\n", text))
    monkeypatch.setattr(sys, "argv", ["claims", "--pages", *map(str, pages)])
    claims.main()
    assert [page.read_text() for page in pages] == committed
    without = [text.replace("<!-- /claims -->", "") for text in committed]
    with pytest.raises(SystemExit, match="<!-- /claims -->"):
        claims.fill(without, {"claims": ""})


@pytest.mark.slow
def test_the_figures_are_drawn_from_the_committed_results(tmp_path):
    shutil.copytree(ROOT / "experiments" / "results", tmp_path / "results")
    for picture in (tmp_path / "results").glob("*.png"):
        picture.unlink()
    subprocess.run(
        [sys.executable, "-m", "experiments.figures", "--results", tmp_path / "results"],
        cwd=ROOT,
        check=True,
    )
    assert {p.name for p in (tmp_path / "results").glob("*.png")} == {
        p.name for p in (ROOT / "experiments" / "results").glob("*.png")
    }


@pytest.mark.slow
def test_the_table_of_splits_is_what_the_command_prints(capsys, monkeypatch):
    from experiments import simulate

    monkeypatch.setattr("sys.argv", ["simulate", "--plan"])
    simulate.main()
    page = (ROOT / "docs" / "simulation.md").read_text()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 8 and all(row in page for row in rows)


# ---- a real model's estimators: closed forms on small tables -----------------------------------


def responses(count=6):
    """Responses of different lengths from random policies,
    as experiments/real_model.py finds them."""
    tables = policies(0.5, positions=5 * count)
    s, t, b = ([x[5 * i : 5 * i + 3 + i % 3] for i in range(count)] for x in tables)
    return [real_model.Response(None, *parts) for parts in zip(s, s, t, b)]


def flat_pull(g):
    return g.flatten()[:100]


HEAD = torch.eye(40, dtype=torch.float64)[:, :20]


def measured(name, fields, monkeypatch, draws=400):
    monkeypatch.setitem(real_model.ESTIMATORS, name, fields)
    found = responses()
    folded = torch.stack([flat_pull(r.exact()) for r in found])
    columns = ("space", "name", "bias", "bias_error", "variance", "variance_error", "median")
    rows = real_model.measure(name, found, HEAD, [flat_pull] * len(found), folded, draws)
    return found, {row[0]: dict(zip(columns, row)) for row in rows}


def test_each_space_has_the_squares_of_its_own_image(monkeypatch):
    fields = {**METHODS["stratified 12+4"], "top_k": 8}
    found, rows = measured("stratified 8+4", fields, monkeypatch, draws=1)
    loss, generator = make_loss(replace(BASE, **fields)), torch.Generator().manual_seed(0)
    errors = [real_model.logit_gradient(loss, r, generator) - r.exact() for r in found]
    for space, image in (
        ("logits", lambda g: g),
        ("hidden", lambda g: g @ HEAD),
        ("parameters", flat_pull),
    ):
        parts, wholes = (
            [real_model.square(image(g)) for g in gradients]
            for gradients in (errors, [r.exact() for r in found])
        )
        assert (
            rows[space]["variance"] == pytest.approx(sum(parts) / sum(wholes))
            and rows[space]["variance_error"] > 0
        )


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [1.0, 4.0, 2.0, 7.0, 7.0]
    assert real_model.ratio(values, [1.0] * 5) == pytest.approx(
        (4.2, statistics.stdev(values) / 5**0.5)
    )


@pytest.mark.parametrize("name", ["current signal + IS, N=4", "stratified 12+4"])
def test_the_measured_variance_of_a_logit_gradient_is_the_closed_form(name, monkeypatch):
    fields = {**METHODS[name], "top_k": 8}
    found, rows = measured(name, fields, monkeypatch)
    config, claimed = replace(BASE, **fields), 0.0
    for r in found:
        _, c, density = derivatives(config, r.s, r.t, r.b)
        claimed += float(Spread(r.s, c, density).total.sum()) / config.num_samples
    claimed /= sum(real_model.square(r.exact()) for r in found)
    assert rows["logits"]["variance"] == pytest.approx(claimed, rel=0.05)
    assert rows["logits"]["bias"] == 0


@pytest.mark.parametrize("loss", claims.staleness.TOP_K.values())
def test_the_measured_bias_of_a_top_k_is_the_closed_form_and_it_has_no_variance(loss, monkeypatch):
    fields = {"loss": loss, "top_k": 8}
    found, rows = measured("top 8", fields, monkeypatch, draws=1)
    errors = [
        expected_logit_gradient(replace(BASE, **fields), r.s, r.t, r.b) - r.exact() for r in found
    ]
    wholes = [real_model.square(r.exact()) for r in found]
    assert rows["logits"]["bias"] == pytest.approx(
        sum(map(real_model.square, errors)) / sum(wholes)
    )
    errors, exact = (
        torch.stack([flat_pull(x) for x in xs]) for xs in (errors, [r.exact() for r in found])
    )
    products = [float((x @ x.T).sum() - (x @ x.T).trace()) for x in (errors, exact)]
    assert rows["parameters"]["bias"] == pytest.approx(products[0] / products[1])
    assert all(row["variance"] == 0 for row in rows.values())


def test_prefix_noise_is_the_sample_variance_of_gradients_per_token():
    found, generator = responses(), torch.Generator().manual_seed(0)
    mean, lengths = torch.randn(100, generator=generator), torch.tensor([[len(r.s)] for r in found])
    assert real_model.prefix_noise(found, lengths * mean)[4] == pytest.approx(0, abs=1e-9)
    folded = torch.randn(len(found), 100, generator=generator)
    for r in found:  # of one length
        r.s = r.s[:3]
    claimed = folded.var(0).sum() / folded.square().sum(1).mean()
    assert real_model.prefix_noise(found, folded)[4] == pytest.approx(float(claimed), rel=1e-5)


def test_folding_keeps_inner_products_of_gradients(monkeypatch):
    monkeypatch.setattr(real_model, "FOLDED", 4096)
    student = load_model(BASE.path("student"), torch.float32, CPU).requires_grad_(True)
    ids = task()[0][0].ids
    rollout = Rollout(ids, candidate_ids=torch.tensor(ids[:12])[:, None])
    pullback = real_model.Pullback(student)
    pull = pullback.of(rollout)
    g = torch.randn(2, 12, 173, generator=torch.Generator().manual_seed(0))
    folded = torch.stack([pull(x) for x in g])
    z = heal.response_logits(student, rollout)
    whole = [
        torch.cat(
            [p.flatten() for p in torch.autograd.grad(z, pullback.parameters, x, retain_graph=True)]
        )
        for x in g
    ]
    exact = torch.stack(whole) @ torch.stack(whole).T
    torch.testing.assert_close(
        folded @ folded.T, exact, rtol=0, atol=0.05 * float(exact.diag().max())
    )
    ones = torch.ones(len(pullback.signs))  # without signs they would add up
    assert real_model.square(pullback.fold(ones)) == pytest.approx(len(ones), rel=0.1)


def test_a_training_curve_has_a_line_before_the_first_update_and_one_for_each_evaluation(
    tmp_path, monkeypatch
):
    """On the built-in pair instead of SmolLM2."""
    for name in ("student", "teacher"):
        (tmp_path / name).symlink_to(ROOT / "assets" / name)
    for name, prompts in (("prompts.jsonl", task()[0][:40]), ("held_out.jsonl", task()[1][:8])):
        (tmp_path / name).write_text(
            "".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in prompts)
        )
    monkeypatch.setattr(real_curves, "STEPS", 4)
    monkeypatch.setattr(real_curves, "EVERY", 2)
    lines = [
        real_curves.run(real_curves.Job("stratified 16+16", lag, 0, tmp_path)) for lag in (0, 8, 0)
    ]
    assert [line["update"] for line in lines[0]] == [0, 2, 4] and lines[0] == lines[2]
    assert (
        lines[0][0]["train_loss"] is None and lines[0][0]["reverse_kl"] == lines[1][0]["reverse_kl"]
    )
    assert lines[0][2]["drift_k3"] < 1e-9 < lines[1][2]["drift_k3"]
    assert lines[0][2]["reverse_kl"] != lines[1][2]["reverse_kl"]
