"""Ranks and nodes: each node runs a whole pipeline, and once an update they add up their gradients.

A node has its own channel, generators and teachers. It has its own copy of the student, which its
learner ranks share; rank 0 of a node leads it. Node k of n has the tickets with ticket % n == k. So
the nodes make one batch together, and an update has the same tickets on any number of them.

The nodes meet before they add anything up: each leader writes into torchrun's store that its part
of the update is there, and waits until all have. So waiting for a long answer is no failure, and a
node can say at any time why it leaves. A node without a sign of life is dead. When one is gone the
others leave, too.

Left out: nodes that join later, an exchange that overlaps with the backward pass.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from config import InputError, from_torchrun

BEAT = 5.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one, until a node counts as dead
TRANSFER = timedelta(minutes=10)  # for the gradient, once all nodes have met
WEEK = timedelta(days=7)  # ranks wait for their leader as long as rollouts take


class RoleDied(Exception):
    """A process of the run is gone. The message says which, with its traceback or signal."""


class Interrupted(Exception):
    """Ctrl-C, a terminate signal, or the end of torchrun: save and leave."""


# ---- ranks ------------------------------------------------------------------------------------


def join():
    """Connect the learner ranks that torchrun has started, if there are several."""
    rank = from_torchrun("LOCAL_RANK", 0)
    world = from_torchrun("LOCAL_WORLD_SIZE", 1)
    node = from_torchrun("GROUP_RANK", 0)
    count = from_torchrun("GROUP_WORLD_SIZE", 1)
    gpus = torch.cuda.device_count()
    if from_torchrun("WORLD_SIZE", 1) != world * count:
        raise InputError("the nodes have different --nproc-per-node: make them the same")
    if world > gpus > 0:
        raise InputError(f"{world} learner ranks, {gpus} GPUs: lower --nproc-per-node")
    check_torchrun()
    if world * count > 1:
        # What a leader says travels on gloo: waiting for it costs no GPU.
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return Nodes(rank, world, node, count)


def check_torchrun():
    """Raise RoleDied if torchrun is gone. It keeps the store where ranks meet."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    try:
        socket.create_connection(store_address(), timeout=10).close()
    except OSError as error:
        raise RoleDied(f"torchrun died before the start: {error}") from None


def store_address():
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def broadcast(value=None, group=None):
    """The value of the first rank, on every rank. One that waits in vain leaves with one line."""
    box = [value]
    if dist.is_initialized():
        try:
            dist.broadcast_object_list(box, group=group, group_src=0)
        except RuntimeError:
            if dist.get_rank(group) == 0:
                raise RoleDied("a rank or a node died: torchrun says how")
            sys.exit(f"train.py: rank {dist.get_rank()} leaves, its leader is gone")
    return box[0]


def from_every_rank(value):
    """The values of all ranks of all nodes, in their order."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


# ---- nodes ------------------------------------------------------------------------------------


class Nodes:
    """The nodes of a run, as learner rank `rank` of `world` on number `node` of `count` sees them.

    What needs the store is for leaders, whose `rank` is 0.
    """

    def __init__(self, rank=0, world=1, node=0, count=1):
        self.rank = rank
        self.world = world
        self.node = node
        self.count = count
        self.ranks = self.peers = self.store = None
        self.waited = 0.0  # seconds for the others, before the last update
        self.heard = {}  # node -> (its last sign of life, when that was new)
        if dist.is_initialized():
            numbers = [range(first, first + world) for first in range(0, world * count, world)]
            self.ranks = dist.new_subgroups_by_enumeration(numbers, WEEK)[0]  # of this node
            self.peers = dist.new_subgroups_by_enumeration([*zip(*numbers)], TRANSFER)[0]
        if count > 1 and rank == 0:
            self.store = dist.TCPStore(*store_address(), timeout=timedelta(seconds=SILENCE))
            self.say()
            self.store.add(f"beat {node}", 1)  # before `check`, which keeps the store busy
            threading.Thread(target=self.beat, daemon=True).start()

    def tell(self, value=None):
        """The leader's value, on every rank of the node."""
        return broadcast(value, self.ranks)

    def add_up(self, tensor):
        """Every rank: replace the tensor by its sum over the nodes. Raises RuntimeError."""
        dist.all_reduce(tensor, group=self.peers)

    def say(self, **word):
        """Let the other nodes know, in place of what was said before. `leaves`: why we leave."""
        with suppress(RuntimeError):  # `check` notices when the store is gone
            if self.store:
                word["host"] = socket.gethostname()
                self.store.set(f"word {self.node}", json.dumps(word))

    def beat(self):
        """A thread: signs of life as long as the process lives."""
        with suppress(RuntimeError):
            while True:
                self.store.add(f"beat {self.node}", 1)
                time.sleep(BEAT)

    def check(self):
        """What the nodes have said. Raises RoleDied if one has left or is dead."""
        if not self.store:
            return []
        keys = [f"{kind} {node}" for kind in ("word", "beat") for node in range(self.count)]
        try:
            values = self.store.multi_get(keys)
        except RuntimeError:
            raise RoleDied("torchrun's store does not answer: its node is gone") from None
        words = [json.loads(value) for value in values[: self.count]]
        for node, (word, beat) in enumerate(zip(words, values[self.count :])):
            reason = word.get("leaves")
            last, since = self.heard.get(node, (None, 0.0))
            if last != beat:
                self.heard[node] = beat, time.monotonic()
            elif time.monotonic() - since > SILENCE and reason is None:
                reason = f"no sign of life for {SILENCE:.0f} s"
            if reason:
                raise RoleDied(f"node {node} ({word['host']}) is gone: {reason}")
        return words

    def meet(self, update: int, part, check):
        """Wait until all nodes have come to `update`. Returns the `part` of each, in their order.

        `check` is called while we wait. It raises if this node must leave.
        """
        started = time.monotonic()
        self.say(update=update, part=part)
        words = self.check()
        while any(word.get("update") != update for word in words):
            time.sleep(0.005)
            check()
            words = self.check()
        self.waited = time.monotonic() - started
        return [word["part"] for word in words] or [part]
