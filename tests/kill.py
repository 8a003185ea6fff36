"""End runs at random moments, by killing one of their processes or by a signal to all.

`python tests/kill.py --trials 100` starts the built-in run under torchrun: 1 or 2 nodes (agents on
this machine) with 1 or 2 ranks, 1 or 2 generators. It kills one process of the family, torchrun and
the fork server included, a while after one of PHASES. The run must end within LIMIT with an exit
code other than 0, say who died, and leave nothing behind: no process, nothing in /dev/shm, nothing
in its TMPDIR. Which process a seed hits depends on the speed of the machine. The resource tracker
of Python is spared: nobody needs it.

Of ten trials, one interrupts all, as a terminal does that is closed: what was learned must be
saved. One starts two runs in one directory at the same time: one must train to its end, the other
must be refused.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300.0  # seconds until all is over: more than JOINING of support/ranks.py
FLAGS = ["--eval-every=0", "--cpu-threads=1"]
PHASES = ("the start", "the ranks", "the fork server", "an update")


# ---- processes ----------------------------------------------------------------------------------


def stat(pid):
    """(state, parent) of a process; OSError if there is none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return fields[0], int(fields[1])


def children(pid):
    """{pid: command line} of all descendants. Roles are children of the fork server."""
    parents, names = {}, {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            parents[int(entry)] = stat(entry)[1]
            name = Path(f"/proc/{entry}/cmdline").read_bytes()
            names[int(entry)] = name.replace(b"\0", b" ").decode()
    found, frontier = {}, {pid}
    while frontier:
        frontier = {p for p in names if parents[p] in frontier and p not in found}
        found |= {p: names[p] for p in frontier}
    return found


def alive(pid):
    with suppress(OSError):
        return stat(pid)[0] != "Z"
    return False


def is_tracker(name):
    return "resource_tracker" in name


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


# ---- one run ------------------------------------------------------------------------------------


class Run:
    """The agents of a run, and everybody that was seen among their descendants."""

    def __init__(self, nodes, ranks, flags):
        self.place = Path(tempfile.mkdtemp())
        self.output, self.temporary = self.place / "run", self.place / "tmp"
        self.temporary.mkdir()
        self.shared_memory = set(os.listdir("/dev/shm"))
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        script = [str(ROOT / "train.py"), f"--output-dir={self.output}", *FLAGS, *flags]
        where = [f"--nnodes={nodes}", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
        self.world = nodes * ranks
        self.agents = []
        self.members = {}
        for node in range(nodes):
            meet = ["--standalone"] if nodes == 1 else [*where, f"--node-rank={node}"]
            with open(self.place / f"log_{node}", "w") as log:
                command = [*launch, *meet, *script]
                pipes = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
                environment = os.environ | {"TMPDIR": str(self.temporary)}
                self.agents.append(subprocess.Popen(command, env=environment, **pipes))

    def look(self):
        """{pid: command line} of those that live. Remembers them: an orphan is no child."""
        for agent in self.agents:
            agent.poll()  # no zombie
            self.members |= {agent.pid: "torchrun"} | children(agent.pid)
        return {pid: name for pid, name in self.members.items() if alive(pid)}

    def has_reached(self, phase):
        """Is the run at least there? The words are those of PHASES."""
        learners = [name for name in self.members.values() if "train.py" in name]
        return {
            "the start": True,
            "the ranks": len(learners) >= self.world,
            "the fork server": any("forkserver" in name for name in self.members.values()),
            "an update": re.search(r"^update +[1-9]", self.text(), re.MULTILINE),
        }[phase]

    def wait(self, seconds, until=lambda living: False):
        end = time.monotonic() + seconds
        while not until(living := self.look()) and time.monotonic() < end:
            time.sleep(0.02)
        return living

    def text(self):
        return "\n".join(path.read_text() for path in sorted(self.place.glob("log_*")))

    def end_by_force(self, left):
        """Those left show where every thread is, then they are killed."""
        for number, chosen in ((signal.SIGUSR1, "train.py"), (signal.SIGKILL, "")):
            for pid, name in left.items():
                if chosen in name and alive(pid):
                    os.kill(pid, number)
            self.wait(2.0, until=lambda living: not living)

    def litter(self):
        """What it has left: (temporary files, names in /dev/shm). Torch's files are its own."""
        files = {name for name in os.listdir(self.temporary) if not name.startswith("torch")}
        return sorted(files), sorted(set(os.listdir("/dev/shm")) - self.shared_memory)


# ---- trials -------------------------------------------------------------------------------------


def trial(seed: int):
    """An empty string if all went well, else what went wrong."""
    if seed % 10 == 9:
        return rivals(seed)
    is_hangup = seed % 10 == 4
    chance = random.Random(seed)
    nodes = chance.choice((1, 1, 2))
    ranks = chance.choice((1, 2)) if nodes == 1 else 1
    generators = chance.choice((1, 2))
    run = Run(nodes, ranks, [f"--generators={generators}", "--steps=100000"])
    # An agent would wait minutes for one that has never come.
    phase = chance.choice(PHASES[nodes > 1 :])
    run.wait(120.0, until=lambda living: run.has_reached(phase))
    delay = chance.uniform(0.3, 4.0)
    living = run.wait(delay)
    victim = chance.choice(sorted(pid for pid in living if not is_tracker(living[pid])))
    number = chance.choice((signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
    done = number.name if is_hangup else f"killed {victim} ({living[victim][-70:]})"
    for pid in living if is_hangup else [victim]:
        if not is_tracker(living[pid]):
            with suppress(ProcessLookupError):
                os.kill(pid, number if is_hangup else signal.SIGKILL)
    left = run.wait(LIMIT, until=lambda living: not living)
    run.end_by_force(left)
    faults = judge(run, left, "all" if is_hangup else living[victim])
    what = f"seed {seed}: {nodes} nodes, {ranks} ranks, {generators} generators"
    what += f", {delay:.1f} s after {phase}: {done}"
    if faults:
        return f"{what}: {'; '.join(faults)}\n{run.place}\n{run.text()[-4000:]}"
    reasons = [line for line in run.text().splitlines() if "error:" in line]
    print(f"{what}: {reasons[0][:150] if reasons else '-'}", flush=True)
    shutil.rmtree(run.place)
    return ""


def judge(run, left, victim):
    """What is wrong with a run that should be over. `victim`: its command line, or "all"."""
    faults = []
    if left:
        faults.append(f"left after {LIMIT:.0f} s: {left}")
    codes = [agent.wait() for agent in run.agents]
    if 0 in codes:
        faults.append(f"exit codes {codes}")
    # A leader names a role or a node, torchrun a rank. Nobody is left to name the only torchrun.
    is_named = "train.py: error:" in run.text() or "exitcode" in run.text()
    if not is_named and victim not in ("all", "torchrun"):
        faults.append("nobody says who died")
    is_saved = [*run.output.glob("step_*/training_state.pt")]
    if victim == "all" and run.has_reached("an update") and not is_saved:
        faults.append("nothing was saved")
    files, shared = run.litter()
    # A leader that is killed cannot clear away the socket of its fork server.
    if shared or len(files) > ("train.py" in victim):
        faults.append(f"left behind: {files} {shared}")
    return faults


def rivals(seed: int):
    """Two runs in one directory. An empty string if all went well, else what went wrong."""
    place = Path(tempfile.mkdtemp())
    output = place / "run"
    command = [sys.executable, str(ROOT / "train.py"), f"--output-dir={output}", "--steps=3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    runs = []
    for _ in range(2):
        runs.append(subprocess.Popen([*command, *FLAGS], **pipes))
        time.sleep(random.Random(seed).uniform(0.0, 0.5))
    texts = [process.communicate(timeout=600)[0] for process in runs]
    codes = sorted(process.returncode for process in runs)
    records = output / "metrics.jsonl"
    lines = records.read_text().splitlines() if records.exists() else []
    steps = [json.loads(line)["step"] for line in lines]
    refused = [text for text in texts if re.search("another run uses|holds another run", text)]
    what = f"seed {seed}: two runs in one directory"
    if codes != [0, 1] or steps != [1, 2, 3] or len(refused) != 1:
        return f"{what}: exit codes {codes}, updates {steps}\n" + "\n".join(texts)
    print(f"{what}: one was refused", flush=True)
    shutil.rmtree(place)
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.trials)
    failed = 0
    for seed in seeds:
        if failure := trial(seed):
            failed += 1
            print(f"FAILED: {failure}\n", flush=True)
    sys.exit(f"{failed} of {args.trials} failed" if failed else 0)


if __name__ == "__main__":
    main()
