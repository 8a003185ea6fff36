"""What the paper claims and what was measured here: `python -m experiments.claims`.

It writes the tables of PAGES anew from the CSVs in experiments/results, between the pages' markers
`<!-- NAME -->` and `<!-- /NAME -->`. Nothing is run again; that is what `--rerun` is for.

A claim is a list of comparisons; each compares two cells of a study seed by seed. A comparison
holds if it does in all seeds, of which there are five at least, or if the 95 % interval of the mean
difference (Student's t over seeds) lies above its margin. It leans that way if it holds in four of
five. It is open if neither that nor the opposite is so. Where the better cell has a seed with less
than half of the cell's mean accuracy, the answer is "collapse": then a mean says nothing of what
one run would do. A claim holds if all its comparisons do, leans if some of them only lean, and
holds in part if others do not. By chance alone all of five seeds favour a given side in 3 % of
comparisons without any difference, and four or five of them in 19 %. `--rerun N` makes the runs of
claim N again, in a CSV of its own, judges those and prints the claim's line.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments import (
    estimators,
    frontier,
    learning_rate,
    other_estimators,
    real_curves,
    real_model,
    staleness,
    top_k,
    two_by_two,
)
from experiments.study import RESULTS, ROOT, RUNS

STUDIES = {
    "staleness": staleness,
    "estimators": estimators,
    "frontier": frontier,
    "real_curves": real_curves,
    "two_by_two": two_by_two,
}
# Two-sided, by degrees of freedom from 0.
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
CELL = {
    "staleness": ("start", "loss", "lag"),
    "estimators": ("estimator", "lag"),
    "frontier": ("loss", "window", "max_staleness"),
    "real_curves": ("loss", "lag", "update"),
    "two_by_two": ("model", "loss", "lag", "prefixes", "candidates"),
}
PAGES = [ROOT / "docs" / name for name in ("claims.md", "topk.md", "staleness.md")]
LOWER_IS_BETTER = ("reverse_kl", "bias", "variance", "error_1000", "seconds_to_90")
ENOUGH = 5  # seeds that may be counted; fewer have only their interval
MARKS = {
    "yes": "✓",
    "leans": "(✓)",
    "open": "?",
    "leans to no": "(✗)",
    "no": "✗",
    "collapse": "‼",
    "not run": "-",
}


@dataclass(frozen=True)
class Comparison:
    """Cell `a` is better than cell `b` by more than `margin`:
    the difference of a metric or, for positive ones, the ratio."""

    study: str
    metric: str
    a: tuple
    b: tuple
    margin: float = 0.0
    ratio: bool = False


@dataclass(frozen=True)
class Claim:
    text: str
    comparisons: list[Comparison]


@dataclass(frozen=True)
class Result:
    """Means of both cells and their worst seeds; mean difference (ratio) with its 95 % interval;
    in how many seeds it is above the margin."""

    a: float
    b: float
    worst_a: float
    worst_b: float
    mean: float
    low: float
    high: float
    wins: int
    seeds: int
    answer: str  # one of MARKS


def cells(study: str, lines: list[dict], metric: str) -> dict[tuple, dict[int, float]]:
    """cell -> seed -> the metric: at a run's last evaluation,
    the mean over an estimator's snapshots; without targets not reached."""
    if study == "staleness":
        last = max(line["update"] for line in lines)
        lines = [line for line in lines if line["update"] == last]
    found: dict[tuple, dict[int, list[float]]] = {}
    for line in (line for line in lines if line[metric] is not None):
        seeds = found.setdefault(tuple(line[key] for key in CELL[study]), {})
        seeds.setdefault(line["seed"], []).append(line[metric])
    return {
        cell: {seed: statistics.mean(values) for seed, values in seeds.items()}
        for cell, seeds in found.items()
    }


def compare(c: Comparison, values: dict[tuple, dict[int, float]]) -> Result:
    """`values` as from `cells`; the seeds that both cells have."""
    a, b = values[c.a], values[c.b]
    seeds = sorted(a.keys() & b.keys())
    into, back = (math.log, math.exp) if c.ratio else (float, float)
    sign = -1 if c.metric in LOWER_IS_BETTER else 1
    differences = [sign * (into(a[seed]) - into(b[seed])) for seed in seeds]
    mean, margin = statistics.mean(differences), into(c.margin)
    half = (
        T95[len(seeds) - 1] * statistics.stdev(differences) / math.sqrt(len(seeds))
        if len(seeds) > 1
        else math.inf
    )
    wins, losses = sum(x > margin for x in differences), sum(x < margin for x in differences)
    count = len(seeds)
    answer = "open"
    if mean - half > margin or wins == count >= ENOUGH:
        answer = "yes"
    elif mean + half < margin or losses == count >= ENOUGH:
        answer = "no"
    elif count >= ENOUGH and max(wins, losses) >= 0.8 * count:
        answer = "leans" if wins > losses else "leans to no"
    means = [statistics.mean(cell[seed] for seed in seeds) for cell in (a, b)]
    worst = [(max if sign < 0 else min)(cell[seed] for seed in seeds) for cell in (a, b)]
    if c.metric == "accuracy":
        better = {"yes": [0], "leans": [0], "open": [0, 1]}.get(answer, [1])  # which of a and b
        if any(worst[i] < means[i] / 2 for i in better):
            answer = "collapse"
    interval = (back(mean), back(mean - half), back(mean + half))
    return Result(*means, *worst, *interval, wins, count, answer)


def at_lags(a: str, b: str, lags=(8, 32), starts=("weak",), **more) -> list[Comparison]:
    """Loss a is better than loss b at the same lag."""
    more = {"metric": "accuracy", **more}
    return [
        Comparison("staleness", a=(start, a, lag), b=(start, b, lag), **more)
        for start in starts
        for lag in lags
    ]


def with_and_without_lag(
    loss: str, lags=(2, 8, 32), starts=("weak", "strong"), worse: bool = False
) -> list[Comparison]:
    """A lag costs at most five points of accuracy or, if `worse`, more."""
    lagged = [
        ((start, loss, lag), (start, loss, 0))
        for start in starts
        for lag in lags
        if start == "weak" or lag != 2
    ]
    return [
        Comparison("staleness", "accuracy", *((b, a, 0.05) if worse else (a, b, -0.05)))
        for a, b in lagged
    ]


def smaller(metric: str, a: str, b: str, lags=(8, 32), times: float = 1.0) -> list[Comparison]:
    """An estimator's variance or error is smaller than another's,
    by a factor of more than `times`."""
    return [Comparison("estimators", metric, (a, lag), (b, lag), times, ratio=True) for lag in lags]


def on_real_model(a: str, b: str, lags=(0, 8), margin: float = 1.0) -> list[Comparison]:
    """Loss a ends with less reverse KL than loss b, by a factor of more than `margin`."""
    return [
        Comparison(
            "real_curves",
            "reverse_kl",
            *((loss, lag, real_curves.STEPS) for loss in (a, b)),
            margin,
            ratio=True,
        )
        for lag in lags
    ]


def against_fresh(loss: str, prefixes: str, candidates: str) -> list[Comparison]:
    """Some kind of staleness costs at most 5 points on the toy task."""
    fresh = ("toy", loss, 0, "fresh", "fresh")
    return [
        Comparison("two_by_two", "accuracy", ("toy", loss, lag, prefixes, candidates), fresh, -0.05)
        for lag in two_by_two.LAGS["toy"]
    ]


SAMPLED = ("current signal + IS, N=16", "current signal + IS, N=32", "current signal + IS, N=64")
STRATIFIED, SPARSE = (
    ("stratified 12+4", "stratified 28+4", "stratified 60+4"),
    ("truncated K=16", "truncated K=32", "truncated K=64"),
)
LAGS = (0, 2, 8, 32)
SMALLER = {"metric": "reverse_kl", "margin": 1.0, "ratio": True}
NEAR = {"metric": "reverse_kl", "margin": 1 / 1.05, "ratio": True}
PIPELINES = [*((loss, 0) for loss in frontier.METHODS), ("stratified 28+4", frontier.ARRIVAL)]
CLAIMS = [
    # the paper's
    Claim(
        "Teacher-weighted forward KL is robust to stale rollouts: "
        "lag costs at most 5 points of accuracy",
        with_and_without_lag("forward KL 16"),
    ),
    Claim(
        "Student-weighted reverse KL is not. "
        "With the rollout's signal, one sample and no ratio, lag costs more than 5 points",
        with_and_without_lag("rollout signal", worse=True),
    ),
    Claim(
        "... nor as RL does it, with PPO's clipped ratio",
        with_and_without_lag("rollout signal + PPO clip", worse=True),
    ),
    Claim(
        "Recomputing the signal with the current student repairs it: "
        "with the importance ratio (the paper's surrogate) it is better than the rollout's signal",
        [
            c
            for draws in ("", ", N=16")
            for c in at_lags(
                "current signal + IS" + draws, "rollout signal + IS" + draws, (2, 8, 32)
            )
        ],
    ),
    Claim(
        "... and without the ratio",
        at_lags("current signal", "rollout signal", (2, 8, 32))
        + at_lags("current signal", "rollout signal", starts=("strong",)),
    ),
    Claim(
        "What stabilises asynchronous RL (PPO clip, decoupled, M2PO) does not improve over "
        "recomputing with the ratio: no method is more than 5 points better",
        [
            c
            for method in ("rollout signal + PPO clip", "decoupled", "M2PO")
            for c in at_lags("current signal + IS", method, (2, 8, 32), margin=-0.05)
        ],
    ),
    Claim(
        "A sparse top-K cache is biased where sampling is not (exactly, see the tests): "
        "by more than 5 % of the gradient",
        [
            Comparison("estimators", "bias", (a, lag), (b, lag), 0.05)
            for a, b in zip(SAMPLED, SPARSE)
            for lag in (8, 32)
        ],
    ),
    Claim(
        "... and sampling pays in variance: "
        "at 1,000 tokens the error of sparse top-K is the smaller one",
        [c for a, b in zip(SPARSE, SAMPLED) for c in smaller("error_1000", a, b)],
    ),
    Claim(
        "Several Monte Carlo samples tame the variance of one: N = 16 is better than N = 1",
        at_lags("current signal + IS, N=16", "current signal + IS", (0, 2, 8, 32)),
    ),
    Claim(
        "Asynchronous training has at least 1.6 times the throughput of synchronous training "
        "(the paper: 1.6 to 3.8)",
        [
            Comparison("frontier", "tokens_per_second", (*run, 1), (run[0], 0, 0), 1.6, ratio=True)
            for run in PIPELINES
        ],
    ),
    Claim(
        "... at equal accuracy: at most 5 points less after the same number of updates",
        [Comparison("frontier", "accuracy", (*run, 1), (run[0], 0, 0), -0.05) for run in PIPELINES],
    ),
    # ours
    Claim(
        "What staleness hurts is the sampling, not the direction of the KL: "
        "for reverse KL over the whole vocabulary lag costs at most 5 points",
        with_and_without_lag("dense reverse KL"),
    ),
    Claim(
        "Recomputing without the ratio does not save reverse KL: lag costs more than 5 points",
        with_and_without_lag("current signal", worse=True),
    ),
    Claim(
        "... nor do 16 samples without the ratio",
        with_and_without_lag("current signal, N=16", starts=("weak",), worse=True),
    ),
    Claim(
        "With the ratio and 16 samples lag costs at most 5 points",
        with_and_without_lag("current signal + IS, N=16"),
    ),
    Claim(
        "At one sample PPO's clip is better than the bare ratio",
        at_lags("rollout signal + PPO clip", "current signal + IS", (2, 8, 32)),
    ),
    Claim(
        "At equal candidate count stratified ends nearer to the teacher than sampled: "
        "smaller reverse KL",
        [
            c
            for a, b in zip(STRATIFIED, SAMPLED)
            for c in at_lags(a, b, (0, 8, 32), metric="reverse_kl", margin=1.0, ratio=True)
        ],
    ),
    Claim(
        "... its gradient has the smaller variance",
        [c for a, b in zip(STRATIFIED, SAMPLED) for c in smaller("variance", a, b, (0, 8, 32))],
    ),
    Claim(
        "Stratified reaches the dense oracle: reverse KL at most a tenth higher",
        [
            c
            for a in STRATIFIED
            for c in at_lags(a, "dense reverse KL", metric="reverse_kl", margin=1 / 1.1, ratio=True)
        ],
    ),
    Claim(
        "Stratified ends nearer to the teacher than sparse top-K of as many candidates: "
        "smaller reverse KL",
        [
            c
            for a, b in zip(STRATIFIED, SPARSE)
            for c in at_lags(a, b, metric="reverse_kl", margin=1.0, ratio=True)
        ],
    ),
    Claim(
        "More lag can be better: a lag of 32 is better than one of 8 where 8 does harm",
        [
            Comparison("staleness", "accuracy", ("weak", loss, 32), ("weak", loss, 8))
            for loss in ("current signal", "current signal + IS", "truncated K=32")
        ],
    ),
    Claim(
        "The pipeline with staleness 1 reaches 90 % at least 1.3 times sooner "
        "than the synchronous one",
        [
            Comparison("frontier", "seconds_to_90", (*run, 1), (run[0], 0, 0), 1.3, ratio=True)
            for run in PIPELINES
        ],
    ),
    Claim(
        "More staleness buys little more throughput: "
        "staleness 8 has less than 1.25 times that of 1",
        [
            Comparison(
                "frontier",
                "tokens_per_second",
                (loss, 0, 1),
                (loss, 0, 8),
                0.8,
                ratio=True,
            )
            for loss in frontier.METHODS
        ],
    ),
    Claim(
        "... and at lr 1e-3 costs more than 5 points of accuracy where candidates are drawn",
        [
            Comparison("frontier", "accuracy", (loss, 0, 1), (loss, 0, 8), 0.05)
            for loss in ("stratified 28+4", "current signal + IS, N=32")
        ],
    ),
    Claim(
        "... and at most 5 points with forward KL",
        [
            Comparison(
                "frontier",
                "accuracy",
                ("forward KL 32", 0, 8),
                ("forward KL 32", 0, 1),
                -0.05,
            )
        ],
    ),
    Claim(
        "The rollout's signal survives lag where the noise is small: "
        "with the ratio and 256 draws lag costs at most 5 points",
        with_and_without_lag("rollout signal + IS, N=256", starts=("weak",)),
    ),
    Claim(
        "... while with 16 draws it costs more than 5",
        with_and_without_lag("rollout signal + IS, N=16", starts=("weak",), worse=True),
    ),
    Claim(
        "How M2PO is read decides: bounding only samples that move away from the sampler "
        "(its release) is more than 5 points better than dropping the "
        "largest squares of all (AReaL)",
        at_lags("M2PO", "M2PO (AReaL)", (2, 8, 32), margin=0.05),
    ),
    Claim(
        "Truncating or gating the recomputed signal's ratio (TIS, IcePop) does not improve over "
        "the bare ratio: it is at most 5 points better",
        [
            c
            for method in ("TIS", "IcePop")
            for c in at_lags(
                "current signal + IS", f"current signal + {method}", (2, 8, 32), margin=-0.05
            )
        ],
    ),
    Claim(
        "Of 32 candidates, 16 may be drawn: "
        "16+16 ends with at most a tenth more reverse KL than 28+4",
        at_lags(
            "stratified 16+16",
            "stratified 28+4",
            LAGS,
            metric="reverse_kl",
            margin=1 / 1.1,
            ratio=True,
        ),
    ),
    Claim(
        "The leave-one-out baseline does no harm: reverse KL is at most a twentieth higher with it",
        [
            c
            for size in ("16+16", "8+8")
            for c in at_lags(f"stratified {size}", f"stratified {size}, no baseline", LAGS, **NEAR)
        ]
        + at_lags("sampled N=32", "current signal + IS, N=32", LAGS, **NEAR),
    ),
    Claim(
        "... and where candidates are few it helps: 8+8 ends with the smaller reverse KL",
        at_lags(
            "stratified 8+8",
            "stratified 8+8, no baseline",
            LAGS,
            metric="reverse_kl",
            margin=1.0,
            ratio=True,
        ),
    ),
    Claim(
        "Draws from the rest beat the emitted token: "
        "28+4 ends with the smaller reverse KL than the top 31 and the emitted token (EMA-PG)",
        at_lags(
            "stratified 28+4",
            "top 31 + emitted (EMA-PG)",
            LAGS,
            metric="reverse_kl",
            margin=1.0,
            ratio=True,
        ),
    ),
    Claim(
        "... and exact terms beat a baseline from the same top 28: "
        "28+4 ends with the smaller reverse KL than 4 draws with it (vOPD)",
        at_lags(
            "stratified 28+4",
            "4 draws, top-28 baseline (vOPD)",
            LAGS,
            metric="reverse_kl",
            margin=1.0,
            ratio=True,
        ),
    ),
    # ours, on a real model
    Claim(
        "On a real model too, 16 of 32 candidates may be drawn: "
        "16+16 ends with at most a twentieth more reverse KL than 28+4",
        on_real_model("stratified 16+16", "stratified 28+4", margin=1 / 1.05),
    ),
    Claim(
        "... and the top 16 are worth summing: "
        "16+16 ends with the smaller reverse KL than 32 draws",
        on_real_model("stratified 16+16", "32 draws"),
    ),
    Claim(
        "On a real model sparse top-K ends with more reverse KL than stratified 16+16, "
        "with and without lag",
        on_real_model("stratified 16+16", "truncated K=32"),
    ),
    Claim(
        "On a real model forward KL ends with at most a tenth more reverse KL "
        "than stratified 16+16",
        on_real_model("forward KL 32", "stratified 16+16", margin=1 / 1.1),
    ),
    Claim(
        "On a real model the rollout's signal without the ratio ends with more reverse KL "
        "under lag, even with 32 draws",
        on_real_model("32 draws", "32 draws, rollout signal, no ratio", lags=(8,)),
    ),
    # the paper's, which were not judged before
    Claim(
        "At one sample PPO's clip is better than the bare ratio with the current signal, too "
        "(a cell of the paper's grid)",
        at_lags("current signal + PPO clip", "current signal + IS", (2, 8, 32)),
    ),
    Claim(
        "... where the current signal is better than the rollout's",
        at_lags("current signal + PPO clip", "rollout signal + PPO clip", (2, 8, 32)),
    ),
    Claim(
        "One sample with the current signal and the ratio beats a stale sparse top-K cache "
        "in the paper's form",
        [c for sparse in SPARSE for c in at_lags("current signal + IS", sparse)],
    ),
    Claim(
        "Order of arrival has at least 1.5 times the throughput of ticket order "
        "(the paper: fully asynchronous against step-off)",
        [
            Comparison(
                "frontier",
                "tokens_per_second",
                ("stratified 28+4", frontier.ARRIVAL, staleness),
                ("stratified 28+4", 0, staleness),
                1.5,
                ratio=True,
            )
            for staleness in (1, 4)
        ],
    ),
    # ours: a top K alone (docs/topk.md)
    Claim(
        "What ruins a sparse top-K is its +1, a guess of -1 about the rest: "
        "with the guess of the edge it ends with the smaller reverse KL",
        [
            c
            for k in (8, 16, 32)
            for c in at_lags(f"edge K={k}", f"truncated K={k}", (0, 8, 32), **SMALLER)
        ],
    ),
    Claim(
        "... and lag costs at most 5 points of accuracy",
        [c for k in (16, 32) for c in with_and_without_lag(f"edge K={k}", (8, 32), ("weak",))],
    ),
    Claim(
        "... and it ends with at most a tenth more reverse KL than the sum over all ids",
        [
            c
            for k in (16, 32)
            for c in at_lags(
                f"edge K={k}", "dense reverse KL", (0, 8, 32), **SMALLER | {"margin": 1 / 1.1}
            )
        ],
    ),
    Claim(
        "... and with at most a twentieth more than 16 exact and 16 drawn ids",
        at_lags("edge K=32", "stratified 16+16", (0, 8, 32), **NEAR),
    ),
    Claim(
        "The guess of the edge ends with the smaller reverse KL than that of a bucket",
        [
            c
            for k in (8, 16, 32)
            for c in at_lags(f"edge K={k}", f"bucket K={k}", (0, 8, 32), **SMALLER)
        ],
    ),
    Claim(
        "... and than renormalising",
        [
            c
            for k in (8, 16, 32)
            for c in at_lags(f"edge K={k}", f"renormalised K={k}", (0, 8, 32), **SMALLER)
        ],
    ),
    Claim(
        "A bucket for the rest does no harm to forward KL: "
        "reverse KL is at most a twentieth higher",
        at_lags("forward KL + bucket 16", "forward KL 16", (0, 8, 32), **NEAR),
    ),
    Claim(
        "On a real model the guess of the edge ends with at most a twentieth more reverse KL "
        "than 16 exact and 16 drawn ids",
        on_real_model("edge K=32", "stratified 16+16", real_curves.LAGS, 1 / 1.05),
    ),
    Claim(
        "... and with the smaller reverse KL",
        on_real_model("edge K=32", "stratified 16+16", real_curves.LAGS),
    ),
    Claim(
        "... and at most a twentieth more than renormalising",
        on_real_model("edge K=32", "renormalised K=32", real_curves.LAGS, 1 / 1.05),
    ),
    Claim(
        "... and with the smaller reverse KL than a bucket",
        on_real_model("edge K=32", "bucket K=32", real_curves.LAGS),
    ),
    Claim(
        "On a real model a bucket for the rest does no harm to forward KL: "
        "reverse KL is at most a twentieth higher",
        on_real_model("forward KL + bucket 32", "forward KL 32", real_curves.LAGS, 1 / 1.05),
    ),
    # ours: another loss
    Claim(
        "A loss that adds forward KL on the same candidates ends nearer to the teacher: "
        "Jeffreys 16+16 has the smaller reverse KL than stratified 16+16",
        at_lags("Jeffreys 16+16", "stratified 16+16", (0, 8, 32), **SMALLER),
    ),
    Claim(
        "... as 28+4, too",
        at_lags("Jeffreys 28+4", "stratified 28+4", (0, 8, 32), **SMALLER),
    ),
    # ours: where staleness hurts
    Claim(
        "Old prefixes do no harm: with fresh candidates on them, "
        "accuracy is at most 5 points below that without lag",
        [c for loss in two_by_two.LOSSES["toy"] for c in against_fresh(loss, "old", "fresh")],
    ),
    Claim(
        "... while old candidates on fresh prefixes cost more than 5 points wherever a lag does",
        [
            Comparison("two_by_two", c.metric, c.b, c.a, 0.05)
            for loss in two_by_two.LOSSES["toy"][:-1]
            for c in against_fresh(loss, "fresh", "old")
        ],
    ),
    # ours: the whole task, at its own learning rate
    Claim(
        "On the whole task, at lr 1e-3, draws from the rest are worth their noise: "
        "16+16 ends with the smaller reverse KL than the guess of the edge",
        at_lags("stratified 16+16", "edge K=32", (0, 8), ("hard",), **SMALLER),
    ),
    Claim(
        "... and that guess, the larger of two, ends with the smaller reverse KL "
        "than their mean and than a bucket",
        [
            c
            for other in ("halfway K=32", "bucket K=32")
            for c in at_lags("edge K=32", other, (0, 8), ("hard",), **SMALLER)
        ],
    ),
]


def describe(c: Comparison, result: Result) -> str:
    """One comparison in words: what both cells share, what tells them apart, the difference."""

    def name(key: str, value) -> str:
        orders = {0: "ticket order", frontier.ARRIVAL: "order of arrival"}
        if key == "window":
            return orders.get(value, f"window {value}")
        words = {
            "lag": "lag {}",
            "max_staleness": "staleness {}",
            "update": "after {} updates",
            "prefixes": "{} prefixes",
            "candidates": "{} candidates",
        }
        return words.get(key, "{}").format(value)

    def number(x: float) -> str:
        return (
            f"{100 * x:.0f} %"
            if c.metric == "accuracy"
            else f"{x:.2g}"
            if x >= 1e6
            else f"{x:,.0f}"
            if x >= 100
            else f"{x:.3g}"
        )

    keys = CELL[c.study]
    shared = ", ".join(name(key, x) for key, x, y in zip(keys, c.a, c.b) if x == y)
    a, b = (
        ", ".join(name(key, x) for key, x, y in zip(keys, cell, other) if x != y)
        for cell, other in ((c.a, c.b), (c.b, c.a))
    )
    three = (result.mean, result.low, result.high)
    if c.ratio:
        unit, (mean, low, high) = "x", (f"{x:.2f}" if x < 10 else f"{x:,.0f}" for x in three)
    else:
        unit = " points" if c.metric == "accuracy" else ""
        mean, low, high = (f"{100 * x:.1f}" if unit else f"{x:.2g}" for x in three)
    gap = f"{'+' if result.mean > 0 and not c.ratio else ''}{mean}{unit} [{low}, {high}]"
    ends = [
        f"{number(mean)} ({number(worst)})"
        for mean, worst in ((result.a, result.worst_a), (result.b, result.worst_b))
    ]
    return (
        f"{MARKS[result.answer]} {shared}: {a} {ends[0]}, {b} {ends[1]}; "
        f"{gap}, {result.wins}/{result.seeds}"
    )


def verdict(answers: list[str]) -> str:
    """`answers`: a key of MARKS for every comparison of a claim."""
    made = [answer for answer in answers if answer != "not run"]
    if not made:
        return "**not run yet**"
    if len(made) < len(answers):
        return f"{verdict(made)} so far; {len(answers) - len(made)} not run"
    found = set(answers)
    counts = ", ".join(f"{answers.count(x)} {x}" for x in MARKS if x in found)
    if len(found) == 1:
        alone = {
            "yes": "**holds**",
            "leans": "**leans**",
            "no": "**does not hold here**",
            "collapse": "**collapse**",
        }
        if answers[0] in alone:
            return alone[answers[0]]
    if found == {"yes", "leans"}:
        return f"**leans** ({counts})"
    if found & {"yes", "leans"}:
        return f"**holds in part** ({counts})"
    is_refuted = found & {"no", "leans to no"}
    return f"**{'does not hold here' if is_refuted else 'not decided'}** ({counts})"


def row(number: int, lines: dict[str, list[dict]]) -> str:
    """A line of the Markdown table."""
    claim = CLAIMS[number - 1]
    answers, measured = [], []
    for c in claim.comparisons:
        values = cells(c.study, lines[c.study], c.metric)
        if c.a in values and c.b in values:
            result = compare(c, values)
            answers.append(result.answer)
            measured.append(describe(c, result))
        else:
            answers.append("not run")
    fields = [claim.text, verdict(answers), "<br>".join(measured)]
    return f'| <a id="claim-{number}"></a>{number} | {" | ".join(fields)} |'


def table(numbers: list[int], lines: dict[str, list[dict]]) -> str:
    head = "| | claim | verdict | measured |\n|---|---|---|---|"
    return "\n".join([head, *(row(number, lines) for number in numbers)])


def tables(results: Path) -> dict[str, str]:
    """Name of a marker of the page -> the Markdown table that belongs there."""
    lines = {name: study.read(results / f"{name}.csv") for name, study in STUDIES.items()}
    lines["two_by_two"] += two_by_two.both(results)
    noise = real_model.read(results / "real_model.csv")
    lags = list(dict.fromkeys(f"lag {line['lag']}" for line in noise))
    head = f"| 32 candidates | {' | '.join(lags)} |\n|{'---|' * (len(lags) + 1)}\n"
    return {
        "claims": table(list(range(1, len(CLAIMS) + 1)), lines),
        "training": real_curves.table(lines["real_curves"], real_curves.METHODS),
        "guesses": top_k.table(top_k.read(results / "top_k.csv")),
        "errors": other_estimators.table(other_estimators.read(results / "other_estimators.csv")),
        "forms": staleness.table_of_forms(lines["staleness"]),
        "hard": staleness.table_of_hard(lines["staleness"]),
        "learning rate": learning_rate.table(learning_rate.read(results / "learning_rate.csv")),
        "two by two": two_by_two.table(lines["two_by_two"], "toy"),
        "real forms": real_curves.table(lines["real_curves"], real_curves.FORMS),
        **{space: head + real_model.table(noise, space) for space in ("logits", "parameters")},
    }


def fill(pages: list[str], tables: dict[str, str]) -> list[str]:
    """The pages with these tables between their markers, each in one page."""
    for name, text in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if [sum(page.count(x) for page in pages) for x in (begin, end)] != [1, 1]:
            sys.exit(f"one page needs one {begin.strip()} and one {end}: add them")
        (i,) = (i for i, page in enumerate(pages) if begin in page)
        before, after = pages[i].split(begin)
        pages[i] = before + begin + text + "\n" + end + after.split(end)[1]
    return pages


def rerun(number: int) -> dict[str, list[dict]]:
    """The runs that a claim needs, made again."""
    lines = {}
    for study in {c.study for c in CLAIMS[number - 1].comparisons}:
        wanted = [
            cell for c in CLAIMS[number - 1].comparisons if c.study == study for cell in (c.a, c.b)
        ]
        lines[study] = STUDIES[study].make(
            RUNS / f"claim_{number}_{study}.csv",
            STUDIES[study].jobs_for(wanted, range(ENOUGH)),
        )
        if study == "two_by_two":  # these runs are made with fresh and old in turn, not with both
            lines[study] += two_by_two.both()
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rerun",
        type=int,
        choices=range(1, len(CLAIMS) + 1),
        metavar="N",
        help="make the runs of claim N again, in runs/claim_N_*.csv (continued if it exists)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the CSVs")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=PAGES, help="whose tables are written anew"
    )
    args = parser.parse_args()
    if args.rerun:
        print(table([args.rerun], rerun(args.rerun)))
    else:
        texts = fill([page.read_text() for page in args.pages], tables(args.results))
        for page, text in zip(args.pages, texts):
            page.write_text(text)
            print(f"{page}: tables written")


if __name__ == "__main__":
    main()
