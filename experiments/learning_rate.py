"""Is there a law for learning rate and lag? `python -m experiments.learning_rate`

Descent on a quadratic of curvature h with a gradient that is `lag` updates old is stable as long as
lr h (2 lag + 1) is below about pi. If that is what limits asynchronous distillation, runs with
equal lr (2 lag + 1) lose equally much. Adam normalises its steps, so lr is a distance here, and h
is what it is for the loss. The study makes a run for every loss, rate, lag and seed, on the toy
task of staleness.py: 80 updates from the weak student.

A line of the CSV per run. A CSV that exists is continued.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import staleness, study
from experiments.lagged import Lagged

LOSSES = ("forward KL 16", "edge K=16", "stratified 16+16", "current signal + IS")
RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
SEEDS, STEPS = 3, 80
METRICS = ("grad_norm", "drift_kl", "ess")
KINDS = {"loss": str, "lag": int, "lr": float, "seed": int}
COLUMNS = (*KINDS, "accuracy", "reverse_kl", "forward_kl", *METRICS)
RESULTS = study.RESULTS / "learning_rate.csv"


@dataclass(frozen=True)
class Job:
    loss: str
    lag: int
    lr: float
    seed: int


def run(job: Job) -> list[dict]:
    """The CSV's one line of a run: what it ends with, metrics as means over the run."""
    torch.set_num_threads(1)
    config = staleness.setting("weak", job.loss, job.seed, STEPS, lr=job.lr)
    lagged = Lagged(config, job.lag, *staleness.task())
    try:
        (end,) = lagged.curve(STEPS, STEPS, METRICS)
    except FloatingPointError:  # the gradient is not finite: as bad as can be
        end = dict.fromkeys(COLUMNS, float("inf")) | {"accuracy": 0.0}
    line = end | vars(job)
    return [{key: line[key] for key in COLUMNS}]


def read(path: Path) -> list[dict]:
    return study.read(path, COLUMNS, KINDS)


def jobs() -> list[Job]:
    """Seed by seed."""
    return [
        Job(loss, lag, lr, seed)
        for seed in range(SEEDS)
        for lag in staleness.LAGS
        for loss in LOSSES
        for lr in RATES
    ]


def make(path: Path, jobs: list[Job], workers: int = 0) -> list[dict]:
    """Append the lines of those `jobs` that the CSV does not hold; all its lines."""

    def missing(lines: list[dict]) -> list[Job]:
        held = {tuple(line[key] for key in KINDS) for line in lines}
        return [job for job in jobs if tuple(vars(job).values()) not in held]

    return study.complete(path, COLUMNS, KINDS, read, missing, run, workers)


def table(lines: list[dict]) -> str:
    """Markdown: accuracy in percent after the last update, mean (lowest) of the seeds."""
    head = " | ".join(f"lag {lag}" for lag in staleness.LAGS)
    rows = [f"| loss | lr | {head} |", "|---|---|" + "---|" * len(staleness.LAGS)]
    for loss in LOSSES:
        for lr in RATES:
            cells = [
                [x["accuracy"] for x in lines if (x["loss"], x["lr"], x["lag"]) == cell]
                for cell in ((loss, lr, lag) for lag in staleness.LAGS)
            ]
            words = [
                f"{100 * statistics.mean(cell):.0f} ({100 * min(cell):.0f})" if cell else "-"
                for cell in cells
            ]
            rows.append(f"| {loss} | {lr:g} | {' | '.join(words)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.learning_rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV, continued if it exists")
    parser.add_argument("--workers", type=study.at_least(0), default=0, help="0: one per core")
    args = parser.parse_args()
    print(table(make(args.out, jobs(), args.workers)))


if __name__ == "__main__":
    main()
