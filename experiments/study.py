"""What the three studies share: a CSV that is continued run by run,
and options that are checked."""

from __future__ import annotations

import argparse
import csv
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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


def read(
    path: Path, columns: tuple[str, ...], kinds: dict[str, type], optional: tuple[str, ...] = ()
) -> list[dict]:
    """Lines of a CSV with numbers: floats but for `kinds`;
    None where an `optional` column is empty. A last line that was cut off is left out.

    Exits where the columns are others, or with the number of a line that does not have them.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path} cannot be read: {error}")
    if text and text.partition("\n")[0] != ",".join(columns):
        sys.exit(f"{path} does not have the columns {','.join(columns)}: give another --out")
    lines = []
    for fields in list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))[1:]:
        try:
            pairs = zip(columns, fields, strict=True)
            lines.append(
                {
                    key: None if key in optional and not field else kinds.get(key, float)(field)
                    for key, field in pairs
                }
            )
        except ValueError:
            sys.exit(f"{path}, line {len(lines) + 2} is damaged: delete it, it is made again")
    return lines


def complete(
    path: Path,
    columns: tuple[str, ...],
    kinds: dict[str, type],
    read: Callable,
    missing: Callable,
    work: Callable,
    workers: int,
) -> list[dict]:
    """All lines of a CSV, once it holds what is wanted:
    `missing(lines)` gives the jobs still to do, `work(job)` the lines of one.

    Lines come in the order of the jobs, so that two studies give one CSV. `kinds` are the columns
    that tell a line from others: one that is there is not written again, and nothing is removed but
    a last line that was cut off. `workers`: processes; 0 is one per core.
    """
    if missing(read(path) if path.exists() else []):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", newline="")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(
                f"{path} is being written by another study: wait for it, or give another --out"
            )
        except OSError as error:
            sys.exit(f"{path} cannot be written: {error}")
        with file:
            file.seek(0)
            text = file.read()
            file.truncate(len(text[: text.rfind("\n") + 1].encode()))
            lines = read(path)
            held = {tuple(line[key] for key in kinds) for line in lines}
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if "\n" not in text:
                writer.writeheader()
            try:
                for made in results(work, missing(lines), workers or len(os.sched_getaffinity(0))):
                    writer.writerows(
                        line for line in made if tuple(line[key] for key in kinds) not in held
                    )
                    file.flush()
            except KeyboardInterrupt:
                sys.exit(f"\nstopped: {path} keeps its lines, the same command makes the rest")
            except BrokenProcessPool:
                sys.exit(
                    f"\na process died, of too little memory perhaps: {path} keeps its lines, "
                    "the same command makes the rest, --workers 1 needs less"
                )
    return read(path)


def results(work: Callable, jobs: list, workers: int) -> Iterator[list[dict]]:
    """`work(job)` in the order of the jobs, with a progress bar.
    Processes are new after 32 jobs each, since a Channel is never closed."""
    with tqdm(total=len(jobs), unit="run") as bar:
        for first in range(0, len(jobs), 32 * workers):
            some = jobs[first : first + 32 * workers]
            # Ctrl-C reaches every process of the terminal; this one ends the others.
            ignore = (signal.SIGINT, signal.SIG_IGN)
            pool = (
                nullcontext()
                if workers == 1
                else ProcessPoolExecutor(
                    workers, mp.get_context("forkserver"), signal.signal, ignore
                )
            )
            with pool:
                try:
                    for lines in map(work, some) if workers == 1 else pool.map(work, some):
                        bar.update()
                        yield lines
                except BaseException:
                    for process in mp.active_children() if workers > 1 else ():
                        process.kill()
                    raise
