"""What the simulation says where we cannot measure.

    python -m experiments.simulate --paper, --scale or --plan

Everything here is simulated, from peaks of an H100 and assumed efficiencies
(experiments/stages.py). Response lengths are log-normal, cut at the longest (SPREAD: the standard
deviation of their logarithm, assumed).
"""

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np

from experiments import count, memory, splits
from experiments.simulate import Result, Simulation, config_on, write
from experiments.stages import H100, MEMORY, Model
from support.config import builtin
from support.data import Prompt

SPREAD = 0.8
PROMPT = 512
UPDATES, SKIP = 20, 8
STRIDE = 256  # decode steps in one event


# ---- the run to be simulated --------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is to be trained on a node's GPUs: by default the paper's setting, its mean assumed."""

    student: str = "1.7B"
    teacher: str = "30B-A3B"
    mean: int = 6144  # response tokens
    longest: int = 16_384
    batch: int = 256  # rollouts of an update, of all nodes
    gpus: int = 8
    staleness: int = 4
    window: int = 0
    updates: int = UPDATES
    own_lengths: bool = True  # decoding reads each slot's own keys; False: to the longest slot's

    @property
    def teachers(self):
        """Names of the teachers' sizes: "8B+32B" are two, of half of the prompts each."""
        return self.teacher.split("+")


@dataclass(frozen=True)
class Split:
    """How a node's GPUs are shared out."""

    ranks: int
    generators: int
    teachers: int  # processes of each teacher
    slots: int
    micro_batch_tokens: int
    recompute: bool
    teacher_gpus: int = 1

    def __str__(self):
        spread = f" x {self.teacher_gpus} GPUs" if self.teacher_gpus > 1 else ""
        again = " (recomputing)" if self.recompute else ""
        return f"{self.ranks}{again}, {self.generators}, {self.teachers}{spread}"


@cache
def response_lengths(mean: int, longest: int, spread: float = SPREAD):
    """Ticket -> response tokens: log-normal, cut at `longest`, with that mean after the cut."""
    normal = np.random.default_rng(0).standard_normal(20_000)
    low, high = 0.0, np.log(longest) + 3.0
    for _ in range(50):
        middle = (low + high) / 2
        is_short = np.minimum(np.exp(middle + spread * normal), longest).mean() < mean
        low, high = (middle, high) if is_short else (low, middle)

    def length(ticket: int):
        draw = np.random.default_rng([1, ticket]).standard_normal()
        return int(np.clip(np.exp(low + spread * draw), 1, longest))

    return cache(length)


@cache
def model_of(name: str):
    """(directory with its config.json, Model)."""
    directory = tempfile.mkdtemp()
    path = splits.write_config(directory, name)
    parameters, layers, _, _, keys = memory.model_size(path)
    _, _, _, heads, _, head, _ = splits.SHAPES[name]
    idle = splits.idle_parameters(name)
    counted = count.counted(path, builtin(max_prompt_tokens=PROMPT, micro_batch_tokens=4096))
    return path, Model(parameters, parameters - idle, layers, heads * head, keys, counted)


def config_of(job: Job, split: Split, nodes=1):
    return config_on(0, nodes)(
        student=model_of(job.student)[0],
        teacher=tuple(f"{name}={model_of(name)[0]}" for name in job.teachers),
        prompts="builtin",  # it reads none
        max_prompt_tokens=PROMPT,
        max_new_tokens=job.longest,
        batch_size=job.batch,
        micro_batch_tokens=split.micro_batch_tokens,
        slots=split.slots,
        generators=split.generators,
        teachers=str(split.teachers),
        teacher_gpus=split.teacher_gpus,
        max_staleness=job.staleness,
        checkpoint_activations=split.recompute,
        window=job.window,
        steps=job.updates,
    )


def simulated(job: Job, split: Split, nodes=1, spread=SPREAD, stages=None, **options) -> Result:
    """Updates after the first few. `stages`: in place of `costs`. `options`: of Simulation."""
    lengths = response_lengths(job.mean, job.longest, spread)
    prompts = [Prompt("", [0] * PROMPT, teacher=name) for name in job.teachers]
    options = {"nodes": nodes, "stride": STRIDE} | options
    stages = stages or costs(job, split)
    config = config_of(job, split, nodes)
    return Simulation(config, stages, lengths, prompts, **options).run(SKIP)


def costs(job: Job, split: Split, kind=H100):
    student = model_of(job.student)[1]
    teachers = {name: model_of(name)[1] for name in job.teachers}
    spread = split.recompute, split.teacher_gpus, job.own_lengths
    return kind(student, teachers, split.ranks, *spread)


# ---- the best split -----------------------------------------------------------------------------


def fitting(job: Job, teacher_gpus: int):
    """Every split of the GPUs that fits into memory."""
    budgets = {max(tokens, PROMPT + job.longest): None for tokens in (16_384, 8192, 4096)}
    choices = product((128, 64, 32, 16, 8), budgets, (False, True))
    roles = product(range(1, job.gpus), repeat=2)
    for (ranks, teachers), (slots, tokens, recompute) in product(roles, choices):
        generators = job.gpus - ranks - teachers * len(job.teachers) * teacher_gpus
        if generators < 1 or job.batch % teachers:  # equal work for every teacher
            continue
        split = Split(ranks, generators, teachers, slots, tokens, recompute, teacher_gpus)
        needed = memory.needed(config_of(job, split), ranks, 2)
        if max(needed.values()) <= memory.USABLE * MEMORY:
            yield split


def candidates(job: Job):
    """Splits that fit into memory, those that should be fastest by a closed formula first."""
    found = []
    for teacher_gpus in (1, 2, 4):
        for split in fitting(job, teacher_gpus):
            times = closed_form(job, split)
            total = max(times) if job.staleness else sum(times)
            found.append((total, sum(times), split))
        if found:  # with fewer GPUs a teacher it is never slower
            break
    return [split for *_, split in sorted(found, key=lambda one: one[:2])]


def closed_form(job: Job, split: Split):
    """Seconds of the generators, the teachers and the learner for an update, without queueing."""
    stages = costs(job, split)
    sequence = PROMPT + job.mean
    rows = max(1, split.micro_batch_tokens // sequence)
    passes = [(rows, sequence)] * -(-job.batch // rows)
    in_flight = (1 + job.staleness) * job.batch / split.generators
    slots = min(split.slots, in_flight)
    length = PROMPT + stages.attended([job.mean // 2, job.longest // 2 + job.mean // 2])
    step = stages.decode(int(slots), length, 1)
    generating = job.batch * job.mean / (slots * split.generators) * step
    learning = stages.accumulate(passes) + stages.apply(1) + stages.publish()
    scoring = max(stages.score(passes, name) for name in job.teachers)
    return generating, scoring / split.teachers / len(job.teachers), learning


def best(job: Job, tries: int = 4):
    """(the split with the most tokens/s in the simulation, its Result), or None if none fits."""
    chosen = {}
    for split in candidates(job):  # one of each sharing of the GPUs
        chosen.setdefault((split.ranks, split.generators, split.teachers), split)
    found = [(simulated(job, split), split) for split in list(chosen.values())[:tries]]
    if not found:
        return None
    result, split = max(found, key=lambda one: one[0].tokens_per_second)
    return split, result


# ---- questions ----------------------------------------------------------------------------------


def all_in_turn(job: Job, spread: float):
    """Tokens/s of synchronous training where all GPUs generate, then score, then learn.

    Nothing is charged for moving weights between the three, so real systems are slower.
    """
    gpus = job.gpus
    split = candidates(replace(job, staleness=0))[0]
    split = replace(split, generators=gpus, teachers=1, ranks=gpus)
    alone = costs(job, split, OnlyDecode)
    generating = simulated(replace(job, staleness=0), split, stages=alone, spread=spread)
    _, scoring, learning = closed_form(job, split)
    seconds = generating.seconds + scoring / gpus + learning
    return generating.tokens_per_second * generating.seconds / seconds


class OnlyDecode(H100):
    """A node in which everything but generation is free."""

    def score(self, passes):
        return 0.0

    def accumulate(self, passes):
        return 0.0

    def apply(self, nodes):
        return 0.0


def paper():
    """Asynchronous over synchronous in the paper's setting, and what the ratio hangs on."""
    base = Job()
    jobs = {
        "as assumed": (base, SPREAD),
        "decoding that reads to the longest slot": (replace(base, own_lengths=False), SPREAD),
        "answers a third shorter": (replace(base, mean=4096), SPREAD),
        "answers a third longer": (replace(base, mean=8192), SPREAD),
        "answers of nearly one length": (base, 0.2),
        "answers of very different length": (base, 1.2),
        "64 rollouts an update": (replace(base, batch=64), SPREAD),
        "1,024 rollouts an update": (replace(base, batch=1024), SPREAD),
        "staleness 1": (replace(base, staleness=1), SPREAD),
        "window 1": (replace(base, window=1), SPREAD),
        "window 4": (replace(base, window=4), SPREAD),
        "arrival order": (replace(base, window=100), SPREAD),
        "a dense teacher of 8B": (replace(base, teacher="8B"), SPREAD),
        "a dense teacher of 32B": (replace(base, teacher="32B"), SPREAD),
    }
    rows = []
    for name, (job, spread) in jobs.items():
        split, _ = best(job)
        synchronous = replace(job, staleness=0, window=0)
        slow_split, _ = best(synchronous)
        fast = simulated(job, split, spread=spread)
        slow = simulated(synchronous, slow_split, spread=spread)
        turns = all_in_turn(job, spread)
        row = {
            "setting": name,
            "split": split,
            "tokens_per_second": round(fast.tokens_per_second),
            "over_split_sync": round(fast.tokens_per_second / slow.tokens_per_second, 2),
            "over_sync_in_turn": round(fast.tokens_per_second / turns, 2),
            "lag_mean": round(fast.lag_mean, 2),
            **{f"{role}_busy": round(value, 2) for role, value in fast.busy.items()},
        }
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    write("simulated_paper.csv", rows)


NODES = (1, 4, 16, 64)


def scale():
    """1 to 64 nodes: a batch that grows with them, and one that does not; and what would help."""
    split, _ = best(Job())
    variants = {  # changes of the job, options of the simulation
        "as built": ({}, {}),
        "arrival order": ({"window": 100}, {}),
        "shared pool": ({"window": 100}, {"pool": True}),
        "staleness 1": ({"staleness": 1}, {}),
        "reading to the longest slot": ({"own_lengths": False}, {}),
    }
    rows = []
    for growth in ("256 rollouts a node", "1,024 rollouts"):
        for name, (changes, options) in variants.items():
            for nodes in NODES:
                batch = 256 * nodes if growth.endswith("node") else 1024
                job = replace(Job(batch=batch, updates=14), **changes)
                rows.append(scaled_row(growth, name, nodes, job, split, options))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    write("simulated_nodes.csv", rows)


def scaled_row(growth, name, nodes, job, split, options):
    result = simulated(job, split, nodes, **options)
    return {
        "batch": growth,
        "variant": name,
        "nodes": nodes,
        "tokens_per_second": round(result.tokens_per_second),
        "lag_mean": round(result.lag_mean, 2),
        "waiting_for_nodes": round(result.waited, 3),
        **{f"{role}_busy": round(value, 3) for role, value in result.busy.items()},
    }


PAIRS = [
    f"{student},{teacher},{lengths}"
    for student, teacher in (("0.6B", "8B"), ("1.7B", "8B"), ("1.7B", "30B-A3B"), ("8B", "32B"))
    for lengths in ("1024,2048", "8192,16384")
]
HEAD = """| student, teacher | response tokens: mean, longest \
| learner ranks, generators, teachers | `--slots`, `--micro-batch-tokens` \
| GiB: learner, generator, teacher | seconds an update | tokens/s \
| busy: learner, generators, teachers |
|---|---|---|---|---|---|---|---|"""


def plan(pairs: list[str], gpus: int, batch: int, staleness: int):
    """Print a table: the best split for each pair."""
    print(HEAD)
    for pair in pairs:
        student, teacher, mean, longest = pair.split(",")
        job = Job(student, teacher, int(mean), int(longest), batch, gpus, staleness)
        cells = [f"{student}, {teacher}", f"{job.mean:,}, {job.longest:,}"]
        found = best(job)
        if not found:
            print("| " + " | ".join([*cells, "none fits"]) + " |")
            continue
        split, result = found
        sizes = memory.needed(config_of(job, split), split.ranks, 2)
        busy = [result.busy[role] for role in ("learner", "generator", "teacher")]
        cells += [
            str(split) + " of each" * (len(job.teachers) > 1),
            f"{split.slots}, {split.micro_batch_tokens:,}",
            ", ".join(f"{size / 2**30:.0f}" for size in sizes.values()),
            f"{result.seconds:.1f}",
            f"{result.tokens_per_second:,.0f}",
            ", ".join(f"{100 * value:.0f}" for value in busy) + " %",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
