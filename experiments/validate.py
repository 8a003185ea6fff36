"""Does the simulation tell the truth? It predicts whole runs, then they are made.

    python -m experiments.simulate --validate

The calibration has not seen them. It sees the stages alone, on one thread, what two processes lose
on two cores and on one, and one synchronous run. The runs that it predicts have other staleness,
order, batch size, slots, generators, length mix and number of nodes. Their learning rate
is 1e-9, so that the student keeps its lengths: the same tickets have the same lengths in the
simulation. Goals: tokens/s within 10 %, lag within 0.2 updates.

The machine's own speed drifts by more than that within minutes. So the synchronous run is made
again after every second of the others, and the costs of a prediction are scaled by an update of
the two around it. So what is judged are ratios between runs. How much the two differ is printed:
no prediction can be better than that. All of it takes about ten minutes on two cores.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.pipeline import ROOT, long_tailed
from channel import Rollout
from experiments.simulate import Result, Simulation, write
from experiments.stages import Stages, measured
from generate import Sampler
from learner import Learner
from serial import Serial
from support.config import Config, parse
from support.data import load_prompts, prompt_of
from support.load import load_model, load_tokenizer
from support.ranks import Ranks

SPEED = 0.10  # the goals: a part of tokens/s
LAG = 0.2  # and updates
CORES = 2
STEPS = 28
SKIP = 6
COMMON = ["--lr=1e-9", "--eval-every=0", "--cpu-threads=1", f"--steps={STEPS}"]
ALONE = ["--max-staleness=0"]  # the run that the calibration sees
TAIL = "tail"  # stands for the student whose responses have a long tail
RUNS = {  # name -> (nodes, flags)
    "staleness 1": (1, []),
    "staleness 4": (1, ["--max-staleness=4"]),
    "arrival": (1, ["--window=100"]),
    "batch 128, synchronous": (1, ["--batch-size=128", "--max-staleness=0"]),
    "16 slots": (1, ["--slots=16"]),
    "2 generators": (1, ["--generators=2", "--max-staleness=2"]),
    "long tail": (1, [TAIL]),
    "2 nodes": (2, []),
}


# ---- what the simulation needs to know ----------------------------------------------------------


@cache
def inputs(config: Config):
    """(prompts, ticket -> response tokens), sampled with the student: what a run with it draws."""
    prompts, _ = load_prompts(config, load_tokenizer("--student", config.path("student")))
    torch.set_num_threads(1)
    count = (config.steps + config.max_staleness) * config.batch_size
    sampler = Sampler(config, torch.device("cpu"), config.slots, [])
    rollouts = [
        Rollout(prompts[prompt_of(ticket, len(prompts), config)].ids, ticket)
        for ticket in range(count)
    ]
    sampler.generator.generate(rollouts)
    return prompts, [len(rollout.weight_version) for rollout in rollouts].__getitem__


def simulate(config: Config, stages: Stages, nodes=1, cores=CORES, skip=SKIP) -> Result:
    prompts, lengths = inputs(config)
    return Simulation(config, stages, lengths, prompts, nodes, cores).run(skip)


def fitted(stages: Stages, config: Config, run: Result, nodes=1, cores=CORES) -> Stages:
    """Scale the roles so that each is at work as long in the simulation of `config` as in `run`."""
    for _ in range(4):
        mine = simulate(config, stages, nodes, cores)
        factors = {
            role: run.busy[role] * run.seconds / (mine.busy[role] * mine.seconds)
            for role in ("generator", "teacher", "learner")
        }
        stages = stages.scaled(**factors)
    return stages


def exchange_seconds(config: Config) -> float:
    """How much longer an update takes two nodes on this machine than each of them alone."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = [pool.submit(exchange, node, store.port, config) for node in range(2)]
        return statistics.mean(one.result() for one in found)


def exchange(node: int, port: int, config: Config):
    """In the process of one node: the same rows again and again, alone and together."""
    torch.set_num_threads(1)
    serial = serial_run(config)
    serial.update()
    rows = list(range(serial.config.table_rows))
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=node, world_size=2)
    model = load_model(config.path("student"), torch.float32, torch.device("cpu"))
    ranks = Ranks(rank=node, world_size=2)
    together = Learner(model, config, serial.learner.vocab, torch.float32, ranks)
    seconds = [
        (
            update_seconds(serial.learner, serial.channel, rows, ranks),
            update_seconds(together, serial.channel, rows, ranks),
        )
        for _ in range(20)
    ]
    dist.destroy_process_group()
    return statistics.median(together - alone for alone, together in seconds)


def update_seconds(learner: Learner, channel, rows: list[int], ranks: Ranks):
    """Of one update, which both nodes begin at once."""
    ranks.exchange({})
    began = time.perf_counter()
    learner.update(channel, rows, learner.ranks.exchange(learner.describe(channel, rows)))
    return time.perf_counter() - began


def serial_run(config: Config):
    prompts, _ = load_prompts(config, load_tokenizer("--student", config.path("student")))
    return Serial(replace(config, batch_size=32, steps=10_000), 0, prompts, [])


class Probe:
    """How fast is this machine now? `slowness`: seconds of a few updates, against the first."""

    def __init__(self, config: Config):
        torch.set_num_threads(1)
        self.serial = serial_run(config)
        self.serial.update()
        self.first = 1.0
        self.first = self.slowness()

    def slowness(self):
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            self.serial.update()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds) / self.first


def updates_until(config: Config, began, stop):
    probe = Probe(config)
    began.set()
    while not stop.is_set():
        probe.serial.update()


def crowding(config: Config, probe: Probe):
    """How much slower is a process beside a busy core, and on one core with another process?"""
    spawn = multiprocessing.get_context("spawn")
    cores = os.sched_getaffinity(0)
    found = []
    for allowed in (cores, {min(cores)}):
        os.sched_setaffinity(0, allowed)
        before = statistics.median(probe.slowness() for _ in range(3))
        began, stop = spawn.Event(), spawn.Event()
        other = spawn.Process(target=updates_until, args=(config, began, stop))
        other.start()
        began.wait()
        together = statistics.median(probe.slowness() for _ in range(3))
        stop.set()
        other.join()
        alone = (before + statistics.median(probe.slowness() for _ in range(3))) / 2
        found.append(together / alone)
    os.sched_setaffinity(0, cores)
    return max(0.0, found[0] - 1), max(0.0, found[1] / 2 - 1)


def slower(stages: Stages, factor: float):
    return stages.scaled(generator=factor, teacher=factor, learner=factor)


# ---- real runs ----------------------------------------------------------------------------------


def make_run(flags: list[str], nodes: int, output: Path):
    """Train, on `nodes` torchrun agents on this machine."""
    agents = []
    for node in range(nodes):
        torchrun = [f"--nnodes={nodes}", f"--node-rank={node}", "--nproc-per-node=1"]
        torchrun += ["--master-addr=127.0.0.1", "--master-port=29517"]
        command = [sys.executable, "-m", "torch.distributed.run", *torchrun, "--", "train.py"]
        command += [f"--output-dir={output}", *flags]
        agents.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL))
    if any([agent.wait() for agent in agents]):
        raise RuntimeError(f"the run with {' '.join(flags)} failed")


def result_of(output: Path, skip=SKIP) -> Result:
    """What the metrics of a run say of its updates after the first `skip`."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = records[skip:]
    elapsed = records[-1]["wall_seconds"] - records[skip - 1]["wall_seconds"]
    tokens = sum(record["tokens"] for record in kept)
    lags = sum(record["tokens"] * record["lag_mean"] for record in kept)
    busy = {
        role: statistics.mean(record[f"{role}_busy"] for record in kept)
        for role in ("generator", "teacher", "learner")
    }
    return Result(tokens / elapsed, lags / tokens, busy, elapsed / len(kept))


# ---- the comparison -----------------------------------------------------------------------------


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        tail = long_tailed(place)

        def flags_of(flags):
            return COMMON + [part for flag in flags for part in (tail if flag == TAIL else [flag])]

        def run_of(flags, nodes=1):
            output = place / f"run_{len(list(place.iterdir()))}"
            make_run(flags_of(flags), nodes, output)
            return result_of(output)

        alone = parse(flags_of(ALONE))
        first = run_of(ALONE)
        stages = measured([alone, parse(flags_of([TAIL]))])
        stages = fitted(stages, alone, first)
        both = exchange_seconds(alone), 0.0
        stages = replace(stages, exchange=both, crowding=crowding(alone, Probe(alone)))
        print(f"{stages}\n", flush=True)
        rows = []
        before = run_of(ALONE)
        for names in zip(*[iter(RUNS)] * 2):  # two at a time
            runs = [run_of(flags, nodes) for nodes, flags in map(RUNS.get, names)]
            after = run_of(ALONE)
            now = (before.seconds + after.seconds) / 2 / first.seconds
            for name, run in zip(names, runs):
                nodes, flags = RUNS[name]
                predicted = simulate(parse(flags_of(flags)), slower(stages, now), nodes)
                rows.append(compare(name, predicted, run))
                rows[-1]["drift"] = round(after.seconds / before.seconds - 1.0, 4)
            print(f"meanwhile the machine became slower by {rows[-1]['drift']:+.1%}", flush=True)
            before = after
    write("simulated.csv", rows)
    speed, lag = (max(abs(row[name]) for row in rows) for name in ("speed_error", "lag_error"))
    drift = max(abs(row["drift"]) for row in rows)
    print(f"\nlargest errors: tokens/s {speed:.1%} (goal {SPEED:.0%}), lag {lag:.2f} (goal {LAG})")
    print(f"two synchronous runs, minutes apart, differ by up to {drift:.1%}")
    sys.exit(speed > SPEED or lag > LAG)


def predict(directory: Path, flags: list[str]):
    """Calibrate with the run in `directory`, and predict it again with other `flags`."""
    config = parse(["--config", str(directory / "config.yaml")])
    run = result_of(directory)
    stages = fitted(measured([config]), config, run)
    compare("itself", simulate(config, stages), run)
    other = parse(["--config", str(directory / "config.yaml"), *flags])
    result = simulate(other, stages)
    busy = ", ".join(f"{role} {value:.0%}" for role, value in result.busy.items())
    print(
        f"{' '.join(flags)}: {result.tokens_per_second:.0f} tokens/s "
        f"({result.tokens_per_second / run.tokens_per_second:.2f}x), lag {result.lag_mean:.2f}, "
        f"busy: {busy} (simulated)"
    )


def compare(name: str, predicted: Result, run: Result):
    """A line of the table, printed."""
    row = {"run": name}
    for kind, result in (("predicted", predicted), ("measured", run)):
        row[f"{kind}_tokens_per_second"] = round(result.tokens_per_second, 1)
        row[f"{kind}_lag"] = round(result.lag_mean, 3)
        row |= {f"{kind}_{role}": round(value, 3) for role, value in result.busy.items()}
    row["speed_error"] = round(predicted.tokens_per_second / run.tokens_per_second - 1.0, 4)
    row["lag_error"] = round(predicted.lag_mean - run.lag_mean, 3)
    busy = "  ".join(
        f"{role} {predicted.busy[role]:.0%} {run.busy[role]:.0%}" for role in predicted.busy
    )
    print(
        f"{name:24s} tokens/s {predicted.tokens_per_second:6.0f} {run.tokens_per_second:6.0f} "
        f"({row['speed_error']:+.1%})  lag {predicted.lag_mean:.2f} {run.lag_mean:.2f}  {busy}",
        flush=True,
    )
    return row
