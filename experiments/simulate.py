"""A simulation of the pipeline: throughput, lag and busy fractions of runs that nobody made.

    python -m experiments.simulate --validate  predict twelve runs here, make them, compare
    python -m experiments.simulate --paper     the paper's setting on 8 GPUs
    python -m experiments.simulate --scale     1 to 64 nodes, and what would help there
    python -m experiments.simulate --plan      the best split of 8 GPUs, for several pairs of models
    python -m experiments.simulate --calibrate runs/x -- --max-staleness 4
                                               like runs/x, other flags

Time goes from event to event. Nothing is computed but times. The rules are the project's own:
`Tickets` and `may_start` say which rollout may start, `take_rows` and `Generator.room` when slots
are refilled, `ready_rows` what a teacher scores together, `row_batches` which rows share a forward
pass. What a stage costs comes from experiments/stages.py, how long a response is from a list or
from a distribution.

A process is a Python generator. It yields the seconds of work that it does next, or None while it
has nothing to do.
"""

import argparse
import csv
import heapq
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from channel import Channel
from experiments.stages import Stages
from generate import Generator, take_rows
from model import row_batches
from support.config import Config, InputError
from teacher import ready_rows
from tickets import Tickets, may_start

Process = Iterator[float | None]
MOVES = 0.15  # seconds, see Cores
RESULTS = Path(__file__).resolve().parent / "results"


# ---- time ---------------------------------------------------------------------------------------


class Machine:
    """Runs processes in order of their events. Each has a GPU of its own: none slows another."""

    def __init__(self):
        self.now = 0.0
        self.working = []  # heap of (when it will be done, number, process)
        self.numbers = itertools.count()
        self.homes: dict[int, list[Process]] = {}  # node -> its processes
        self.waiting: dict[Process, int] = {}  # -> its node
        self.begun: dict[Process, tuple] = {}  # -> (its node, when)
        self.busy: dict[Process, float] = {}  # seconds spent at work
        self.changed: set[int] = set()  # nodes whose processes must be asked again

    def add(self, node: int, process: Process):
        self.homes.setdefault(node, []).append(process)
        self.waiting[process] = node
        self.busy[process] = 0.0
        self.changed.add(node)
        return process

    def step(self):
        """Let everything begin that can, then go on to the next event. False: all wait for ever."""
        while self.changed:
            self.ask(self.changed.pop())
        if not self.begun:
            return False
        process = self.advance()
        node, begun = self.begun.pop(process)
        self.busy[process] += self.now - begun
        self.waiting[process] = node
        self.changed.add(node)
        return True

    def ask(self, node: int):
        """Resume the processes of a node until none of them begins anything more."""
        quiet = 0
        while quiet < 2:  # what one passes on, another that was asked before may take
            quiet += 1
            for process in self.homes[node]:
                if process not in self.waiting:
                    continue
                seconds = next(process, None)
                if seconds is not None:
                    del self.waiting[process]
                    self.begun[process] = node, self.now
                    self.begin(process, seconds)
                    quiet = 0

    def begin(self, process: Process, seconds: float):
        heapq.heappush(self.working, (self.now + seconds, next(self.numbers), process))

    def advance(self):
        """Go on to the next event; returns the process whose work is done."""
        self.now, _, process = heapq.heappop(self.working)
        return process


class Cores(Machine):
    """The processes of all nodes share a few cores, as Linux shares them.

    A process that goes on without a pause stays on its core. One that has waited goes to the core
    with the fewest. Those on one core share it. A core without any takes one from a core that has
    several. Now and then, every MOVES seconds on average, a core passes one of several on to the
    core with the fewest: of three processes on two cores each has a whole core in turn. Runs with a
    staleness of 3 and 96 rollouts an update have the lag of the simulation with these MOVES.
    """

    def __init__(self, count: int, beside: float = 0.0, shared: float = 0.0):
        """A core is slower by `beside` while others are busy,
        by `shared` with several processes."""
        super().__init__()
        self.beside = beside
        self.shared = shared
        self.cores: list[dict[Process, float]] = [{} for _ in range(count)]  # -> work left
        self.left: dict[Process, tuple] = {}  # -> (when it was done, on which core)
        self.random = random.Random(0)
        self.next_move = 0.0

    def begin(self, process: Process, seconds: float):
        when, core = self.left.get(process, (-1.0, None))
        if when < self.now:
            core = min(self.cores, key=len)
        core[process] = seconds

    def balance(self):
        fullest, emptiest = max(self.cores, key=len), min(self.cores, key=len)
        is_time = self.now > self.next_move
        if len(fullest) > 1 and (is_time or not emptiest) and fullest is not emptiest:
            moved = next(iter(fullest))  # the one that is there longest
            emptiest[moved] = fullest.pop(moved)
            self.next_move = self.now + self.random.expovariate(1 / MOVES)

    def advance(self):
        self.balance()
        occupied = [core for core in self.cores if core]
        beside = self.beside * (len(occupied) > 1)
        slowness = [len(c) * (1 + beside) * (1 + self.shared * (len(c) > 1)) for c in occupied]
        times = [min(core.values()) * slow for core, slow in zip(occupied, slowness)]
        elapsed = min(times)
        core = occupied[times.index(elapsed)]
        self.now += elapsed
        for other, slow in zip(occupied, slowness):
            for process in other:
                other[process] -= elapsed / slow
        process = min(core, key=core.get)
        del core[process]
        self.left[process] = self.now, core
        return process


class Queue(deque):
    """What RowQueue is to the roles, without waiting. Counts what Little's law is about."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine = machine
        self.entered = deque()
        self.waits: list[float] = []  # of each row that has left
        self.area = self.since = 0.0  # the integral of the length over time

    def count(self):
        self.area += len(self) * (self.machine.now - self.since)
        self.since = self.machine.now

    def put(self, rows):
        self.count()
        self.extend(rows)
        self.entered.extend(self.machine.now for _ in rows)

    def get(self, timeout: float = 0.0):
        if not self:
            return None
        self.count()
        self.waits.append(self.machine.now - self.entered.popleft())
        return self.popleft()

    def get_all(self, timeout: float = 0.0):
        return [self.get() for _ in range(len(self))]


# ---- one node -----------------------------------------------------------------------------------


@dataclass
class Slots:
    """A generator's slots, filled by the project's own rule."""

    slots: int
    active: list = field(default_factory=list)
    version: int = -1
    room = Generator.room


@dataclass
class Response:
    """A rollout on its way. `parts`: (weight version, tokens that it drew)."""

    row: int
    ticket: int
    prompt: int
    total: int  # response tokens when it will be done
    done: int = 0
    parts: list = field(default_factory=list)

    @property
    def length(self):
        return self.prompt + self.done


def on_node(config: Config, node: int, nodes: int):
    """The settings as a process of that node sees them."""
    return config_on(node, nodes)(**asdict(config))


@cache
def config_on(node: int, nodes: int):
    """Config, but with these numbers in the place of torchrun's."""
    return type("Config", (Config,), {"node": node, "nodes": nodes})


# Columns of the rollout table that Tickets and the roles use.
OF_ROWS = """prompt_len length ticket teacher_prompt_len teacher group group_size""".split()


class Node:
    """The roles of one node: generate.run, teacher.run, train.Leader without what they compute."""

    def __init__(self, simulation, number: int):
        self.simulation = simulation
        self.config = config = on_node(simulation.config, number, simulation.nodes)
        self.stages: Stages = simulation.stages
        machine = simulation.machine
        rows = config.table_rows
        widest = max(len(prompt.ids) for prompt in simulation.prompts)
        for_teacher = max(len(prompt.for_teacher) for prompt in simulation.prompts)
        self.channel = SimpleNamespace(
            to_generator=Queue(machine),
            to_teachers=[Queue(machine) for _ in config.teacher_processes],
            to_learner=Queue(machine),
            version=-1,
            tokens=torch.zeros(rows, widest, dtype=torch.int32),
            teacher_tokens=torch.zeros(rows, for_teacher, dtype=torch.int32),
            **{name: torch.zeros(rows, dtype=torch.int64) for name in OF_ROWS},
        )
        self.tickets = Tickets(config, self.channel, simulation.prompts)
        self.responses: dict[int, Response] = {}  # by row, from the last token to the update
        self.waited: list[float] = []  # for the other nodes, of each update
        self.learning = machine.add(number, self.learner())
        self.generating = [machine.add(number, self.generator()) for _ in range(config.generators)]
        processes = len(config.teacher_processes)
        self.scoring = [machine.add(number, self.teacher(i)) for i in range(processes)]

    def generator(self) -> Process:
        config, channel, stages = self.config, self.channel, self.stages
        share = -(-config.table_rows // config.generators)
        me, waiting = Slots(min(config.slots, share)), deque()
        while True:
            take_rows(channel, me, waiting)
            can_refresh = config.refresh == "in_flight" or not me.active
            if can_refresh and channel.version > me.version:
                version = channel.version
                yield stages.pick_up()
                me.version = version
            started = []
            while waiting and may_start(waiting[0].ticket, me.version, config):
                rollout = waiting.popleft()
                total = self.simulation.lengths(rollout.ticket)
                started.append(
                    Response(rollout.row, rollout.ticket, len(rollout.prompt_ids), total)
                )
            if started:
                me.active += started
                yield stages.prefill(sum(response.prompt for response in started))
            if not me.active:
                yield None
                continue
            steps = min(response.total - response.done for response in me.active)
            steps = min(steps, self.simulation.stride)
            length = stages.attended([response.length for response in me.active])
            yield stages.decode(len(me.active), length, steps)
            for response in me.active:
                response.done += steps
                response.parts.append((me.version, steps))
            for response in [one for one in me.active if one.done == one.total]:
                me.active.remove(response)
                self.responses[response.row] = response
                channel.length[response.row] = response.length
                channel.to_teachers[channel.teacher[response.row]].put([response.row])

    def teacher(self, index: int) -> Process:
        config, channel = self.config, self.channel
        waiting, next_group, rows = set(), 0, []
        while True:
            finished = channel.to_teachers[index].get_all()
            waiting.update(finished)
            rows = ready_rows(waiting, channel, next_group, config) if finished or rows else []
            if not rows:
                yield None
                continue
            passes = self.passes(rows, Channel.as_teacher_reads(channel))
            yield self.stages.score(passes, config.teacher_processes[index])
            next_group += 1
            channel.to_learner.put(rows)

    def passes(self, rows, table):
        """(rows, longest sequence) of each forward pass over `rows` of a table."""
        groups = row_batches(table, rows, self.config.micro_batch_tokens)
        return [(len(group), int(table.length[group].max())) for group in groups]

    def learner(self) -> Process:
        channel, tickets, stages = self.channel, self.tickets, self.stages
        channel.version = 0
        tickets.issue(0)
        for version in range(self.config.steps):
            rows = self.simulation.batch(self, version)
            while not rows:
                scored = channel.to_learner.get_all()
                if scored or self.simulation.pool:
                    tickets.receive(scored)
                    rows = self.simulation.batch(self, version)
                if not rows:
                    yield None
            # train.Leader meets the other nodes before its passes: a difference of two percent.
            yield stages.accumulate(self.passes(rows, channel))
            ready = self.simulation.machine.now
            self.simulation.arrive(version, channel.ticket[rows].tolist())
            while not self.simulation.have_met(version):
                yield None
            self.waited.append(self.simulation.machine.now - ready)
            yield stages.apply(self.simulation.nodes)
            responses = [self.responses.pop(row) for row in rows]
            tickets.trained(self.simulation.tickets_of(version))
            yield stages.publish()
            channel.version = version + 1
            tickets.issue(version + 1)
            self.simulation.count(version, responses)


# ---- a run --------------------------------------------------------------------------------------


@dataclass
class Result:
    tokens_per_second: float
    lag_mean: float
    busy: dict[str, float]  # role -> fraction of the time, a mean over its processes
    seconds: float  # an update
    waited: float = 0.0  # part of the time that a node waits for the others


@dataclass
class Simulation:
    """One run of `config`. `lengths`: ticket -> response tokens."""

    config: Config
    stages: Stages
    lengths: Callable[[int], int]
    prompts: list  # with `ids`, as support.data.Prompt
    nodes: int = 1
    cores: int = 0  # that all processes share; 0: each has a GPU
    stride: int = 1  # decode steps that are one event, at most
    pool: bool = False  # an update takes what all nodes have, not an equal share of each

    def __post_init__(self):
        self.machine = Machine()
        if self.cores:
            self.machine = Cores(self.cores, *self.stages.crowding)
        self.arrived: dict[int, list] = {}  # version -> tickets of each node that has come to it
        self.updates: dict[int, list] = {}  # version -> [when, tokens, sum of their lags, nodes]
        self.marks: list[dict] = []  # busy seconds at the end of each update
        self.at: list[Node] = []
        self.at += [Node(self, number) for number in range(self.nodes)]

    def batch(self, node: Node, version: int):
        """The rows of `node` for its next update; None: not yet."""
        if not self.pool:
            return node.tickets.batch(version)
        scored = [len(one.tickets.scored) for one in self.at]
        if version in self.arrived or sum(scored) >= self.config.batch_size and min(scored) > 0:
            self.machine.changed.update(range(self.nodes))
            self.arrived.setdefault(version, [])
            return list(node.tickets.scored.values())
        return None

    def arrive(self, version: int, tickets: list[int]):
        self.arrived.setdefault(version, []).append(tickets)
        if self.have_met(version):
            self.machine.changed.update(range(self.nodes))

    def have_met(self, version: int):
        return len(self.arrived[version]) == self.nodes

    def tickets_of(self, version: int):
        """Of all nodes."""
        return [ticket for node in self.arrived[version] for ticket in node]

    def count(self, version: int, responses: list[Response]):
        update = self.updates.setdefault(version, [0.0, 0, 0, 0])
        update[0] = self.machine.now
        update[3] += 1
        for response in responses:
            update[1] += response.total
            update[2] += sum((version - sampled) * tokens for sampled, tokens in response.parts)
        if update[3] == self.nodes:
            self.marks.append(dict(self.machine.busy))

    def run(self, skip: int = 0) -> Result:
        """All updates; the result is of those after the first `skip`."""
        while len(self.marks) < self.config.steps and self.machine.step():
            pass
        last = len(self.marks) - 1
        if last + 1 < self.config.steps and not self.pool:  # with a pool the tickets end sooner
            raise RuntimeError(f"all wait for each other after {last + 1} updates")
        began = self.updates[skip - 1][0] if skip else 0.0
        elapsed = self.updates[last][0] - began
        tokens, lags = (sum(self.updates[v][i] for v in range(skip, last + 1)) for i in (1, 2))
        before = self.marks[skip - 1] if skip else {}

        def fraction(processes):
            seconds = [self.marks[last][one] - before.get(one, 0.0) for one in processes]
            return sum(seconds) / len(seconds) / elapsed

        busy = {
            "generator": fraction([one for node in self.at for one in node.generating]),
            "teacher": fraction([one for node in self.at for one in node.scoring]),
            "learner": fraction([node.learning for node in self.at]),
        }
        waited = sum(sum(node.waited[skip:]) for node in self.at) / self.nodes / elapsed
        return Result(tokens / elapsed, lags / tokens, busy, elapsed / (last + 1 - skip), waited)


def write(name: str, rows: list[dict]):
    """A CSV in experiments/results."""
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# ---- the command line ---------------------------------------------------------------------------


def main():
    from experiments import scaling, validate  # they import this file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--validate", action="store_true", help="predict runs, make them, compare")
    what.add_argument("--paper", action="store_true", help="the paper's setting")
    what.add_argument("--scale", action="store_true", help="1 to 64 nodes")
    what.add_argument("--plan", action="store_true", help="the best split of a node's GPUs")
    what.add_argument("--calibrate", metavar="RUN", help="predict runs like this one")
    parser.add_argument("--hardware", choices=["h100"], default="h100", help="of --plan")
    parser.add_argument("--gpus", type=int, default=8, help="of --plan")
    parser.add_argument("--batch-size", type=int, default=256, help="of --plan")
    parser.add_argument("--staleness", type=int, default=1, help="of --plan")
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=scaling.PAIRS,
        metavar="PAIR",
        help="of --plan: student,teacher,mean,longest response, such as 0.6B,8B,1024,2048; "
        "8B+32B are two teachers of half of the prompts each",
    )
    parser.add_argument("flags", nargs="*", help="of --calibrate, after --: flags of train.py")
    args = parser.parse_args()
    try:
        if args.validate:
            validate.main()
        elif args.calibrate:
            validate.predict(Path(args.calibrate), args.flags)
        elif args.plan:
            scaling.plan(args.pairs, args.gpus, args.batch_size, args.staleness)
        else:
            scaling.paper() if args.paper else scaling.scale()
    except InputError as error:
        sys.exit(f"simulate: error: {error}")


if __name__ == "__main__":
    main()
