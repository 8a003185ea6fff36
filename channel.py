"""What the roles of a node share: the rollout table, the row queues, the weight mailbox.

All of it is one anonymous file in memory (memfd) and a few pipes. The node's leader (its first
learner rank) makes them, and the other roles open them under /proc/<pid>/fd. Nothing has a name in
/dev/shm, so no crash leaves anything behind, and a container's 64 MiB of /dev/shm is no limit. The
pipes carry row numbers. No tensor is pickled or sent.

How one rollout travels:
  1. the leader writes a ticket and its prompt into a free row, and puts the row on `to_generator`
  2. a generator fills in tokens, candidates and behavior_logp and puts the row on the queue of the
     teacher process that the leader chose, one of `to_teachers`
  3. the teacher fills in teacher_logp and puts the row on `to_learner`
  4. the learner trains on the row; the leader gives the row to the next ticket (tickets.py)

Left out: systems other than Linux. Each node has a channel of its own.
"""

import fcntl
import math
import os
import re
import select
import struct
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from support.config import Config

STOP, LENGTH = 1, 2  # `finish`: the last token is a stop token / the response was cut
PAGE = 4096
f32, f64, i32, i64 = torch.float32, torch.float64, torch.int32, torch.int64


# One array of the shared memory. `dtype` None: that of the published weights.
# `shape`: a letter or a number for each dimension.
Field = namedtuple("Field", "dtype shape")


def is_readable(fd: int, timeout: float = 0.0):
    """Is there something to read, within `timeout` seconds? `select` takes no fd above 1,023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * timeout))


class RowQueue:
    """Row numbers in a pipe, for any number of writers and readers.

    The kernel makes reads and writes of up to 4,096 bytes atomic. So there is no lock that a killed
    process could hold for ever, and readers see up to 1,024 rows of one `put` together.
    """

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def put(self, rows: list[int]):
        for start in range(0, len(rows), PAGE // 4):
            part = rows[start : start + PAGE // 4]
            os.write(self.fd, struct.pack(f"{len(part)}i", *part))

    def get(self, timeout: float = 0.0):
        """The next row. None if there is none for `timeout` seconds, or if others took it."""
        is_readable(self.fd, timeout)
        try:
            return struct.unpack("i", os.read(self.fd, 4))[0]
        except BlockingIOError:
            return None

    def get_all(self, timeout: float = 0.0):
        """Every row that is there. Waits up to `timeout` seconds for the first."""
        first = self.get(timeout)
        return [] if first is None else [first, *iter(self.get, None)]


class Channel:
    """The shared memory. Every Field below is a tensor of that name on an instance.

    R rows, L longest sequence, U longest that a teacher reads, M longest response, C candidates,
    P parameters, D generators, Z teacher processes, Q roles (generators, teachers, learner),
    J evaluation prompts at most.
    """

    # the rollout table           who writes it -> who reads it
    tokens = Field(i32, "R L")  # leader: prompt; generator: response -> all
    prompt_len = Field(i32, "R")  # leader -> all
    length = Field(i32, "R")  # generator -> teacher, learner; of prompt and response
    ticket = Field(i64, "R")  # leader -> all
    teacher_tokens = Field(i32, "R U")  # leader: teacher's prompt; generator: response -> teacher
    teacher_prompt_len = Field(i32, "R")  # leader -> generator, teacher
    teacher = Field(i32, "R")  # leader -> generator, learner; number of the teacher process
    group = Field(i64, "R")  # leader -> teacher; see Tickets.assign_teachers
    group_size = Field(i32, "R")  # leader -> teacher
    finish = Field(i32, "R")  # generator -> learner; STOP or LENGTH
    weight_version = Field(i32, "R M")  # generator -> learner
    candidate_ids = Field(i32, "R M C")  # generator; teacher: its own top K -> teacher, learner
    behavior_logp = Field(f32, "R M C")  # generator -> learner
    teacher_logp = Field(f32, "R M C")  # teacher -> learner
    top_overlap = Field(f32, "R")  # teacher -> learner; see Teacher.overlap
    # the mailbox: version v lies in weights[v % 2]
    version = Field(i64, "1")  # leader -> generator
    weights = Field(None, "2 P")  # leader -> generator
    # control and counters
    stop = Field(i64, "1")  # leader -> all
    eval_asked = Field(i64, "1")  # leader -> generators; evaluations asked for so far
    eval_done = Field(i64, "D")  # each generator -> leader; evaluations made so far
    eval_correct = Field(i64, "J")  # generators -> leader; see generate.JUDGED
    busy = Field(f64, "Q")  # each role its own -> leader; seconds
    cache_stats = Field(i64, "Z 4")  # each teacher -> leader; hits, misses, bytes, evictions

    def __init__(self, config: Config, num_parameters: int, dtype: torch.dtype, paths: list[str]):
        """Open the channel that `create` made: `paths` are its own. `dtype`: of the weights."""
        places, size = memory_layout(config, num_parameters, dtype)
        block = torch.from_file(paths[0], shared=True, size=size, dtype=torch.uint8)  # [bytes]
        for name, (kind, shape, start, stop) in places.items():
            setattr(self, name, block[start:stop].view(kind).view(shape))
        self.arguments = config, num_parameters, dtype, paths
        self.to_generator, self.to_learner, *self.to_teachers = map(RowQueue, paths[1:])
        leader = int(paths[0].split("/")[2])  # of /proc/<pid>/fd/<fd>
        self.leader = os.pidfd_open(leader)  # readable once the process has ended

    def __reduce__(self):
        """A channel is sent to another process as what opens it there."""
        return Channel, self.arguments

    @classmethod
    def create(cls, config: Config, num_parameters: int, dtype):
        """Make the channel, in the leader. Raises MemoryError if the machine has too little."""
        _, size = memory_layout(config, num_parameters, dtype)
        check_memory(size, config)
        memory = os.memfd_create("rollout_table")
        os.posix_fallocate(memory, 0, size)
        # The writing ends stay open unused, or the pipes would end with their first writer.
        pipes = [os.pipe()[0] for _ in range(2 + len(config.teacher_processes))]
        for pipe in pipes:  # a full table fits, though the kernel fills its pages badly
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**18)
        paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in (memory, *pipes)]
        return cls(config, num_parameters, dtype, paths)

    def running(self):
        """False once the leader said stop or is gone. Every loop of a role asks."""
        return not self.stop.item() and not is_readable(self.leader)

    def as_teacher_reads(self):
        """The sequences of the table with the teacher's prompts: tokens, prompt_len, length."""
        length = self.teacher_prompt_len + self.length - self.prompt_len
        return SimpleNamespace(
            tokens=self.teacher_tokens, prompt_len=self.teacher_prompt_len, length=length
        )

    # ---- the weight mailbox -------------------------------------------------------------------

    def pin(self, device):
        """For a GPU: lock the mailbox into memory, so that it is copied at the speed of the bus."""
        if device.type == "cuda":
            memory = (self.weights.data_ptr(), self.weights.nbytes)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(*memory, 0))

    def publish(self, parts, version: int):
        """Leader: write the student's parameters, then raise the version.

        `parts` are tensors that make up the parameters [P], one after the other. Readers of the
        current version are in the other buffer.
        """
        start = 0
        for part in parts:
            self.weights[version % 2, start : start + part.numel()].copy_(part.flatten())
            start += part.numel()
        self.version.fill_(version)

    def pick_up(self, flat):
        """Generator: copy the newest parameters into `flat` [P] and return their version.

        If the version rose during the copy, the writer may have come back to the buffer that we
        read. Then we copy again.
        """
        while True:
            version = int(self.version)
            flat.copy_(self.weights[version % 2])
            if int(self.version) == version:
                return version


def memory_layout(config, num_parameters, dtype):
    """Field name -> (dtype, shape, first byte, last byte + 1), and the bytes of all."""
    sizes = {
        "R": config.table_rows,
        "L": config.max_sequence,
        "U": config.max_teacher_sequence,
        "M": config.max_new_tokens,
        "C": config.num_candidates,
        "P": num_parameters,
        "Q": len(config.role_names),
        "Z": len(config.teacher_processes),
        "D": config.generators,
        "J": config.eval_size,
    }
    places = {}
    start = 0
    for name, item in vars(Channel).items():
        if isinstance(item, Field):
            # A letter stands for its size, a number for itself.
            shape = [sizes.get(word) or int(word) for word in item.shape.split()]
            kind = item.dtype or dtype
            stop = start + math.prod(shape) * kind.itemsize
            places[name] = kind, shape, start, stop
            start = math.ceil(stop / PAGE) * PAGE
    return places, start


# ---- host memory ------------------------------------------------------------------------------


def check_memory(needed: int, config: Config):
    """Raise MemoryError before anything is allocated."""
    free = available_memory()
    if needed > 0.9 * free:
        sizes = f"{needed / 2**20:,.0f} MiB of shared memory, {free / 2**20:,.0f} are available"
        fix = "lower --batch-size, --max-staleness, --max-new-tokens, --top-k or --num-samples"
        raise MemoryError(f"rollout table and weight mailbox need {sizes}: {fix}")


def available_memory():
    """Bytes that may still be used: what the kernel calls available."""
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


# ---- one rollout ------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One prompt on its way through a slot. The fields after `row` are filled in as it goes."""

    prompt_ids: list[int]
    ticket: int = 0
    row: int = 0
    finish: int = 0  # STOP or LENGTH
    weight_version: list[int] = field(default_factory=list)  # that sampled each response token
    candidate_ids: Tensor = None  # int64 [T,C], column 0 the response
    behavior_logp: Tensor = None  # float32 [T,C]

    @property
    def length(self):
        return len(self.prompt_ids) + len(self.weight_version)

    @property
    def response_ids(self):
        return self.candidate_ids[:, 0].tolist()


def write_prompt(channel: Channel, row: int, ids: list[int], teacher_ids: list[int]):
    """Fill in the prompt of a row, as the student and as the teacher reads it."""
    channel.tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    channel.prompt_len[row] = len(ids)
    channel.teacher_tokens[row, : len(teacher_ids)] = torch.tensor(teacher_ids, dtype=torch.int32)
    channel.teacher_prompt_len[row] = len(teacher_ids)


def read_rollout(channel: Channel, row: int):
    """The rollout that a row's prompt starts."""
    prompt = channel.tokens[row, : channel.prompt_len[row]].tolist()
    return Rollout(prompt, int(channel.ticket[row]), row)


def write_rollout(channel: Channel, rollout: Rollout):
    """Fill in the generator's columns of the rollout's row."""
    row = rollout.row
    tokens, columns = rollout.candidate_ids.shape  # forward KL: the teacher adds its own columns
    response = rollout.candidate_ids[:, 0]
    channel.tokens[row, len(rollout.prompt_ids) : rollout.length] = response
    start = int(channel.teacher_prompt_len[row])
    channel.teacher_tokens[row, start : start + tokens] = response
    channel.length[row] = rollout.length
    channel.finish[row] = rollout.finish
    channel.weight_version[row, :tokens] = torch.tensor(rollout.weight_version)
    channel.candidate_ids[row, :tokens, :columns] = rollout.candidate_ids
    channel.behavior_logp[row, :tokens, :columns] = rollout.behavior_logp
