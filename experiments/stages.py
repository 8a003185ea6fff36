"""What the stages of the pipeline cost: seconds as functions of the work.

`Stages` are linear; `measured` times them on this machine, one thread each, in serial.Serial.
`H100` computes them from kernels and bytes that experiments/count.py has counted, from peaks, and
from assumed efficiencies; nothing was measured there.
"""

import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from experiments.count import Counted, Kernels
from serial import Serial
from support.config import Config
from support.data import load_prompts
from support.load import load_tokenizer


@dataclass(frozen=True)
class Stages:
    """Each pair is (seconds a call, seconds an item)."""

    step: tuple  # of decoding; (a step, an active slot, a position that a slot attends to)
    fill: tuple  # prefill; a prompt token
    pass_teacher: tuple  # a forward pass; a padded token
    pass_learner: tuple  # forward and backward; a padded token
    update: float  # clipping, optimiser and metrics
    publishing: float
    picking_up: float
    exchange: tuple = (0.0, 0.0)  # between nodes: an update; a node
    crowding: tuple = (0.0, 0.0)  # cores are slower: with another busy; with several processes

    def attended(self, lengths: list[int]):
        """Positions that each slot attends to: a masked step reads as many as the longest has."""
        return max(lengths)

    def decode(self, active: int, length: float, steps: int):
        """`steps` steps of `active` slots that attend to `length` positions before the first."""
        call, slot, position = self.step
        positions = steps * length + steps * (steps - 1) / 2
        return steps * (call + slot * active) + position * active * positions

    def prefill(self, tokens: int):
        return self.fill[0] + self.fill[1] * tokens

    def score(self, passes: list[tuple], name=""):
        """`passes`: (rows, longest sequence) of each forward pass."""
        call, token = self.pass_teacher
        return sum(call + token * rows * longest for rows, longest in passes)

    def accumulate(self, passes: list[tuple]):
        call, token = self.pass_learner
        return sum(call + token * rows * longest for rows, longest in passes)

    def apply(self, nodes: int):
        return self.update + (self.exchange[0] + self.exchange[1] * nodes) * (nodes > 1)

    def publish(self):
        return self.publishing

    def pick_up(self):
        return self.picking_up

    def scaled(self, generator=1.0, teacher=1.0, learner=1.0):
        """The same with the roles slower by these factors."""

        def times(pair, factor):
            return tuple(factor * value for value in pair)

        return replace(
            self,
            step=times(self.step, generator),
            fill=times(self.fill, generator),
            picking_up=generator * self.picking_up,
            pass_teacher=times(self.pass_teacher, teacher),
            pass_learner=times(self.pass_learner, learner),
            update=learner * self.update,
            publishing=learner * self.publishing,
        )


# ---- measured on this machine -------------------------------------------------------------------


class Stopwatch:
    """Collects (what a call worked on, its seconds), by stage."""

    def __init__(self):
        self.found: dict[str, list] = {}

    def wrap(self, stage: str, function, items):
        """`function`, timed. `items(*arguments)`: what it works on, asked before the call."""

        def timed(*arguments):
            work = items(*arguments)
            began = time.perf_counter()
            result = function(*arguments)
            self.found.setdefault(stage, []).append((work, time.perf_counter() - began))
            return result

        return timed

    def fit(self, stage: str):
        """Least squares of seconds = a + b items[0] + ..., relative to the seconds."""
        table = np.array([(1.0, *work) for work, _ in self.found[stage]])
        seconds = np.array([seconds for _, seconds in self.found[stage]])
        solution, *_ = np.linalg.lstsq(table / seconds[:, None], np.ones(len(table)), rcond=None)
        return tuple(float(max(0.0, value)) for value in solution)

    def median(self, stage: str):
        return statistics.median(seconds for _, seconds in self.found[stage])


def measured(configs: list[Config], updates: int = 5) -> Stages:
    """From updates of serial.Serial with each of `configs`, on one thread."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    for config in configs:
        watch_serial(watch, config, updates)
    return Stages(
        step=watch.fit("step"),
        fill=watch.fit("fill"),
        pass_teacher=watch.fit("teacher"),
        pass_learner=watch.fit("learner"),
        update=watch.median("update"),
        publishing=watch.median("publish"),
        picking_up=watch.median("pick up"),
    )


def watch_serial(watch: Stopwatch, config: Config, updates: int):
    prompts, held_out = load_prompts(config, load_tokenizer("--student", config.path("student")))
    serial = Serial(config, 0, prompts, held_out)
    serial.update()  # sets libraries up
    generator, learner = serial.sampler.generator, serial.learner
    teacher = serial.teachers[0]

    def slots():
        longest = max((rollout.length for rollout in generator.active), default=0)
        return len(generator.active), len(generator.active) * longest

    def padded(channel, rows):
        return (len(rows) * int(channel.length[rows].max()),)

    generator.step = watch.wrap("step", generator.step, slots)
    generator.add = watch.wrap(
        "fill", generator.add, lambda rollouts: (sum(len(one.prompt_ids) for one in rollouts),)
    )
    teacher.compute = watch.wrap("teacher", teacher.compute, padded)
    learner.backward = watch.wrap(
        "learner", learner.backward, lambda channel, rows, tokens: padded(channel, rows)
    )
    learner.step = watch.wrap("update", learner.step, lambda: ())
    for number in range(updates):
        # Batches of several sizes, or calls and items could not be told apart.
        teacher.config = learner.config = replace(config, micro_batch_tokens=8192 >> number % 4)
        serial.update()
        watch.wrap("publish", learner.publish, lambda _: ())(serial.channel)
        watch.wrap("pick up", serial.channel.pick_up, lambda _: ())(serial.sampler.weights)


# ---- predicted for an H100 ----------------------------------------------------------------------

# H100 SXM: NVIDIA's data sheet, bfloat16 without sparsity
FLOPS, BYTES, MEMORY = 989e12, 3.35e12, 80e9
NETWORK = 50e9  # bytes/s and GPU between nodes: NVIDIA's DGX H100 has one 400 Gb/s adapter a GPU
MATMUL, BANDWIDTH = 0.6, 0.6  # the parts of FLOPS and BYTES that are reached (assumed)
EXPERTS = 0.5  # a mixture of experts reaches this part of MATMUL (assumed)
LAUNCH = 2e-6  # seconds that a kernel takes besides its bytes, also in a CUDA graph (assumed)
LINK, PUBLISH = 2e11, 5e9  # bytes/s: parameters to a rank, weights into the mailbox (assumed)
HOP = 20e-6  # seconds that a step of the ring between nodes takes besides its bytes (assumed)


@dataclass(frozen=True)
class Model:
    """What the costs depend on."""

    parameters: float
    active: float  # parameters that a token uses
    layers: int
    width: int  # of all query heads together
    keys: int  # of all key-value heads together
    counted: Counted  # its kernels


def rest(kernels: Kernels, items: int):
    """Seconds of all kernels' launches, and of the bytes of those that are no products."""
    return kernels.launches * LAUNCH + kernels.bytes * items / (BYTES * BANDWIDTH)


@dataclass(frozen=True)
class H100:
    """The costs of a node of H100s, in the place of Stages. Nothing is measured."""

    student: Model
    teacher: Model | dict[str, Model]  # of several by name
    ranks: int
    recompute: bool
    teacher_gpus: int = 1
    own_lengths: bool = True  # a decode step reads each slot's own keys, not the longest's
    crowding = (0.0, 0.0)

    def attended(self, lengths: list[int]):
        return sum(lengths) / len(lengths) if self.own_lengths else max(lengths)

    def decode(self, active: int, length: float, steps: int):
        model = self.student
        length += (steps - 1) / 2
        read = 2 * model.parameters + 4 * active * length * model.layers * model.keys
        slowest = max(read / (BYTES * BANDWIDTH), self.matmuls(model, active, 1))
        return steps * (slowest + rest(model.counted.step, active))

    def matmuls(self, model: Model, rows: int, longest: int):
        """A forward pass: 2 operations a parameter and token, and causal attention."""
        tokens = rows * longest
        reached = MATMUL * (EXPERTS if model.active < model.parameters else 1.0)
        attention = 2 * model.layers * model.width * longest * tokens
        return (2 * model.active * tokens + attention) / (FLOPS * reached)

    def prefill(self, tokens: int):
        return self.matmuls(self.student, 1, tokens) + rest(self.student.counted.forward, tokens)

    def score(self, passes: list[tuple], name=""):
        """The layers lie on `teacher_gpus` GPUs and work one after the other."""
        model = self.teacher[name] if isinstance(self.teacher, dict) else self.teacher
        read = 2 * model.parameters / (BYTES * BANDWIDTH)
        kernels = model.counted.scoring
        products = (max(read, self.matmuls(model, *one)) for one in passes)
        return sum(products) + sum(rest(kernels, rows * longest) for rows, longest in passes)

    def accumulate(self, passes: list[tuple]):
        """Forward, and backward twice as much; the ranks share the passes."""
        products = sum(self.matmuls(self.student, *one) for one in passes)
        gathers = len(passes) * (3 * 2 + 4) * self.student.parameters / LINK
        kernels, again = self.student.counted.training, self.student.counted.forward
        work = (4 if self.recompute else 3) * products
        for rows, longest in passes:
            work += rest(kernels, rows * longest)
            work += rest(again, rows * longest) * self.recompute
        return max(work, gathers * (self.ranks > 1)) / self.ranks

    def apply(self, nodes: int):
        """AdamW reads and writes 20 bytes a parameter; a ring adds up 4 bytes a parameter."""
        share = self.student.parameters / self.ranks
        ring = 2 * (nodes - 1) * (4 * share / nodes / NETWORK + HOP)
        return 20 * share / (BYTES * BANDWIDTH) + ring

    def publish(self):
        return 2 * self.student.parameters / PUBLISH

    def pick_up(self):
        return 2 * self.student.parameters / PUBLISH
