"""Everything the roles share: the rollout table, the row queues, the ticket rule, the weight mailbox.

    R  rows of the table     T  longest sequence     M  longest response     C  candidates at a position
    P  parameters of the student                     Q  roles: generators, teacher, learner

All of it is one anonymous file in memory (memfd) and three pipes, made by rank 0 of the node and opened by
the other roles under /proc/<pid>/fd. Nothing has a name in /dev/shm, so no crash leaves anything behind, and
a container's 64 MiB of /dev/shm is no limit. The pipes carry row numbers; no tensor is pickled or sent.

How one rollout travels:
  1. rank 0 writes ticket and prompt into a free row and puts the row on `to_generator`
  2. a generator fills in tokens, candidates and behavior_logp and puts the row on `to_teacher`
  3. the teacher fills in teacher_logp and puts the row on `to_learner`
  4. the learner trains it; rank 0 gives the row to the next ticket

The one inequality that decides how asynchronous the run is: ticket n may start once

    n < (weight_version + 1 + max_staleness) * batch_size

Left out: shared memory across nodes (each node has its own channel), non-Linux systems.
"""

from __future__ import annotations

import fcntl
import math
import os
import select
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from data import TicketOrder

STOP, LENGTH = 1, 2  # `finish`: the last token is a stop token / the response was cut at M tokens


@dataclass(frozen=True)
class Field:
    name: str
    dtype: torch.dtype
    shape: str  # one letter or number per dimension
    writer: str
    readers: str


def layout(weight_dtype: torch.dtype) -> list[Field]:
    f32, f64, i32, i64 = torch.float32, torch.float64, torch.int32, torch.int64
    return [
        Field("tokens", i32, "R T", "rank 0: prompt, generator: response", "generator teacher learner"),
        Field("prompt_len", i32, "R", "rank 0", "generator teacher learner"),
        Field("length", i32, "R", "generator", "teacher learner"),  # prompt + response, stop token included
        Field("ticket", i64, "R", "rank 0", "generator teacher learner"),
        Field("finish", i32, "R", "generator", "learner"),
        Field("weight_version", i32, "R M", "generator", "learner"),
        Field("candidate_ids", i32, "R M C", "generator, teacher for its own top-K", "teacher learner"),
        Field("behavior_logp", f32, "R M C", "generator", "learner"),
        Field("teacher_logp", f32, "R M C", "teacher", "learner"),
        # the mailbox: version v lies in weights[v % 2]
        Field("version", i64, "1", "rank 0", "generator"),
        Field("weights", weight_dtype, "2 P", "rank 0", "generator"),
        # control and counters
        Field("stop", i64, "1", "rank 0", "all"),
        Field("eval_due", i64, "1", "rank 0", "generator 0"),  # 1 + version to evaluate
        Field("eval_done", i64, "1", "generator 0", "rank 0"),
        Field("eval_accuracy", f64, "1", "generator 0", "rank 0"),
        Field("busy", f64, "Q", "each role its own", "rank 0"),  # seconds
        Field("cache_stats", i64, "4", "teacher", "rank 0"),  # hits, misses, bytes, evictions
    ]


class RowQueue:
    """Row numbers in a pipe, for any number of writers and readers.

    The kernel makes reads and writes of up to 4,096 bytes atomic, so there is no lock that a killed process
    could take to its grave, and `get` can time out.
    """

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def put(self, rows: list[int]):
        for i in range(0, len(rows), 1024):
            part = rows[i : i + 1024]
            os.write(self.fd, struct.pack(f"{len(part)}i", *part))

    def get(self, timeout: float = 0.0) -> int | None:
        """The next row, or None after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return struct.unpack("i", os.read(self.fd, 4))[0]
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                select.select([self.fd], [], [], left)


class Channel:
    """Attribute access to every field of `layout`, and the queues `to_generator`, `to_teacher`, `to_learner`."""

    QUEUES = ("to_generator", "to_teacher", "to_learner")

    def __init__(self, config: Config, num_parameters: int, weight_dtype: torch.dtype, paths: list[str] | None = None):
        """Make the channel (`paths` None: rank 0) or open it from rank 0's `paths`.

        Raises MemoryError, before anything is allocated, when the machine has less memory than the table needs.
        """
        sizes = {
            "R": config.table_rows, "T": config.max_sequence, "M": config.max_new_tokens, "C": config.columns["total"].stop,
            "P": num_parameters, "Q": config.generators + 2,
        }  # fmt: skip
        offset, places = 0, []
        for item in layout(weight_dtype):
            shape = [sizes.get(letter) or int(letter) for letter in item.shape.split()]
            nbytes = math.prod(shape) * item.dtype.itemsize
            places.append((item, shape, offset, nbytes))
            offset += -(-nbytes // 4096) * 4096  # whole pages
        self._kept = []  # descriptors that must stay open as long as anyone opens us by path
        if paths is None:
            check_space(offset, available_memory(), config)
            memory = os.memfd_create("rollout_table")
            os.posix_fallocate(memory, 0, offset)
            pipes = [os.pipe() for _ in self.QUEUES]
            for read_end, _ in pipes:  # a full table fits, though the kernel fills its pages badly
                fcntl.fcntl(read_end, fcntl.F_SETPIPE_SZ, 2**18)
            self._kept = [memory, *(end for pipe in pipes for end in pipe)]
            paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in (memory, *(pipe[0] for pipe in pipes))]
            # torchrun, if it started us and we can see it; a shell may go and leave us running
            leader = "RANK" in os.environ and os.getppid() or os.getpid()
        else:
            leader = int(paths[0].split("/")[2])  # rank 0
        self.paths, self.leader = paths, os.pidfd_open(leader)
        block = torch.from_file(paths[0], shared=True, size=offset, dtype=torch.uint8)
        for item, shape, start, nbytes in places:
            setattr(self, item.name, block[start : start + nbytes].view(item.dtype).view(shape))
        for name, path in zip(self.QUEUES, paths[1:]):
            setattr(self, name, RowQueue(path))

    def running(self) -> bool:
        """False once rank 0 said stop or the process that leads us is gone: every loop and wait asks."""
        return not self.stop.item() and not select.select([self.leader], [], [], 0)[0]

    # ---- weight mailbox ---------------------------------------------------------------------------

    def publish(self, flat: Tensor, version: int):
        """Rank 0: write the student's parameters [P] into the buffer no reader is on, then raise the version."""
        self.weights[version % 2].copy_(flat)
        self.version.fill_(version)

    def pick_up(self, flat: Tensor) -> int:
        """Generator: copy the newest parameters into `flat` [P] and return their version.

        The writer can only be in the buffer we read once it has raised the version since; then we copy again.
        """
        while True:
            version = int(self.version)
            flat.copy_(self.weights[version % 2])
            if int(self.version) == version:
                return version


def available_memory() -> int:
    """Bytes that this process group may still use: what the kernel calls available, or less under a cgroup limit."""
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(info["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        counts = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        free = min(free, int(limit.read_text()) - int(used.read_text()) + int(counts.get("inactive_file", 0)))
    return free


def check_space(needed: int, free: int, config: Config):
    if needed > 0.9 * free:
        raise MemoryError(
            f"the rollout table and the weight mailbox need {needed / 2**20:,.0f} MiB of shared memory, {free / 2**20:,.0f} MiB "
            f"are available: lower --batch-size ({config.batch_size}), --max-staleness ({config.max_staleness}), "
            f"--max-new-tokens ({config.max_new_tokens}) or the candidates per position ({config.columns['total'].stop}), "
            "or give the container more memory"
        )


# ---- tickets --------------------------------------------------------------------------------------


def may_start(ticket: int, weight_version: int, config: Config) -> bool:
    """The inequality: may rollout number `ticket` be sampled by weights of `weight_version`?"""
    return ticket < (weight_version + 1 + config.max_staleness) * config.batch_size


class Tickets:
    """Rank 0's books: which row carries which ticket, which may start, which were trained."""

    def __init__(self, config: Config, channel: Channel, prompts: list, version: int, trained_ahead: list[int]):
        """`version` updates were made; `trained_ahead`: tickets they trained beyond an untrained one (arrival order)."""
        self.config, self.channel, self.prompts = config, channel, prompts
        self.order = TicketOrder(len(prompts), config.samples_per_prompt, config.seed)
        self.free = list(range(config.table_rows))
        self.scored: dict[int, int] = {}  # ticket -> row, in order of arrival
        self.trained_ahead = set(trained_ahead)
        self.lowest = self.next = version * config.batch_size - len(trained_ahead)  # all below were trained

    def issue(self, version: int):
        """Give free rows to the tickets that weights of `version` admit, with their prompts, in one write."""
        rows, last = [], self.config.steps * self.config.batch_size
        while self.free and self.next < last and may_start(self.next, version, self.config):
            ticket, self.next = self.next, self.next + 1
            if ticket in self.trained_ahead:
                continue
            row, ids = self.free.pop(), self.prompts[self.order(ticket)].ids
            self.channel.tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.channel.prompt_len[row], self.channel.ticket[row] = len(ids), ticket
            rows.append(row)
        self.channel.to_generator.put(rows)

    def next_batch(self, version: int, keep_waiting: Callable[[], bool]) -> list[int] | None:
        """Rows of the next update, in ticket order or as they arrived; None once `keep_waiting()` is false."""
        size = self.config.batch_size
        wanted = range(version * size, (version + 1) * size)
        while keep_waiting():
            ready = [t for t in (wanted if self.config.order == "batch" else self.scored) if t in self.scored][:size]
            if len(ready) == size:
                return [self.scored[ticket] for ticket in ready]
            row = self.channel.to_learner.get(0.5)
            while row is not None:
                self.scored[int(self.channel.ticket[row])] = row
                row = self.channel.to_learner.get()

    def trained(self, rows: list[int]):
        """Free the rows of an update and remember their tickets."""
        for row in rows:
            ticket = int(self.channel.ticket[row])
            del self.scored[ticket]
            self.trained_ahead.add(ticket)
            self.free.append(row)
        while self.lowest in self.trained_ahead:
            self.trained_ahead.remove(self.lowest)
            self.lowest += 1
        self.next = max(self.next, self.lowest)
