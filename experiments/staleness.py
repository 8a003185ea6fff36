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
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from assets.task import running_sums
import experiments.jeffreys_kl  # noqa: F401  it adds to losses.LOSSES
from experiments import study
from experiments.corrections import Corrected
from experiments.lagged import Lagged
from losses import LOSSES
from support.config import Config, builtin
from support.data import Prompt
from support.load import load_tokenizer

VOCAB = 173
# Of the built-in prompts: the initial student gets about a third of these right.
ADDENDS = (4, 5, 6)
ALL_ADDENDS = tuple(range(2, 9))  # of the built-in task itself
BASE = builtin(batch_size=32, warmup_steps=10, max_prompt_tokens=24, max_new_tokens=25, slots=32)
LAGS = (0, 2, 8, 32)
RESULTS = study.RESULTS / "staleness.csv"


@functools.cache
def task(addends: tuple[int, ...] = ADDENDS) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, 128 evaluation prompts): the part of the built-in task with so many
    addends, the same for every seed."""
    tokenizer = load_tokenizer("--student", BASE.path("student"))
    pairs = running_sums(8000, 0, heldout=False), running_sums(1000, 12345, heldout=True)
    train, held = (
        [(text, answer) for text, answer in part if text.count("+") + 1 in addends]
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
    "dense reverse KL": {"loss": "truncated_reverse_kl", "top_k": VOCAB},
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
    "truncated K=16": {"loss": "truncated_reverse_kl", "top_k": 16},
    "truncated K=32": {"loss": "truncated_reverse_kl", "top_k": 32},
    "truncated K=64": {"loss": "truncated_reverse_kl", "top_k": 64},
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
TOP_K = {  # forms of reverse KL over the sampler's top K (docs/topk.md)
    "truncated": "truncated_reverse_kl",
    "score": "score_top_k",
    "centred": "centred_top_k",
    "renormalised": "renormalised_top_k",
    "bucket": "bucket_top_k",
    "edge": "sparse_reverse_kl",
}
TOP_K_SIZES = (8, 16, 32, 64)
METHODS |= {
    f"{form} K={k}": {"loss": loss, "top_k": k} for k in TOP_K_SIZES for form, loss in TOP_K.items()
}
METHODS |= {
    "forward KL 8": {"loss": "forward_kl", "top_k": 8},
    "forward KL + bucket 8": {"loss": "bucket_forward_kl", "top_k": 8},
    "forward KL + bucket 16": {"loss": "bucket_forward_kl", "top_k": 16},
    "halfway K=32": {"loss": "halfway_top_k", "top_k": 32},
    "current signal + PPO clip": sampled("current", "ppo", 1),
    "Jeffreys 28+4": stratified(28, 4, "jeffreys_kl"),
    "Jeffreys 16+16": stratified(16, 16, "jeffreys_kl"),
}
LATE = {  # not studied at a lag of 2
    *(f"{form} K={k}" for k in TOP_K_SIZES for form in TOP_K if form != "truncated" or k == 8),
    "forward KL 8",
    "forward KL + bucket 8",
    "forward KL + bucket 16",
    "halfway K=32",
    "Jeffreys 28+4",
    "Jeffreys 16+16",
}
NOISY = {  # ten seeds
    "rollout signal",
    "rollout signal + IS",
    "current signal",
    "current signal + IS",
    "rollout signal + PPO clip",
    "current signal + PPO clip",
    "decoupled",
    "M2PO",
    "M2PO (AReaL)",
    "current signal + TIS",
    "current signal + IcePop",
    "truncated K=32",
}
SEEDS = 5
STARTS = ("weak", "strong", "hard")
HARD = (  # on the whole task, at its own learning rate
    "truncated K=32",
    "renormalised K=32",
    "bucket K=32",
    "halfway K=32",
    "edge K=32",
    "stratified 16+16",
)
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


def is_top_k(fields: dict) -> bool:
    """Is it reverse KL over a top K, without draws?"""
    return fields["loss"] in TOP_K.values()


@dataclass(frozen=True)
class Job:
    start: str  # "weak", "strong" or "hard"
    loss: str  # a name in METHODS
    lag: int
    seed: int


def names(job: Job) -> list[str]:
    """The methods that a run gives lines of: its own and, without lag, those it stands for."""
    return [
        name
        for name in {"weak": METHODS, "strong": STRONG, "hard": HARD}[job.start]
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


def setting(start: str, loss: str, seed: int, steps: int, **more) -> Config:
    """The options of a run."""
    fields = {"seed": seed, "steps": steps, **METHODS[loss], **more}
    if start == "hard":
        return builtin(**fields)
    student, lr = ("builtin", 3e-4) if start == "weak" else (strong_student(), 1e-4)
    return replace(BASE, **{"student": student, "lr": lr, **fields})


def run(arguments: tuple[Job, int, int, float]) -> list[dict]:
    """Lines of the CSV for (job, steps, every, max_grad_norm):
    one per evaluation, metrics as means since the last."""
    job, steps, every, max_grad_norm = arguments
    torch.set_num_threads(1)
    config = setting(job.start, job.loss, job.seed, steps, max_grad_norm=max_grad_norm)
    metrics = ("grad_norm", "drift_kl", "support_mass_student")
    prompts = task(ALL_ADDENDS if job.start == "hard" else ADDENDS)
    curve = Lagged(config, job.lag, *prompts).curve(steps, every, metrics)
    lines = [{**vars(job), "max_grad_norm": max_grad_norm, **line} for line in curve]
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


def is_studied(start: str, loss: str, lag: int, seed: int) -> bool:
    """Is it in the study? Not at the smallest lag: other starts, and the forms of docs/topk.md.

    From the sixth seed on: only what differs much from seed to seed.
    """
    if start == "hard":
        return loss in HARD and lag in (0, 8) and seed < SEEDS
    if seed >= SEEDS and not (start == "weak" and loss in NOISY):
        return False
    return (start == "weak" or loss in STRONG) and (
        lag != 2 or start == "weak" and loss not in LATE
    )


def grid(starts, losses, lags, seeds) -> list[Job]:
    """Jobs, seed by seed, so that a study that is stopped early has whole seeds; none twice."""
    jobs = [
        Job(start, canonical(loss, lag), lag, seed)
        for seed in seeds
        for start in starts
        for lag in lags
        for loss in losses
        if is_studied(start, loss, lag, seed)
    ]
    return list(dict.fromkeys(jobs))


def jobs_for(cells: list[tuple], seeds) -> list[Job]:
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


def table_of_hard(lines: list[dict]) -> str:
    """Markdown: the same as `table_of_forms`, on the whole task."""
    last = [x for x in lines if x["update"] == 80 and x["start"] == "hard"]
    return as_table(last, HARD, (0, 8))


def table_of_forms(lines: list[dict]) -> str:
    """Markdown: accuracy in percent, mean over seeds (lowest), and reverse KL of every form of a
    top K, and of some other losses, without lag and with it.
    """
    forms = [f"{form} K={k}" for form in TOP_K for k in TOP_K_SIZES]
    forward = ["forward KL 8", "forward KL + bucket 8", "forward KL 16", "forward KL + bucket 16"]
    last = [x for x in lines if x["update"] == 80 and x["start"] == "weak" and x["seed"] < SEEDS]
    return as_table(last, [*forms, *forward, "stratified 16+16", "dense reverse KL"], (0, 8, 32))


def as_table(lines: list[dict], losses, lags: tuple[int, ...]) -> str:
    """Markdown: a row for every loss, a column for every lag."""
    head = " | ".join(f"lag {lag}" for lag in lags)
    rows = [f"| loss | {head} |", "|---|" + "---|" * len(lags)]
    for loss in losses:
        cells = []
        for lag in lags:
            found = [x for x in lines if (x["loss"], x["lag"]) == (loss, lag)]
            accuracies = [100 * x["accuracy"] for x in found]
            kl = [x["reverse_kl"] for x in found]
            if found:
                numbers = (statistics.mean(accuracies), min(accuracies), statistics.mean(kl))
                cells.append("{:.0f} ({:.0f}); {:.3f}".format(*numbers))
            else:
                cells.append("not run")
        rows.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(rows)


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
    parser.add_argument("--seeds", type=study.at_least(1), default=2 * SEEDS)
    parser.add_argument("--steps", type=study.at_least(1), default=80, help="updates of a run")
    parser.add_argument(
        "--every", type=study.at_least(1), default=20, help="updates between evaluations"
    )
    parser.add_argument("--lags", type=study.at_least(0), nargs="+", default=LAGS)
    parser.add_argument("--losses", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
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
    jobs = grid(args.starts, args.losses, args.lags, range(args.seeds))
    if not jobs:
        parser.error(
            f"nothing to run: --starts strong has {', '.join(STRONG)} without lag 2, "
            f"hard has {', '.join(HARD)} at lags 0 and 8, "
            "and the forms of docs/topk.md have no lag 2"
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
