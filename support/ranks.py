"""The learner ranks: the processes that torchrun starts. They train one model together.

`rank` and `world_size` are torch's, over all nodes. `local_rank` and `local_world_size` are those
of a node. Local rank 0 leads its node: it has the node's channel and decides what comes next. The
others do what it tells them. Rank 0 leads node 0, which reads the input, evaluates and saves.

Parameters lie on a mesh [nodes, ranks of a node]: sharded over the ranks of a node, a copy on every
node. Once an update the leaders exchange what they have at hand. Words travel on gloo, because
waiting there costs no GPU. Gradients travel on NCCL.

A process that dies closes its sockets, so who waits for it gets an error. A machine that vanishes
without closing them is noticed after PATIENCE. Who dies before all have joined is waited for
during JOINING.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from support.config import from_torchrun, refusal, require

JOINING = timedelta(minutes=3)  # from the first rank's imports to the last's
PATIENCE = timedelta(days=1)  # of ranks and nodes for each other: the rollouts of an update


class RoleDied(Exception):
    """A process of the run is gone. The message says which, with its traceback or signal."""


class Interrupted(Exception):
    """Ctrl-C, a terminate signal, or the end of torchrun: save and leave."""


@dataclass
class Ranks:
    """The ranks of a run, as one of them sees them. `Ranks()` is a run of one."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    parent: int = 0  # the process id of torchrun

    def __post_init__(self):
        self.node, self.local_rank = divmod(self.rank, self.local_world_size)
        self.nodes = self.world_size // self.local_world_size
        self.own_node = self.everyone = None
        if self.world_size > 1:
            self.everyone = dist.new_group(timeout=PATIENCE)
            self.own_node, _ = dist.new_subgroups(self.local_world_size, timeout=PATIENCE)
            self.numbers = torch.arange(self.world_size).view(self.nodes, -1)
            self.across, _ = dist.new_subgroups_by_enumeration(self.numbers.T.tolist(), PATIENCE)

    def is_orphan(self):
        """Is torchrun gone? A run without torchrun outlives the shell that started it."""
        return "RANK" in os.environ and os.getppid() != self.parent

    def broadcast(self, value, group):
        """The value of the group's first rank, on every rank of it."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]

    def tell(self, value=None):
        """The leader's value, on every rank of its node."""
        return self.broadcast(value, self.own_node)

    def gather(self, value):
        """The values of all ranks of all nodes, in their order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.everyone)
        return values

    def exchange(self, part: dict):
        """Leaders: wait for the other nodes; returns the parts of all, in their order.

        Raises RoleDied if a node is gone. An interrupt meanwhile is heard afterwards.
        """
        parts = [part] * self.nodes
        if self.nodes > 1:
            try:
                dist.all_gather_object(parts, part, group=self.across)
            except RuntimeError:
                raise RoleDied("another node is gone: its torchrun says how") from None
        return parts


def join(parent: int):
    """Connect the ranks that torchrun, process `parent`, has started. Returns Ranks."""
    rank = from_torchrun("RANK", 0)
    world_size = from_torchrun("WORLD_SIZE", 1)
    local_world_size = from_torchrun("LOCAL_WORLD_SIZE", 1)
    gpus = torch.cuda.device_count()
    is_even = world_size == local_world_size * from_torchrun("GROUP_WORLD_SIZE", 1)
    require(is_even, "the nodes have different --nproc-per-node: make them the same")
    fits = local_world_size <= gpus or gpus == 0
    require(fits, f"{local_world_size} learner ranks, {gpus} GPUs: lower --nproc-per-node")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torch itself would try for long
        with refusal("torchrun has died: its store, where the ranks meet, does not answer"):
            place = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            socket.create_connection(place, timeout=10).close()
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=JOINING)
    return Ranks(rank, world_size, local_world_size, parent)
