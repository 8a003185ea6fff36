"""Starts train.py on tiny models and follows it, for the tests of whole runs."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from conftest import ROOT
from kill import alive, children, free_port, is_tracker

BASE = [
    "--batch-size=8",
    "--slots=8",
    "--eval-size=8",
    "--max-prompt-tokens=32",
    "--max-new-tokens=12",
    "--cpu-threads=1",
]
PATIENCE = 600.0  # seconds before a test gives up: the cores may be busy with other things
ENDLESS = ["--steps=100000", "--eval-every=0"]


def command(output, *flags, ranks=0, where=("--standalone",)):
    """`ranks` 0: without torchrun, which starts two seconds sooner."""
    torchrun = ["-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}"]
    script = [str(ROOT / "train.py"), *BASE, f"--output-dir={output}", *flags]
    return [sys.executable, *(torchrun if ranks else []), *script]


def start(output, *flags, ranks=0, where=("--standalone",), wrapper=()):
    return subprocess.Popen(
        [*wrapper, *command(output, *flags, ranks=ranks, where=where)],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start_nodes(count, output, *flags, ranks=1, torchrun=()):
    """torchrun agents on this machine, numbered by `--node-rank`. `ranks`: of each, or of all."""
    port = free_port()
    ranks = [ranks] * count if isinstance(ranks, int) else ranks
    agents = []
    for node in range(count):
        place = [f"--nnodes={count}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        where = [*place, f"--node-rank={node}", *torchrun]
        agents.append(start(output, *flags, ranks=ranks[node], where=where))
    return agents


def finish(process, expect=0, within=PATIENCE):
    out, _ = process.communicate(timeout=within)
    assert (process.returncode == 0) == (expect == 0), out
    return out


def metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def read_trace(output):
    """The events of a run's trace.json, an array without its end."""
    return json.loads((output / "trace.json").read_text().rstrip().rstrip(",") + "]")


def wait_until(condition, within=PATIENCE):
    """Returns what the condition gives, once that is true."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return value


def still_alive(family, within=PATIENCE):
    """Command lines of those that outlive the deadline. Orphans notice by themselves."""
    with suppress(AssertionError):
        wait_until(lambda: not any(map(alive, family)), within)
    return [line for pid, line in family.items() if alive(pid)]


def read_until(process, pattern, within=PATIENCE):
    """What is printed up to the pattern. Who does not come to it is killed, with its session."""
    lines = []
    alarm = threading.Timer(within, os.killpg, (process.pid, signal.SIGKILL))
    alarm.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if re.search(pattern, line):
                return "".join(lines)
    finally:
        alarm.cancel()
    raise AssertionError(f"{pattern!r} never appeared:\n{''.join(lines)}")


def learners(process):
    """Process ids of the learner ranks that torchrun has started."""
    return sorted(pid for pid, line in children(process.pid).items() if "train.py" in line)


def forked(process):
    """Process ids in order of birth: the fork server, generators, teachers."""
    return sorted(pid for pid, line in children(process.pid).items() if "forkserver" in line)


def interrupt(process, number):
    """As a terminal does it: a signal to every process of a run."""
    for pid, line in {process.pid: "", **children(process.pid)}.items():
        if not is_tracker(line):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
