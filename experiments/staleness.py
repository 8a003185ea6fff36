"""How stale can on-policy distillation be? Accuracy and divergence against exact lag.

    python -m experiments.staleness

Every run is a `Lagged` run on the built-in task: rollouts come from the weights exactly `lag`
updates ago. The grid is starts x methods x lags x seeds; one line of the CSV per evaluation. Runs
are independent, one process each, one thread each; a CSV that exists is continued. --quick is one
start, four methods, two lags, one seed, in a CSV of its own.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from assets.task import running_sums
from experiments import study
from experiments.corrections import Corrected
from experiments.lagged import Lagged
from losses import LOSSES
from support.config import builtin
from support.data import Prompt
from support.load import load_tokenizer

VOCAB = 173
# Of the built-in prompts: the initial student gets about a third of these right.
ADDENDS = (4, 5, 6)
BASE = builtin(batch_size=32, warmup_steps=10, max_prompt_tokens=24, max_new_tokens=25, slots=32)
LAGS = (0, 2, 8, 32)
RESULTS = study.RESULTS / "staleness.csv"


@functools.cache
def task() -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, 128 evaluation prompts):
    the part of the built-in task with ADDENDS addends, the same for every seed."""
    tokenizer = load_tokenizer("--student", BASE.path("student"))
    pairs = running_sums(8000, 0, heldout=False), running_sums(1000, 12345, heldout=True)
    train, held = (
        [(text, answer) for text, answer in part if text.count("+") + 1 in ADDENDS]
        for part in pairs
    )
    return tuple(
        [Prompt(text, tokenizer(text).input_ids, answer) for text, answer in part]
        for part in (train, held[:128])
    )


def sampled(signal: str, correction: str, samples: int) -> dict:
    """Sampled reverse KL without a baseline."""
    return {"loss": f"sampled_{signal}_{correction}", "num_samples": samples}


def stratified(top_k: int, samples: int, loss: str = "stratified_reverse_kl") -> dict:
    return {"loss": loss, "top_k": top_k, "num_samples": samples}


METHODS = {  # name -> settings
    "forward KL 16": {"loss": "forward_kl", "top_k": 16},
    # Every id: exact, only the prefixes are stale.
    "dense reverse KL": {"loss": "sparse_reverse_kl", "top_k": VOCAB},
    "rollout signal": sampled("rollout", "none", 1),
    "rollout signal + IS": sampled("rollout", "is", 1),
    "rollout signal + IS, N=16": sampled("rollout", "is", 16),
    "rollout signal + IS, N=256": sampled("rollout", "is", 256),
    "current signal": sampled("current", "none", 1),
    "current signal + IS": sampled("current", "is", 1),
    "rollout signal + PPO clip": sampled("rollout", "ppo", 1),
    "decoupled": sampled("rollout", "decoupled", 1),
    "M2PO": sampled("rollout", "m2po", 1),
    "M2PO (AReaL)": sampled("rollout", "m2po_areal", 1),
    "current signal + TIS": sampled("current", "tis", 1),
    "current signal + IcePop": sampled("current", "icepop", 1),
    "current signal, N=16": sampled("current", "none", 16),
    "current signal + IS, N=4": sampled("current", "is", 4),
    "current signal + IS, N=16": sampled("current", "is", 16),
    "current signal + IS, N=32": sampled("current", "is", 32),
    "current signal + IS, N=64": sampled("current", "is", 64),
    "sparse K=16": {"loss": "sparse_reverse_kl", "top_k": 16},
    "sparse K=32": {"loss": "sparse_reverse_kl", "top_k": 32},
    "sparse K=64": {"loss": "sparse_reverse_kl", "top_k": 64},
    "stratified 12+4": stratified(12, 4),
    "stratified 28+4": stratified(28, 4),
    "stratified 60+4": stratified(60, 4),
    "stratified 16+16": stratified(16, 16),
    "stratified 16+16, no baseline": stratified(16, 16, "plain_stratified"),
    "stratified 8+8": stratified(8, 8),
    "stratified 8+8, no baseline": stratified(8, 8, "plain_stratified"),
    "sampled N=32": {"loss": "sampled_reverse_kl", "num_samples": 32},
    "top 31 + emitted (EMA-PG)": {"loss": "top_k_and_emitted", "top_k": 31},
    "4 draws, top-28 baseline (vOPD)": {"loss": "top_k_baseline", "top_k": 28, "num_samples": 4},
}
STRONG = (
    "forward KL 16",
    "dense reverse KL",
    "rollout signal",
    "rollout signal + PPO clip",
    "current signal",
    "current signal + IS",
    "current signal + IS, N=16",
    "stratified 12+4",
)
QUICK = ("forward KL 16", "rollout signal", "current signal + IS, N=16", "stratified 28+4")


def canonical(loss: str, lag: int) -> str:
    """The method whose run stands for this one.

    Without lag b = s up to rounding, so signal and correction make no difference.
    """
    if lag or loss not in METHODS or not is_corrected(METHODS[loss]):
        return loss
    stand_in = sampled("current", "is", METHODS[loss]["num_samples"])
    return next((name for name, fields in METHODS.items() if fields == stand_in), loss)


def is_corrected(fields: dict) -> bool:
    """Has the method a signal and a correction?"""
    return issubclass(LOSSES[fields["loss"]], Corrected)


@dataclass(frozen=True)
class Job:
    start: str  # "weak" or "strong"
    loss: str  # a name in METHODS
    lag: int
    seed: int


def names(job: Job) -> list[str]:
    """The methods that a run gives lines of: its own and, without lag, those it stands for."""
    return [
        name
        for name in (METHODS if job.start == "weak" else STRONG)
        if canonical(name, job.lag) == job.loss
    ] or [job.loss]


COLUMNS = (
    "start",
    "loss",
    "lag",
    "seed",
    "max_grad_norm",
    "update",
    "accuracy",
    "forward_kl",
    "reverse_kl",
    "grad_norm",
    "drift_kl",
    "support_mass_student",
)
KINDS = {"start": str, "loss": str, "lag": int, "seed": int, "update": int}


def run(arguments: tuple[Job, int, int, float]) -> list[dict]:
    """Lines of the CSV for (job, steps, every, max_grad_norm):
    one per evaluation, metrics as means since the last."""
    job, steps, every, max_grad_norm = arguments
    torch.set_num_threads(1)
    student, lr = ("builtin", 3e-4) if job.start == "weak" else (strong_student(), 1e-4)
    config = replace(
        BASE,
        student=student,
        seed=job.seed,
        steps=steps,
        lr=lr,
        max_grad_norm=max_grad_norm,
        **METHODS[job.loss],
    )
    lagged, lines, since = Lagged(config, job.lag, *task()), [], []
    for step in range(1, steps + 1):
        since.append(lagged.update())
        if step % every == 0:
            divergence = lagged.divergence()
            means = {
                key: sum(m[key] for m in since) / len(since)
                for key in ("grad_norm", "drift_kl", "support_mass_student")
            }
            lines.append(
                {
                    **vars(job),
                    "max_grad_norm": max_grad_norm,
                    "update": step,
                    "accuracy": lagged.accuracy(),
                    **vars(divergence),
                    **means,
                }
            )
            since = []
    return [{**line, "loss": name} for name in names(job) for line in lines]


def strong_student(target: float = 0.9) -> str:
    """The built-in student after synchronous forward KL up to `target` accuracy;
    made once, by the first process that needs it, deterministic."""
    directory = study.RUNS / "strong_student"
    directory.parent.mkdir(exist_ok=True)
    with open(directory.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "config.json").exists():
            lagged = Lagged(
                replace(BASE, lr=1e-3, seed=1000, steps=400, **METHODS["forward KL 16"]), 0, *task()
            )
            while lagged.accuracy() < target:
                for _ in range(5):
                    lagged.update()
            lagged.save(partial := directory.with_suffix(".partial"))
            partial.rename(directory)
    return str(directory)


def grid(starts, losses, lags, seeds) -> list[Job]:
    """Jobs, seed by seed, so that a study that is stopped early has whole seeds; none twice.

    From the strong student only the methods in STRONG, without the smallest lag.
    """
    cells = [
        (start, loss, lag)
        for start in starts
        for lag in lags
        for loss in losses
        if start == "weak" or loss in STRONG and lag != 2
    ]
    return jobs_for(cells, range(seeds))


def jobs_for(cells: list[tuple], seeds: range) -> list[Job]:
    """Jobs that give the lines of some (start, loss, lag)."""
    return list(
        dict.fromkeys(
            Job(start, canonical(loss, lag), lag, seed)
            for seed in seeds
            for start, loss, lag in cells
        )
    )


def read(path: Path) -> list[dict]:
    return study.read(path, COLUMNS, KINDS)


def summary(lines: list[dict]) -> str:
    """A line per start and loss: mean accuracy over seeds at the last evaluation, lag by lag."""
    last, groups = max(line["update"] for line in lines), {}
    for line in sorted(lines, key=lambda line: line["lag"]):
        if line["update"] == last:
            lags = groups.setdefault((line["start"], line["loss"]), {})
            lags.setdefault(line["lag"], []).append(line["accuracy"])
    return "\n".join(
        f"{start:6s} {loss:26s} "
        + "  ".join(f"lag {lag}: {sum(values) / len(values):5.1%}" for lag, values in lags.items())
        for (start, loss), lags in groups.items()
    )


def make(
    path: Path,
    jobs: list[Job],
    steps: int = 80,
    every: int = 20,
    max_grad_norm: float = BASE.max_grad_norm,
    workers: int = 0,
) -> list[dict]:
    """Append the lines of those `jobs` that the CSV does not hold; all its lines."""
    updates = list(range(every, steps + 1, every))

    def missing(lines: list[dict]) -> list[tuple]:
        held: dict[Job, list[int]] = {}
        for line in lines:
            job = Job(line["start"], line["loss"], line["lag"], line["seed"])
            held.setdefault(job, []).append(line["update"])
        for others in held.values():
            if others != updates[: len(others)]:
                sys.exit(
                    f"{path} holds evaluations after {others} updates, these are {updates}: "
                    "give another --out"
                )
        if others := {line["max_grad_norm"] for line in lines} - {max_grad_norm}:
            sys.exit(
                f"{path} holds runs with --max-grad-norm {max(others):g}, "
                f"this is {max_grad_norm:g}: give another --out"
            )
        left = [
            job
            for job in jobs
            if any(held.get(replace(job, loss=name)) != updates for name in names(job))
        ]
        return [(job, steps, every, max_grad_norm) for job in left]

    return study.complete(path, COLUMNS, KINDS, read, missing, run, workers)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=(
            "CSV, continued if it exists; default experiments/results/staleness.csv, "
            "with --quick runs/staleness_quick.csv"
        ),
    )
    parser.add_argument(
        "--quick", action="store_true", help="two minutes: the main effect, one seed"
    )
    parser.add_argument("--seeds", type=study.at_least(1), default=5)
    parser.add_argument("--steps", type=study.at_least(1), default=80, help="updates of a run")
    parser.add_argument(
        "--every", type=study.at_least(1), default=20, help="updates between evaluations"
    )
    parser.add_argument("--lags", type=study.at_least(0), nargs="+", default=LAGS)
    parser.add_argument("--losses", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--starts", nargs="+", choices=("weak", "strong"), default=["weak", "strong"]
    )
    parser.add_argument(
        "--max-grad-norm",
        type=study.at_least(1e-12, float),
        default=BASE.max_grad_norm,
        help="1e9: no clipping",
    )
    parser.add_argument(
        "--workers", type=study.at_least(0), default=0, help="processes; 0 is one per core"
    )
    args = parser.parse_args()
    if args.quick:
        args.starts, args.losses, args.lags, args.seeds = ["weak"], list(QUICK), (0, 8), 1
    jobs = grid(args.starts, args.losses, args.lags, args.seeds)
    if not jobs:
        parser.error(
            f"nothing to run: from the strong student only {', '.join(STRONG)}, without lag 2"
        )
    if args.steps % args.every:
        parser.error(
            f"--steps {args.steps} with --every {args.every}: "
            "--steps must be a multiple, for the last evaluation"
        )
    out = args.out or (study.RUNS / "staleness_quick.csv" if args.quick else RESULTS)
    lines = make(out, jobs, args.steps, args.every, args.max_grad_norm, args.workers)
    asked = {"start": args.starts, "loss": args.losses, "lag": args.lags, "seed": range(args.seeds)}
    print(
        summary(
            [line for line in lines if all(line[key] in values for key, values in asked.items())]
        )
    )


if __name__ == "__main__":
    main()
