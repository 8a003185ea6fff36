"""What the paper claims and what was measured here: the table of docs/staleness.md, `python -m experiments.claims`.

A claim is a list of comparisons; each compares two cells of a study seed by seed. A comparison holds if it does in at least
4 of 5 seeds, or if the 95 % interval of the mean difference (Student's t over seeds) lies above its bar. A claim holds if all
its comparisons do, in part if some do. `--rerun N` makes the runs of claim N again, in a CSV of its own, and judges those.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments import estimators, frontier, staleness

STUDIES = {"staleness": staleness, "estimators": estimators, "frontier": frontier}
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # two-sided, by degrees of freedom from 0
CELL = {"staleness": ("start", "loss", "lag"), "estimators": ("estimator", "lag"), "frontier": ("loss", "order", "max_staleness")}
LOWER_IS_BETTER = ("reverse_kl", "bias", "seconds_to_90", "error_1000", "error_1000000")
SEEDS = range(5)


@dataclass(frozen=True)
class Comparison:
    """Cell `a` is better than cell `b` by more than `least`: the difference of a metric or, for positive ones, the ratio."""

    study: str
    metric: str
    a: tuple
    b: tuple
    least: float = 0.0
    ratio: bool = False


@dataclass(frozen=True)
class Claim:
    text: str
    comparisons: list[Comparison]


@dataclass(frozen=True)
class Result:
    """Means of both cells; mean difference (ratio) with its 95 % interval; in how many seeds it is above the bar."""

    a: float
    b: float
    mean: float
    low: float
    high: float
    wins: int
    seeds: int
    answer: str  # "yes", "no": the opposite holds, "open": neither


def cells(study: str, lines: list[dict], metric: str) -> dict[tuple, dict[int, float]]:
    """cell -> seed -> the metric: at a run's last evaluation, the mean over an estimator's snapshots."""
    if study == "staleness":
        last = max(line["update"] for line in lines)
        lines = [line for line in lines if line["update"] == last]
    found: dict[tuple, dict[int, list[float]]] = {}
    for line in lines:
        found.setdefault(tuple(line[key] for key in CELL[study]), {}).setdefault(line["seed"], []).append(line[metric])
    return {cell: {seed: statistics.mean(values) for seed, values in seeds.items()} for cell, seeds in found.items()}


def compare(c: Comparison, values: dict[tuple, dict[int, float]]) -> Result:
    a, b = values[c.a], values[c.b]
    seeds = sorted(a.keys() & b.keys())
    into, back = (math.log, math.exp) if c.ratio else (float, float)
    sign = -1 if c.metric in LOWER_IS_BETTER else 1
    differences = [sign * (into(a[seed]) - into(b[seed])) for seed in seeds]
    mean, bar = statistics.mean(differences), into(c.least)
    half = T95[len(seeds) - 1] * statistics.stdev(differences) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.inf
    wins, losses = sum(difference > bar for difference in differences), sum(difference < bar for difference in differences)
    most = max(0.8 * len(seeds), 4)
    answer = "yes" if wins >= most or mean - half > bar else "no" if losses >= most or mean + half < bar else "open"
    means = (statistics.mean(cell[seed] for seed in seeds) for cell in (a, b))
    return Result(*means, back(mean), back(mean - half), back(mean + half), wins, len(seeds), answer)


def at_lags(a: str, b: str, lags=(8, 32), starts=("weak",), **more) -> list[Comparison]:
    """Loss a is better than loss b at the same lag."""
    more = {"metric": "accuracy", **more}
    return [Comparison("staleness", a=(start, a, lag), b=(start, b, lag), **more) for start in starts for lag in lags]


def with_and_without_lag(loss: str, lags=(2, 8, 32), starts=("weak", "strong"), worse: bool = False) -> list[Comparison]:
    """A lag costs at most five points of accuracy or, if `worse`, more."""
    lagged = [((start, loss, lag), (start, loss, 0)) for start in starts for lag in lags if start == "weak" or lag != 2]
    return [Comparison("staleness", "accuracy", *((b, a, 0.05) if worse else (a, b, -0.05))) for a, b in lagged]


def smaller(metric: str, a: str, b: str, lags=(8, 32), times: float = 1.0) -> list[Comparison]:
    """An estimator's bias or error is smaller than another's, by a factor of more than `times`."""
    return [Comparison("estimators", metric, (a, lag), (b, lag), times, ratio=True) for lag in lags]


SAMPLED, STRATIFIED = ("current signal + IS, N=16", "current signal + IS, N=32", "current signal + IS, N=64"), ("stratified 12+4", "stratified 28+4", "stratified 60+4")
CLAIMS = [
    # of the paper
    Claim("Teacher-weighted forward KL is robust to stale rollouts: it loses at most 5 points", with_and_without_lag("forward KL 16")),
    Claim("Student-weighted reverse KL as stale RL does it (signal of the rollout, one sample) is not: it loses more than 5 points",
          with_and_without_lag("rollout signal", worse=True)),
    Claim("Recomputing the signal with the current student repairs it. The paper's surrogate keeps the importance ratio: better than the rollout's signal with the same ratio",
          at_lags("current signal + IS", "rollout signal + IS", (2, 8, 32))),
    Claim("... and without the ratio: better than the rollout's signal", at_lags("current signal", "rollout signal", (2, 8, 32), ("weak",)) + at_lags("current signal", "rollout signal", (8, 32), ("strong",))),
    Claim("Methods that stabilise asynchronous RL (PPO clip, decoupled, M2PO) do not improve over recomputing, at one sample each",
          [c for method in ("rollout signal + PPO clip", "decoupled", "M2PO") for c in at_lags("current signal + IS", method)]),
    Claim("A sparse top-K cache is biased and sampling is not: bias below a hundredth of sparse top-K's at the same number of candidates",
          [c for k in (16, 32, 64) for c in smaller("bias", f"current signal + IS, N={k}", f"sparse K={k}", times=100)]),
    Claim("Sparse top-K has the smaller variance: smaller error for one small batch (1,000 tokens)",
          [c for k in (16, 32, 64) for c in smaller("error_1000", f"sparse K={k}", f"current signal + IS, N={k}")]),
    Claim("Several Monte Carlo samples tame the variance of one: N = 16 is better than N = 1", at_lags("current signal + IS, N=16", "current signal + IS", (0, 2, 8, 32))),
    Claim("Asynchronous training reaches 1.6 to 3.8 times the throughput of synchronous training: at least 1.6 times",
          [Comparison("frontier", "tokens_per_second", (loss, order, 1), (loss, "batch", 0), 1.6, ratio=True) for loss in frontier.LOSSES for order in ("batch", "arrival")]),
    Claim("... at equal accuracy: at most 5 points less, after the same updates",
          [Comparison("frontier", "accuracy", (loss, order, 1), (loss, "batch", 0), -0.05) for loss in frontier.LOSSES for order in ("batch", "arrival")]),
    # of this project
    Claim("What staleness hurts is the sampling, not the direction of the KL: reverse KL over the whole vocabulary loses at most 5 points", with_and_without_lag("dense reverse KL")),
    Claim("Recomputing alone does not save one-sample reverse KL: it loses more than 5 points", with_and_without_lag("current signal", worse=True)),
    Claim("... and more samples do not help where the weights are missing (N = 16 without)", with_and_without_lag("current signal, N=16", starts=("weak",), worse=True)),
    Claim("With importance weights and N = 16 it loses at most 5 points", with_and_without_lag("current signal + IS, N=16")),
    Claim("At one sample PPO clip is better than importance weights", at_lags("rollout signal + PPO clip", "current signal + IS")),
    Claim("At equal candidate count stratified is nearer to the teacher than sampled: smaller reverse KL",
          [c for a, b in zip(STRATIFIED, SAMPLED) for c in at_lags(a, b, metric="reverse_kl", least=1.0, ratio=True)]),
    Claim("... and its gradient has the smaller error, for a million tokens",
          [c for a, b in zip(STRATIFIED, SAMPLED) for c in smaller("error_1000000", a, b)]),
    Claim("Stratified reaches the dense oracle: its reverse KL is at most a tenth higher",
          [c for a in STRATIFIED for c in at_lags(a, "dense reverse KL", metric="reverse_kl", least=1 / 1.1, ratio=True)]),
    Claim("Stratified is never worse than sparse top-K at equal candidate count: smaller reverse KL",
          [c for a, k in zip(STRATIFIED, (16, 32, 64)) for c in at_lags(a, f"sparse K={k}", metric="reverse_kl", least=1.0, ratio=True)]),
    Claim("More lag is not always worse: 32 updates are better than 8", [Comparison("staleness", "accuracy", ("weak", loss, 32), ("weak", loss, 8)) for loss in ("rollout signal", "current signal", "sparse K=32")]),
]


def describe(c: Comparison, result: Result) -> str:
    """One comparison in words: what both cells share, what tells them apart, the difference."""
    def name(key, value):
        return f"lag {value}" if key == "lag" else f"--max-staleness {value}" if key == "max_staleness" else f"{value} start" if key == "start" else str(value)  # fmt: skip

    def number(x):
        return f"{100 * x:.0f} %" if c.metric == "accuracy" else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    keys = CELL[c.study]
    shared = ", ".join(name(key, x) for key, x, y in zip(keys, c.a, c.b) if x == y)
    a, b = (", ".join(name(key, x) for key, x, y in zip(keys, cell, other) if x != y) for cell, other in ((c.a, c.b), (c.b, c.a)))
    if c.ratio:
        gap = f"{result.mean:.2f}x [{result.low:.2f}, {result.high:.2f}]"
    else:
        scale, unit = (100, " points") if c.metric == "accuracy" else (1, "")
        gap = f"{scale * result.mean:+.3g}{unit} [{scale * result.low:.3g}, {scale * result.high:.3g}]"
    return f"{result.answer}: {shared}: {a} {number(result.a)}, {b} {number(result.b)}; {gap}, {result.wins}/{result.seeds}"


def verdict(results: list[Result]) -> str:
    held = [result.answer == "yes" for result in results]
    return "holds" if all(held) else "holds in part" if any(held) else "does not hold here"


def row(number: int, lines: dict[str, list[dict]]) -> str:
    """A line of the Markdown table."""
    claim = CLAIMS[number - 1]
    results = [compare(c, cells(c.study, lines[c.study], c.metric)) for c in claim.comparisons]
    measured = "<br>".join(describe(c, result) for c, result in zip(claim.comparisons, results))
    return f"| {number} | {claim.text} | {measured} | **{verdict(results)}** | `python -m experiments.claims --rerun {number}` |"


def table(numbers: list[int], lines: dict[str, list[dict]]) -> str:
    head = "| | claim | measured | verdict | command |\n|---|---|---|---|---|"
    return "\n".join([head, *(row(number, lines) for number in numbers)])


def rerun(number: int) -> dict[str, list[dict]]:
    """The runs that a claim needs, made again."""
    lines = {}
    for study in {c.study for c in CLAIMS[number - 1].comparisons}:
        wanted = {cell for c in CLAIMS[number - 1].comparisons if c.study == study for cell in (c.a, c.b)}
        lines[study] = STUDIES[study].study(Path(f"runs/claim_{number}_{study}.csv"), STUDIES[study].jobs_for(wanted, SEEDS))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rerun", type=int, choices=range(1, len(CLAIMS) + 1), metavar="N", help="make the runs of claim N again")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    args = parser.parse_args()
    if args.rerun:
        print(table([args.rerun], rerun(args.rerun)))
    else:
        lines = {name: study.read(args.results / f"{name}.csv") for name, study in STUDIES.items()}
        print(table(list(range(1, len(CLAIMS) + 1)), lines))


if __name__ == "__main__":
    main()
