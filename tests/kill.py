"""End a run at a random moment, by killing one of its processes or by closing its terminal;
nothing may be left.

`python tests/kill.py --trials 100` starts the built-in run under torchrun, with 1 or 2 ranks and 1
or 2 generators. It kills one process of the family, torchrun and the fork server included, 0.3 s
after the start or later. The run must end within 20 s with an exit code other than 0, leave no
process behind, and say who died (rank 0 does, or torchrun, if one of them is left to say so). Which
process a seed hits, and when, depends on the speed of the machine. The resource tracker of Python
is spared: nobody needs it.

Of ten trials, one closes the terminal (SIGHUP to all): what was learned must be saved. One starts
two runs in one directory at the same time: one must train to its end, the other must be refused.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 20.0  # seconds until all is over


def children(pid):
    """{pid: command line} of all descendants of a process;
    the roles are children of the fork server."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                table[int(entry.name)] = (
                    parent,
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(),
                )
            except OSError:
                continue
    found, frontier = {}, {pid}
    while frontier:
        frontier = {p for p, (parent, _) in table.items() if parent in frontier and p not in found}
        found |= {p: table[p][1] for p in frontier}
    return found


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def rivals(seed: int) -> str:
    """Two runs in one directory. An empty string if all went well, else what went wrong."""
    output = Path(tempfile.mkdtemp()) / "run"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--output-dir={output}",
        "--steps=3",
        "--eval-every=0",
        "--cpu-threads=1",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs = []
    for _ in range(2):
        runs.append(subprocess.Popen(command, **pipes))
        time.sleep(random.Random(seed).uniform(0.0, 0.5))
    texts = [process.communicate(timeout=180)[0] for process in runs]
    codes = sorted(process.returncode for process in runs)
    steps = [
        json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
    refused = [
        text for text in texts if "another run uses it" in text or "holds another run" in text
    ]
    if codes != [0, 1] or steps != [1, 2, 3] or len(refused) != 1:
        return (
            f"seed {seed}: two runs in one directory: exit codes {codes}, updates {steps}\n"
            + "\n".join(texts)
        )
    print(f"seed {seed}: two runs in one directory: one was refused", flush=True)
    shutil.rmtree(output.parent)
    return ""


def trial(seed: int) -> str:
    """An empty string if all went well, else what went wrong."""
    if seed % 10 == 9:
        return rivals(seed)
    is_hangup = seed % 10 == 4
    chance = random.Random(seed)
    ranks, generators, delay = (
        chance.choice((1, 2)),
        chance.choice((1, 2)),
        chance.uniform(0.3, 12.0),
    )
    output = tempfile.mkdtemp()
    command = [
        str(Path(sys.executable).parent / "torchrun"),
        "--standalone",
        f"--nproc-per-node={ranks}",
        "--",
        str(ROOT / "train.py"),
    ]
    command += [
        f"--generators={generators}",
        f"--output-dir={output}/run",
        "--steps=100000",
        "--eval-every=0",
        "--cpu-threads=1",
    ]
    log = open(f"{output}/log", "w")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + delay
    torchrun = {process.pid: "torchrun"}
    members = torchrun
    while time.monotonic() < deadline:
        members = members | children(process.pid)
        time.sleep(0.02)
    living = torchrun | {pid: name for pid, name in children(process.pid).items() if alive(pid)}
    members |= living
    # Nobody needs that one.
    victim = chance.choice(
        sorted(pid for pid, name in living.items() if "resource_tracker" not in name)
    )
    done = f"killed {victim} ({living[victim][-70:]})"
    if is_hangup:
        done = "closed the terminal"
        victim = process.pid
    for pid, name in living.items():
        if pid == victim or is_hangup and "resource_tracker" not in name:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGHUP if is_hangup else signal.SIGKILL)
    server = (
        "forkserver" in living[victim]
        and len([name for name in living.values() if "forkserver" in name]) == 1
    )
    what = f"seed {seed}: {ranks} ranks, {generators} generators, after {delay:.1f} s {done}"
    if server:  # no role was forked yet: it is started again, and the run goes on
        time.sleep(3.0)
        process.terminate()
    end = time.monotonic() + LIMIT
    left = members
    while time.monotonic() < end and left:
        process.poll()
        members |= children(process.pid)
        left = {pid: name for pid, name in members.items() if alive(pid)}
        time.sleep(0.1)
    # The first prints where every thread is.
    for number in (signal.SIGUSR1, signal.SIGKILL) if left else ():
        for pid, name in left.items():
            if alive(pid) and ("train.py" in name or number == signal.SIGKILL):
                os.kill(pid, number)
        time.sleep(1.0)
    code = process.wait()
    text = Path(f"{output}/log").read_text()
    faults = [f"left after {LIMIT:.0f} s: {left}"] * bool(left) + ["exit code 0"] * (code == 0)
    if (
        not server
        and victim != process.pid
        and "train.py: error:" not in text
        and "exitcode" not in text
    ):
        # Rank 0 names a role or a rank, torchrun names a rank.
        faults.append("nobody says who died")
    if (
        is_hangup
        and re.search(r"^update +[1-9]", text, re.M)
        and not list(Path(output).glob("run/step_*/training_state.pt"))
    ):
        faults.append("nothing was saved")
    if faults:
        return f"{what}: {'; '.join(faults)}\n{text[-4000:]}"
    shutil.rmtree(output)
    reasons = [line for line in text.splitlines() if "error:" in line]
    print(f"{what}: {reasons[0][:150] if reasons else '-'}", flush=True)
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    failures = [
        failure
        for seed in range(args.first_seed, args.first_seed + args.trials)
        if (failure := trial(seed))
    ]
    print("\n".join(failures))
    sys.exit(f"{len(failures)} of {args.trials} failed" if failures else 0)


if __name__ == "__main__":
    main()
