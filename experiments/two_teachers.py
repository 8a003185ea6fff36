"""One student, two teachers:
`python -m experiments.two_teachers`, ten minutes on two cores.

One teacher knows running sums, the other sums of neighbours (assets/task.py); neither does what the
other does. The student has begun both. Every prompt names its teacher. Two kinds of runs of
train.py have the same student and the same prompts:

    right   each task goes to its own teacher
    wrong   both go to the teacher of running sums, the wrong one for half of the prompts

`--out` gets models, prompts and runs. The CSV gets the accuracy of each task at each evaluation. A
CSV that exists is continued. The figure needs matplotlib.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from assets.make_assets import ASSETS, second_task
from assets.task import EVALUATION_SEED, neighbour_sums, running_sums
from experiments import study

RESULTS = study.RESULTS / "two_teachers.csv"
TASKS = {"sums": running_sums, "pairs": neighbour_sums}
STEPS, EVERY = 300, 20  # updates, between evaluations
KINDS = {"run": str, "seed": int, "update": int, "task": str}
COLUMNS = (*KINDS, "accuracy")


def prepare(out: Path):
    """Write models and prompts, unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "student_both").exists():
        second_task(out)
    if (out / "eval.jsonl").exists():  # the last file
        return
    for name, count, seed, held_out in (
        ("right", 10_000, 0, False),
        ("wrong", 10_000, 0, False),
        ("eval", 128, EVALUATION_SEED, True),
    ):
        lines = []
        for task, pairs in TASKS.items():
            teacher = "sums" if name == "wrong" else task
            for prompt, answer in pairs(count, seed, held_out):
                row = {"prompt": prompt, "answer": answer, "teacher": teacher}
                lines.append(json.dumps(row) + "\n")
        (out / f"{name}.jsonl").write_text("".join(lines))


def train(out: Path, run: str, seed: int):
    """Lines of the CSV of one run."""
    output = out / f"{run}_{seed}"
    command = [
        sys.executable, str(study.ROOT / "train.py"), f"--config={ASSETS}/builtin.yaml",
        f"--student={out}/student_both", f"--teacher=sums={ASSETS}/teacher",
        f"--teacher=pairs={out}/teacher_pairs", f"--prompts={out}/{run}.jsonl",
        f"--eval-prompts={out}/eval.jsonl", f"--output-dir={output}", f"--seed={seed}", "--lr=5e-4",
        f"--steps={STEPS}", f"--eval-every={EVERY}", "--save-every=0", "--cpu-threads=1",
    ]  # fmt: skip
    if not (output / f"step_{STEPS}").exists():
        shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped
        subprocess.run(command, check=True)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = []
    for task in TASKS:
        before = records[0][f"eval_accuracy_before/{task}"]
        found = {0: before} | {
            record["step"]: record[f"eval_accuracy/{task}"]
            for record in records
            if f"eval_accuracy/{task}" in record
        }
        for update, accuracy in found.items():
            values = (run, seed, update, task, accuracy)
            lines.append(dict(zip(COLUMNS, values)))
    return lines


def read(path: Path):
    return study.read(path, COLUMNS, KINDS)


def make(path: Path, out: Path, seeds: int):
    """All lines of the CSV, once it has every run."""
    jobs = [(run, seed) for seed in range(seeds) for run in ("right", "wrong")]

    def missing(lines):
        held = {(line["run"], line["seed"]) for line in lines}
        return [job for job in jobs if job not in held]

    def work(job):
        prepare(out)
        return train(out, *job)

    return study.complete(path, COLUMNS, KINDS, read, missing, work, workers=1)


def summary(lines):
    """Means over seeds, and the extremes."""
    rows = ["run    task     before             after"]
    for run in ("right", "wrong"):
        for task in TASKS:
            cells = []
            for update in (0, STEPS):
                values = [
                    line["accuracy"]
                    for line in lines
                    if (line["run"], line["task"], line["update"]) == (run, task, update)
                ]
                mean = statistics.mean(values)
                cells.append(f"{mean:6.1%} ({min(values):.1%} to {max(values):.1%})")
            rows.append(f"{run}  {task:7s} {'  '.join(cells)}")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.two_teachers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=study.RUNS / "two_teachers")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=study.at_least(1), default=3)
    args = parser.parse_args()
    lines = make(args.csv, args.out, args.seeds)
    print(summary(lines))
    if importlib.util.find_spec("matplotlib"):
        from experiments.figures import draw_two_teachers

        draw_two_teachers(lines, args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
