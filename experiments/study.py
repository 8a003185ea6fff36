"""What the three studies share: a CSV that is continued run by run, and options that are checked."""

from __future__ import annotations

import argparse
import csv
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch.multiprocessing as mp
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = ROOT / "experiments" / "results", ROOT / "runs"


def at_least(least: float, kind: type = int) -> Callable[[str], float]:
    """A type for argparse."""

    def number(text: str) -> float:
        if not (value := kind(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text} is too little: {least} is the least")
        return value

    number.__name__ = kind.__name__  # of "invalid int value"
    return number


def read(path: Path, columns: tuple[str, ...], kinds: dict[str, type]) -> list[dict]:
    """Lines of a CSV with numbers: floats but for `kinds`, None where there is nothing. A last line that was cut off is left out.

    Exits where the columns are others, or with the number of a line that does not have them.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path} cannot be read: {error}")
    lines, header = [], ",".join(columns)
    if not text:
        return []
    if text.partition("\n")[0] != header:
        sys.exit(f"{path} does not have the columns {header}: give another --out")
    reader = csv.reader(text[: text.rfind("\n")].splitlines())
    for fields in list(reader)[1:]:
        try:
            lines.append({key: kinds.get(key, float)(field) if field else None for key, field in zip(columns, fields, strict=True)})
        except ValueError:
            sys.exit(f"{path}, line {len(lines) + 2} is damaged: delete it, its run is made again")
    return lines


def prepare(path: Path, keep: list[bool]):
    """A CSV that can be appended to: drops the lines, header not counted, that are not to be kept, and a last line that was cut off."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+") as file:
            file.seek(0)
            lines = file.readlines()
        kept = lines[:1] + [line for line, wanted in zip(lines[1:], keep) if wanted]
        if kept != lines:
            print(f"{path}: {len(lines) - len(kept)} lines of unfinished runs dropped, the runs are made again", file=sys.stderr)
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(path)
    except OSError as error:
        sys.exit(f"{path} cannot be written: {error}")


def append(path: Path, columns: tuple[str, ...], work: Callable[[tuple], list[dict]], jobs: list[tuple], workers: int):
    """Lines of `work(job)` for every job, in the order of the jobs, so that two studies give one CSV.

    `workers`: processes; 0 is one per core, 1 is this one. Each leaves after 32 jobs, since a Channel is never closed.
    """
    workers = workers or len(os.sched_getaffinity(0))
    ours = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; this one ends the others
    pool = nullcontext() if workers == 1 else mp.get_context("forkserver").Pool(workers, signal.signal, ours, maxtasksperchild=32)
    try:
        with open(path, "a", newline="") as file, pool:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            for lines in tqdm(map(work, jobs) if workers == 1 else pool.imap(work, jobs), total=len(jobs), unit="run"):
                writer.writerows(lines)
                file.flush()
    except BlockingIOError:
        sys.exit(f"{path} is being written by another study: wait for it, or give another --out")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped: {path} holds the runs that are done, the same command makes the others")
