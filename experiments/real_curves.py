"""Training curves of six methods on a real model: `python -m experiments.real_curves`.

The task is that of experiments/heal.py: SmolLM2 without six of its layers learns from the whole
model. A run makes few and small updates: three seeds took two hours on two cores, with other work
beside them. Rollouts come from the weights of exactly `lag` updates ago (in the first `lag`
updates: from the damaged model). A line of the CSV per evaluation: exact KLs on one fresh rollout
of each held-out prompt, and means of the run's metrics since the evaluation before. A CSV that
exists is continued.
"""

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import experiments.corrections  # they add to losses.LOSSES
import experiments.jeffreys_kl  # noqa: F401
from experiments import heal, study
from experiments.lagged import Lagged
from support.config import builtin
from support.data import read_jsonl
from support.load import load_tokenizer

METHODS = {  # name -> settings
    "forward KL 32": {"loss": "forward_kl", "top_k": 32},
    "32 draws": {"loss": "sampled_reverse_kl", "num_samples": 32},
    "32 draws, rollout signal, no ratio": {"loss": "sampled_rollout_none", "num_samples": 32},
    "truncated K=32": {"loss": "truncated_reverse_kl", "top_k": 32},
    "renormalised K=32": {"loss": "renormalised_top_k", "top_k": 32},
    "bucket K=32": {"loss": "bucket_top_k", "top_k": 32},
    "edge K=32": {"loss": "sparse_reverse_kl", "top_k": 32},
    "forward KL + bucket 32": {"loss": "bucket_forward_kl", "top_k": 32},
    "stratified 28+4": {"loss": "stratified_reverse_kl", "top_k": 28, "num_samples": 4},
    "stratified 16+16": {"loss": "stratified_reverse_kl", "top_k": 16, "num_samples": 16},
    "Jeffreys 16+16": {"loss": "jeffreys_kl", "top_k": 16, "num_samples": 16},
}
ONLY_UNDER_LAG = "32 draws, rollout signal, no ratio"  # without lag neither matters
FORMS = [name for name in METHODS if "K=32" in name or "forward" in name] + ["stratified 16+16"]
LAGS = (0, 8, 40)
STEPS = 24  # updates of a run
EVERY = 8  # updates between evaluations
BASE = builtin(
    batch_size=8,
    slots=8,
    lr=2e-4,
    warmup_steps=5,
    max_prompt_tokens=64,
    max_new_tokens=32,
    micro_batch_tokens=1024,
    head_chunk=256,
)
KINDS = {"loss": str, "lag": int, "seed": int, "update": int}
# Of the run; empty before the first update.
METRICS = ("train_loss", "drift_k3", "support_mass_student")
COLUMNS = (*KINDS, "reverse_kl", "forward_kl", *METRICS)
RESULTS = study.RESULTS / "real_curves.csv"
MODELS = study.RUNS / "heal"  # what heal.prepare writes


@dataclass(frozen=True)
class Job:
    loss: str
    lag: int
    seed: int
    models: Path


def setting(models: Path, loss: str, seed: int):
    """(options, prompts, held-out prompts) of a run with what heal.prepare wrote to `models`."""
    paths = {role: str(models / role) for role in ("student", "teacher")}
    config = replace(BASE, **paths, seed=seed, steps=STEPS, **METHODS[loss])
    tokenizer = load_tokenizer("--student", config.student)
    parts = [
        read_jsonl(str(models / name), tokenizer, BASE.max_prompt_tokens)
        for name in ("prompts.jsonl", "held_out.jsonl")
    ]
    return config, *parts


def run(job: Job) -> list[dict]:
    """Lines of the CSV for one run."""
    torch.set_num_threads(1)
    config, prompts, held_out = setting(job.models, job.loss, job.seed)
    lagged = Lagged(config, job.lag, prompts, held_out)
    since = []  # metrics of the updates since the last evaluation
    lines = [dict.fromkeys(METRICS)]
    divergences = [lagged.divergence()]
    for step in range(1, STEPS + 1):
        metrics = lagged.update()
        since.append(metrics | {"train_loss": metrics["loss"]})
        if step % EVERY == 0:
            lines.append({key: statistics.mean(m[key] for m in since) for key in METRICS})
            divergences.append(lagged.divergence())
            since = []
    cell = {"loss": job.loss, "lag": job.lag, "seed": job.seed}
    return [
        {**cell, "update": EVERY * i, **vars(kl), **line}
        for i, (kl, line) in enumerate(zip(divergences, lines))
    ]


def read(path: Path) -> list[dict]:
    return study.read(path, COLUMNS, KINDS, optional=METRICS)


def jobs_for(cells: list[tuple], seeds: range, models: Path = MODELS) -> list[Job]:
    """Jobs that give the lines of some (loss, lag, update), seed by seed, none twice."""
    return list(
        dict.fromkeys(Job(loss, lag, seed, models) for seed in seeds for loss, lag, _ in cells)
    )


def make(path: Path, jobs: list[Job], workers: int = 0) -> list[dict]:
    """Append the lines of those `jobs` that the CSV does not hold; all its lines."""
    heal.prepare(jobs[0].models)

    def missing(lines: list[dict]) -> list[Job]:
        held = {
            (line["loss"], line["lag"], line["seed"]) for line in lines if line["update"] == STEPS
        }
        return [job for job in jobs if (job.loss, job.lag, job.seed) not in held]

    return study.complete(path, COLUMNS, KINDS, read, missing, run, workers)


def summary(lines: list[dict]) -> str:
    """A line per loss and lag: mean exact reverse KL over seeds, evaluation by evaluation, and its
    spread at the end.
    """
    rows = []
    updates = range(0, STEPS + 1, EVERY)
    for lag in sorted({line["lag"] for line in lines}):
        times = ", ".join(map(str, updates))
        rows.append(f"lag {lag}: held-out reverse KL, nats a token, after {times} updates")
        for loss in dict.fromkeys(line["loss"] for line in lines if line["lag"] == lag):
            seeds = [of_seeds(lines, loss, lag, update) for update in updates]
            means = "  ".join(f"{statistics.mean(values):.3f}" for values in seeds)
            last = seeds[-1]
            rows.append(
                f"  {loss:36s} {means}   ({min(last):.3f} to {max(last):.3f}, {len(last)} seeds)"
            )
    return "\n".join(rows)


def of_seeds(lines: list[dict], loss: str, lag: int, update: int) -> list[float]:
    """Held-out reverse KL of every seed."""
    cell = (loss, lag, update)
    return [
        line["reverse_kl"] for line in lines if (line["loss"], line["lag"], line["update"]) == cell
    ]


def table(lines: list[dict], losses) -> str:
    """Markdown: held-out reverse KL after the last update, a row for every one of `losses` that was
    run: mean over seeds, lowest and highest seed.
    """
    lines = [line for line in lines if line["loss"] in losses]
    lags = sorted({line["lag"] for line in lines})
    rows = [f"| loss | {' | '.join(f'lag {lag}' for lag in lags)} |", "|---|" + "---|" * len(lags)]
    for loss in dict.fromkeys(line["loss"] for line in lines):
        cells = []
        for lag in lags:
            ends = of_seeds(lines, loss, lag, STEPS)
            if ends:
                cells.append(f"{statistics.mean(ends):.2f} ({min(ends):.2f} to {max(ends):.2f})")
            else:
                cells.append("as 32 draws" if loss == ONLY_UNDER_LAG and lag == 0 else "not run")
        rows.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.real_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--heal",
        type=Path,
        default=MODELS,
        help="the --out of experiments.heal; the models are written if they are not there",
    )
    parser.add_argument("--seeds", type=study.at_least(1), default=3)
    parser.add_argument("--lags", type=study.at_least(0), nargs="+", default=LAGS)
    parser.add_argument("--losses", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV, continued if it exists")
    parser.add_argument(
        "--workers",
        type=study.at_least(0),
        default=0,
        help="processes of up to 8 GB; 0 is one per core",
    )
    args = parser.parse_args()
    cells = [
        (loss, lag, STEPS)
        for lag in args.lags
        for loss in args.losses
        if lag or loss != ONLY_UNDER_LAG
    ]
    lines = make(args.out, jobs_for(cells, range(args.seeds), args.heal), args.workers)
    print(summary(lines), table(lines, args.losses), sep="\n\n")


if __name__ == "__main__":
    main()
