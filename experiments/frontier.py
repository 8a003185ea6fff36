"""What staleness buys: the real pipeline at several --max-staleness: `python -m experiments.frontier`.

Whole runs of `train.py` on the built-in task, every loss x order x staleness x seed in turn, one thread per role. A line
of the CSV per run: tokens/s between evaluations, measured lag, seconds and updates to 90 % accuracy (evaluations, which
stop the learner, taken off), final accuracy. A CSV that exists is continued.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {
    "forward KL 32": ["--loss=forward_kl", "--top-k=32"],
    "current signal + IS, N=32": ["--loss=sampled_reverse_kl", "--num-samples=32"],
    "stratified 28+4": ["--loss=stratified_reverse_kl", "--top-k=28", "--num-samples=4"],
}
COLUMNS = ("loss", "order", "max_staleness", "seed", "tokens_per_second", "lag_mean", "lag_max", "drift_kl", "seconds_to_90", "updates_to_90",
           "accuracy", "generator_busy", "teacher_busy", "learner_busy")  # fmt: skip


def run(loss: str, order: str, staleness: int, seed: int, steps: int, every: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        command = [sys.executable, ROOT / "train.py", f"--output-dir={output}", f"--order={order}", f"--max-staleness={staleness}", f"--seed={seed}",
                   f"--steps={steps}", f"--eval-every={every}", "--save-every=0", "--cpu-threads=1", *LOSSES[loss]]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    starts = [0.0, *(record["wall_seconds"] for record in records)]
    # the interval after an evaluation begins when the evaluation has ended: only the update that evaluates is left out
    spans = {r["step"]: end - start for r, start, end in zip(records, starts, starts[1:])}
    plain = [r for r in records[5:] if "eval_accuracy" not in r]
    typical = statistics.median(spans[r["step"]] for r in plain)
    reached = next((r["step"] for r in records if r.get("eval_accuracy", 0) >= 0.9), None)
    seconds = sum(min(spans[step], 3 * typical) for step in range(1, reached + 1)) if reached else None
    mean = lambda key: statistics.mean(r[key] for r in plain)  # noqa: E731
    return {
        "loss": loss, "order": order, "max_staleness": staleness, "seed": seed, "lag_mean": mean("lag_mean"), "lag_max": max(r["lag_max"] for r in records),
        "tokens_per_second": sum(r["tokens"] for r in plain) / sum(spans[r["step"]] for r in plain), "drift_kl": mean("drift_kl"),
        "seconds_to_90": seconds, "updates_to_90": reached, "accuracy": records[-1]["eval_accuracy"],
        **{key: mean(key) for key in ("generator_busy", "teacher_busy", "learner_busy")},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/frontier.csv"), help="continued if it exists")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="updates between evaluations")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if args.out.exists():
        with open(args.out, newline="") as file:
            done = {(r["loss"], r["order"], int(r["max_staleness"]), int(r["seed"])) for r in csv.DictReader(file)}
    jobs = [
        (loss, order, staleness, seed) for seed in range(args.seeds) for loss in args.losses for order in ("batch", "arrival") for staleness in args.staleness
        if staleness or order == "batch"  # without staleness there is one batch to take rollouts from
    ]  # fmt: skip
    with open(args.out, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        for job in tqdm([job for job in jobs if job not in done], unit="run"):
            writer.writerow(run(*job, args.steps, args.every))
            file.flush()


if __name__ == "__main__":
    main()
