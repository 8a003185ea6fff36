"""Log a run to TensorBoard, Trackio or Weights & Biases, also while it goes on:
`python -m experiments.follow runs/default --to tensorboard`

It reads metrics.jsonl and samples.jsonl as they grow, and ends when the run has ended; `--once`
logs what is there and ends. Every update is logged once: how far it came stands in the run's
directory (follow_TARGET.json), so it can be stopped and started again, and a run that is resumed is
logged further. Updates that a resumed run makes again keep what was logged first.

    tensorboard   pip install tensorboard, then: tensorboard --logdir RUN/tensorboard
    trackio       pip install trackio, then: trackio show
    wandb         pip install wandb; WANDB_MODE=offline keeps all on this machine
"""

import argparse
import fcntl
import json
import sys
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import yaml

from experiments.run_files import objects

SAMPLES = ("prompt", "response", "answer", "correct")  # of a sample, what is shown


def tensorboard(run: Path, args, settings: dict, state: dict):
    """A function (step, numbers, samples), as each of these returns; `state` outlives us."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard")

    def log(step, numbers, samples):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        if samples:
            writer.add_text("samples", as_markdown(samples), step)
        writer.flush()

    return log


def trackio(run: Path, args, settings: dict, state: dict):
    import trackio as tracker

    tracker.init(args.project, name=args.name, config=settings, resume="allow", embed=False)

    def log(step, numbers, samples):
        values = dict(numbers)
        if samples:
            values["samples"] = tracker.Markdown(as_markdown(samples))
        tracker.log(values, step=step)

    return log


def wandb(run: Path, args, settings: dict, state: dict):
    import wandb as tracker

    state.setdefault("id", uuid.uuid4().hex)
    options = {"id": state["id"], "resume": "allow", "dir": str(run), "config": settings}
    tracker.init(project=args.project, name=args.name, **options)

    def log(step, numbers, samples):
        values = dict(numbers)
        if samples:
            rows = [[text_of(sample[name]) for name in SAMPLES] for sample in samples]
            values["samples"] = tracker.Table(columns=list(SAMPLES), data=rows)
        tracker.log(values, step=step)

    return log


TARGETS = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}


def text_of(value) -> str:
    return "" if value is None else str(value)


def as_markdown(samples: list[dict]) -> str:
    """A table, whatever the texts hold."""
    rows = [" | ".join(SAMPLES), "|".join(["---"] * len(SAMPLES))]
    for sample in samples:
        texts = (text_of(sample[name]).replace("|", "\\|") for name in SAMPLES)
        rows.append(" | ".join(" ".join(text.split()) for text in texts))
    return "\n".join(f"| {row} |" for row in rows)


def is_running(run: Path) -> bool:
    """Does a run hold the directory's lock? One that is about to begin has no lock yet."""
    try:
        with open(run / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def new_lines(run: Path, last: int):
    """(step, numbers, samples) of every update after `last`, in order.

    An update whose line is not whole yet comes the next time.
    """
    files = [run / name for name in ("metrics.jsonl", "samples.jsonl")]
    records, lines = (objects(path) if path.is_file() else [] for path in files)
    samples = defaultdict(list)
    for line in lines:
        samples[line["step"]].append(line)
    numbers = {}
    for record in records:
        step = record.pop("step")
        numbers[step] = record
        if step == 1:  # before training
            numbers[0] = {key: record[key] for key in record if "_before" in key}
    return [(step, numbers[step], samples[step]) for step in sorted(numbers) if step > last]


def follow(run: Path, args):
    """Log until the run has ended. Returns how many updates that were.

    Raises ValueError where another `follow` logs the run to the same place.
    """
    place = run / f"follow_{args.to}.json"
    with open(run / f".follow_{args.to}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run}: another follow logs it to {args.to}: end that one first")
        return log_all(run, place, args)


def log_all(run: Path, place: Path, args):
    """Log what `place` does not say was logged, until the run has ended."""
    state = {"step": -1}
    if place.is_file():
        state = json.loads(place.read_text())
    settings = run / "config.yaml"
    settings = yaml.safe_load(settings.read_text()) if settings.is_file() else {}
    log = TARGETS[args.to](run, args, settings, state)
    count = 0
    while True:
        ends = args.once or not is_running(run)  # asked first: what it wrote until then is read
        for step, numbers, samples in new_lines(run, state["step"]):
            log(step, numbers, samples)
            state["step"] = step
            partial = place.with_suffix(".partial")
            partial.write_text(json.dumps(state))
            partial.replace(place)  # whole, whenever we are stopped
            count += step > 0
        if ends:
            return count
        time.sleep(args.every)


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.follow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="--output-dir of a run")
    parser.add_argument("--to", choices=TARGETS, default="tensorboard")
    parser.add_argument("--once", action="store_true", help="log what is there, and end")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--project", default="minOPD")
    parser.add_argument("--name", help="of the run there; default: its directory")
    args = parser.parse_args()
    args.name = args.name or args.run.resolve().name
    if not args.run.is_dir():
        sys.exit(f"follow: error: {args.run}: no such directory: give the --output-dir of a run")
    with suppress(KeyboardInterrupt):
        try:
            print(f"{follow(args.run, args)} updates logged")
        except ValueError as error:
            sys.exit(f"follow: error: {error}")
        except ImportError as error:
            sys.exit(f"follow: error: --to {args.to}: {error}: pip install {args.to}")


if __name__ == "__main__":
    main()
