"""What staleness buys: the real pipeline at several --max-staleness.

    python -m experiments.frontier             # loss, order, staleness
    python -m experiments.frontier --windows   # --window at a staleness of 1: windows.csv

Whole runs of `train.py` on the built-in task, one after the other, one thread per role. A line of
the CSV per run: tokens/s, measured lag, seconds and updates to 90 % accuracy, final accuracy.
Evaluations, which stop the learner, are taken off the clock. A CSV that exists is continued.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments import study

RESULTS = study.RESULTS / "frontier.csv"
OF_WINDOWS = study.RESULTS / "windows.csv"
METHODS = {  # name -> settings
    "stratified 28+4": {"loss": "stratified_reverse_kl", "top_k": 28, "num_samples": 4},
    "current signal + IS, N=32": {"loss": "sampled_current_is", "num_samples": 32},
    "forward KL 32": {"loss": "forward_kl", "top_k": 32},
    "stratified 16+16": {"loss": "stratified_reverse_kl", "top_k": 16, "num_samples": 16},
    "edge K=32": {"loss": "sparse_reverse_kl", "top_k": 32},
}
DEFAULT = "stratified 16+16"
STALENESS = (0, 1, 2, 4, 8)
STEPS, EVERY, TARGET = 80, 5, 0.9  # updates of a run, between evaluations; accuracy
BUSY = ("generator_busy", "teacher_busy", "learner_busy")
ARRIVAL = 100  # more than a run has updates: order of arrival
WINDOWS = (0, 1, 2, 4, ARRIVAL)  # 0: ticket order
KINDS = {"loss": str, "window": int, "max_staleness": int, "seed": int}
COLUMNS = (
    "loss",
    "window",
    "max_staleness",
    "seed",
    "tokens_per_second",
    "lag_mean",
    "lag_max",
    "drift_kl",
    "seconds_to_90",
    "updates_to_90",
    "accuracy",
    *BUSY,
)


def off_the_clock(events: list[dict]) -> list[float]:
    """Seconds of each evaluation of a trace.json but the first (before the clock starts),
    less what the teacher scored meanwhile.

    It may work off its queue while the others stand still.
    A synchronous run has no queue: the time must not be a present.
    """
    teacher = next(
        event["tid"]
        for event in events
        if event["ph"] == "M" and event["args"]["name"] == "teacher 0"
    )
    spans = [
        (event["tid"], event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["ph"] == "X"
    ]
    evaluations = sorted((begin, end) for _, name, begin, end in spans if name == "evaluate")
    scoring = [(begin, end) for tid, _, begin, end in spans if tid == teacher]
    return [
        (end - begin - sum(max(0, min(end, e) - max(begin, b)) for b, e in scoring)) / 1e6
        for begin, end in evaluations[1:]
    ]


def measure(records: list[dict], evaluations: list[float], every: int) -> dict[str, float | None]:
    """Columns of the CSV from metrics.jsonl and the seconds that the evaluation
    after every `every` updates took."""

    def seconds(step: int) -> float:
        return records[step - 1]["wall_seconds"] - sum(evaluations[: step // every])

    reached = next(
        (record["step"] for record in records if record.get("eval_accuracy", 0) >= TARGET), None
    )
    averaged = ("lag_mean", "drift_kl", *BUSY)
    return {
        "tokens_per_second": sum(record["tokens"] for record in records) / seconds(len(records)),
        "accuracy": records[-1]["eval_accuracy"],
        "seconds_to_90": reached and seconds(reached),
        "updates_to_90": reached,
        "lag_max": max(record["lag_max"] for record in records),
        **{key: statistics.mean(record[key] for record in records) for key in averaged},
    }


def flags(loss: str) -> list[str]:
    """Of train.py."""
    settings = {"plugin": "experiments.corrections", **METHODS[loss]}
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def run(job: tuple[str, int, int, int]) -> list[dict]:
    """The CSV's one line for a (loss, window, max_staleness, seed)."""
    loss, window, staleness, seed = job
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        command = [
            sys.executable,
            str(study.ROOT / "train.py"),
            f"--output-dir={output}",
            f"--window={window}",
            f"--max-staleness={staleness}",
            f"--seed={seed}",
            f"--steps={STEPS}",
            f"--eval-every={EVERY}",
            "--eval-size=128",
            "--save-every=0",
            "--cpu-threads=1",
            *flags(loss),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        trace = (output / "trace.json").read_text().rstrip().rstrip(",")  # an array without its end
        events = json.loads(trace + "]")
    return [{**dict(zip(COLUMNS, job)), **measure(records, off_the_clock(events), EVERY)}]


def read(path: Path) -> list[dict]:
    """Lines of a CSV with numbers; a target that was not reached is None."""
    return study.read(path, COLUMNS, KINDS, optional=("seconds_to_90", "updates_to_90"))


def grid(losses, staleness, seeds: int) -> list[tuple[str, int, int, int]]:
    """Jobs, seed by seed. Order of arrival for two losses, and not without staleness, where there
    is one batch to take rollouts from.
    """
    cells = [(loss, 0, s) for loss in losses for s in staleness]
    in_both = [loss for loss in ("stratified 28+4", DEFAULT) if loss in losses]
    cells += [(loss, ARRIVAL, s) for loss in in_both for s in staleness if s]
    return jobs_for(cells, range(seeds))


def window_grid(seeds: int) -> list[tuple[str, int, int, int]]:
    """Jobs of every window, in turn, for the default loss at a staleness of 1."""
    return jobs_for([(DEFAULT, window, 1) for window in WINDOWS], range(seeds))


def make(path: Path, jobs: list[tuple[str, int, int, int]]) -> list[dict]:
    """Append the lines of those `jobs` that the CSV does not hold,
    one run at a time; all its lines."""

    def missing(lines: list[dict]) -> list[tuple]:
        held = {tuple(line[key] for key in KINDS) for line in lines}
        return [job for job in jobs if job not in held]

    return study.complete(path, COLUMNS, KINDS, read, missing, run, workers=1)


def jobs_for(cells: list[tuple], seeds: range) -> list[tuple]:
    """Jobs of some (loss, window, max_staleness)."""
    return [(*cell, seed) for seed in seeds for cell in dict.fromkeys(cells)]


def summary(lines: list[dict]) -> str:
    """A line per loss, window and staleness: means over seeds."""
    head = (
        "                           window   staleness  seeds  tokens/s  mean lag  "
        "seconds to 90 %  accuracy"
    )
    rows = [head]
    for cell in dict.fromkeys(tuple(line[key] for key in COLUMNS[:3]) for line in lines):
        chosen = [line for line in lines if tuple(line[key] for key in COLUMNS[:3]) == cell]
        rate, lag, accuracy = (
            statistics.mean(line[key] for line in chosen)
            for key in ("tokens_per_second", "lag_mean", "accuracy")
        )
        reached = [line["seconds_to_90"] for line in chosen if line["seconds_to_90"]]
        seconds = (
            f"{statistics.mean(reached):.1f} ({len(reached)} of {len(chosen)})"
            if reached
            else "never"
        )
        rows.append(
            f"{cell[0]:26s} {cell[1]:6d}   {cell[2]:9d}  {len(chosen):5d}  {rate:8.0f}  "
            f"{lag:8.2f}  {seconds:>15s}  {accuracy:8.1%}"
        )
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="CSV, continued if it exists")
    parser.add_argument("--windows", action="store_true", help="every --window at a staleness of 1")
    parser.add_argument("--seeds", type=study.at_least(1), default=5)
    parser.add_argument("--staleness", type=study.at_least(0), nargs="+", default=STALENESS)
    parser.add_argument("--losses", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    jobs = grid(args.losses, args.staleness, args.seeds)
    if args.windows:
        jobs = window_grid(args.seeds)
    lines = make(args.out or (OF_WINDOWS if args.windows else RESULTS), jobs)
    print(summary([line for line in lines if tuple(line[key] for key in COLUMNS[:4]) in jobs]))


if __name__ == "__main__":
    main()
