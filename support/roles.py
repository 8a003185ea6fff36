"""The processes of a node: generators and teachers, devices and threads, interrupts.

The leader starts generators and teachers as its daemons and watches them. They ignore interrupts:
they leave when the leader says so or is gone.
"""

import faulthandler
import os
import signal
import tempfile
import time
from multiprocessing import forkserver

import torch
import torch.multiprocessing as mp

from support.config import Config, require
from support.ranks import RoleDied

PRELOAD = ["transformers.models.auto.modeling_auto", "transformers.generation"]
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OUT_OF_MEMORY = """its GPU has too little memory. Generator: lower --slots or --max-new-tokens.
Teacher: lower --micro-batch-tokens or --head-chunk, or raise --teacher-gpus. Learner: the same, or
--checkpoint-activations, or raise --nproc-per-node. `python -m experiments.memory` estimates it"""


class Roles:
    """The generators and teachers of a node, as its leader sees them."""

    def __init__(self, entry, arguments, config: Config, channel):
        """Every role's process calls entry(its number, *arguments)."""
        self.channel = channel
        self.names = config.role_names[:-1]  # the learner starts them
        start_fork_server()
        try:
            options = {"join": False, "daemon": True, "start_method": "forkserver"}
            self.context = mp.start_processes(entry, arguments, len(self.names), **options)
        except (EOFError, ConnectionError):
            raise RoleDied("the fork server died while it started the roles") from None

    def check(self):
        """Raise RoleDied if one is gone."""
        if all(process.is_alive() for process in self.context.processes):
            return
        self.channel.stop.fill_(1)
        try:
            self.context.join(timeout=0, grace_period=3)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            # The message of an InputError is for users. For anything else they get the traceback.
            reason = str(error).rpartition("InputError: ")[2].strip()
            if "OutOfMemoryError" in reason:
                reason = OUT_OF_MEMORY
            raise RoleDied(f"{self.names[error.error_index]} died: {reason}") from None
        raise RoleDied("a generator or a teacher left before the end")

    def stop(self):
        """Ask every role to leave its loop, then insist."""
        self.channel.stop.fill_(1)
        deadline = time.monotonic() + 10.0
        for process in self.context.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()


def start_fork_server():
    """Start the process that the roles are forked from. It imports the libraries once for all.

    A fork of the leader itself would break CUDA.
    """
    mp.set_forkserver_preload(PRELOAD)
    if len(tempfile.gettempdir()) > 60:
        tempfile.tempdir = "/tmp"  # the path of the server's socket may have 107 characters
    handlers = ignore_interrupts()  # a new process goes on to ignore them
    forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ignore_interrupts():
    """From now on interrupts are the leader's business. Returns the handlers before."""
    return {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}


def on_interrupt(handler):
    """Call `handler` on every interrupt but those that are ignored, as SIGHUP is under nohup."""
    for number in INTERRUPTS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def role_devices(config: Config, learners: int, gpus: int):
    """Learner ranks first, then generators, then teachers. They share where GPUs are few.

    `gpus`: of the node. A teacher above one GPU stands here with its first. Raises InputError if it
    lacks others.
    """
    first = learners + config.generators
    needed = first + len(config.teacher_processes) * config.teacher_gpus
    fix = (
        f"the roles then share no GPU and need {needed}, there are {gpus}: lower it or their number"
    )
    is_enough = config.teacher_gpus == 1 or needed <= gpus
    require(is_enough, f"--teacher-gpus is {config.teacher_gpus}: {fix}")
    places = [*range(first), *range(first, needed, config.teacher_gpus)]
    return [torch.device("cuda", i % gpus) if gpus else torch.device("cpu") for i in places]


def set_up_process(config: Config, device: torch.device, num_roles: int):
    """Threads and precision of a role's process."""
    torch.set_num_threads(config.cpu_threads or max(1, len(os.sched_getaffinity(0)) // num_roles))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every shape
    faulthandler.register(signal.SIGUSR1)  # prints where every thread is
    if device.type == "cuda":
        torch.cuda.set_device(device)
