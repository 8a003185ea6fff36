"""The processes of a run: devices and threads, ranks, the spawned roles, signals.

torchrun starts the learner ranks. Rank 0 starts the generators and the teachers as its daemons and
watches them. The roles ignore interrupts: they leave when rank 0 says so or is gone.

Left out: several nodes, restarting a role that died (the run ends and can be resumed).
"""

import faulthandler
import os
import select
import signal
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import generate
import teacher
from channel import Channel
from config import Config, InputError
from fork_server import INTERRUPTS, ignore_interrupts

# ---- devices and ranks ------------------------------------------------------------------------


def role_devices(config, world):
    """Learner ranks first, then generators, then teachers. They share where GPUs are few.

    A teacher above one GPU stands here with its first. Raises InputError if it lacks others.
    """
    gpus = torch.cuda.device_count()
    first = world + config.generators
    needed = first + config.teachers * config.teacher_gpus
    if config.teacher_gpus > 1 and needed > gpus:
        raise InputError(
            f"--teacher-gpus is {config.teacher_gpus}: then no GPU is shared and the roles need "
            f"{needed}, there are {gpus}: lower it, --teachers, --generators or --nproc-per-node"
        )
    places = [*range(first), *range(first, needed, config.teacher_gpus)]
    return [torch.device("cuda", i % gpus) if gpus else torch.device("cpu") for i in places]


def set_up_process(config, device, num_roles):
    """Threads and precision of a role's process."""
    share = len(os.sched_getaffinity(0)) // num_roles
    torch.set_num_threads(config.cpu_threads or max(1, share))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every shape
    faulthandler.register(signal.SIGUSR1)  # prints where every thread is
    if device.type == "cuda":
        torch.cuda.set_device(device)


def join_ranks():
    """(rank, number of learner ranks). Connects them if there are several."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if world > int(os.environ.get("LOCAL_WORLD_SIZE", world)):
        raise InputError(f"{world} ranks on several nodes: use one node, torchrun --standalone")
    if gpus and world > gpus:
        raise InputError(f"{world} learner ranks, {gpus} GPUs: lower --nproc-per-node")
    check_torchrun()
    if world > 1:
        # Rows and commands travel on gloo: waiting for them costs no GPU. Ranks wait for rank 0 as
        # long as rollouts take; torchrun ends the run when one dies.
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return rank, world


def broadcast(value=None):
    """Rank 0's value, on every rank. A rank that waits in vain leaves with one line."""
    box = [value]
    if dist.is_initialized():
        try:
            dist.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            if dist.get_rank() == 0:
                raise
            sys.exit(
                f"train.py: rank {dist.get_rank()} leaves, rank 0 does not answer: "
                f"{str(error).splitlines()[0]}"
            )
    return box[0]


def check_torchrun():
    """Raise RoleDied if torchrun is gone. It keeps the store where ranks meet."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    try:
        place = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        socket.create_connection(place, timeout=10).close()
    except OSError as error:
        raise RoleDied(f"torchrun died before the start: {error}") from None


# ---- the spawned roles ------------------------------------------------------------------------


class RoleDied(Exception):
    """A process of the run is gone. The message says which, with its traceback or signal."""


class Interrupted(Exception):
    """Ctrl-C, a terminate signal, or the end of torchrun: save and leave."""


class Roles:
    """The other processes of a run, as rank 0 sees them."""

    def __init__(self, config: Config, channel: Channel, devices, held_out, next_ticket, pids):
        """`devices`: of all roles. `held_out`: evaluation prompts. `next_ticket`: to be scored.

        `pids`: of the learner ranks.
        """
        self.channel = channel
        self.ranks = {os.pidfd_open(pid): i for i, pid in enumerate(pids)}
        self.names = [f"generator {i}" for i in range(config.generators)]
        self.names += [f"teacher {i}" for i in range(config.teachers)]
        self.interrupts = []
        for number in INTERRUPTS:  # before the roles start: none is left behind
            if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, lambda *_: self.interrupts.append(1))
        self.context = mp.start_processes(
            run_role,
            (config, channel, devices, held_out, next_ticket),
            nprocs=len(self.names),
            join=False,
            daemon=True,
            start_method="forkserver",
        )

    def check(self):
        """Raise Interrupted or RoleDied if there is nothing to wait for any more."""
        self.check_ranks()
        if self.interrupts or not self.channel.running():
            raise Interrupted
        processes = zip(self.names, self.context.processes)
        gone = [name for name, process in processes if not process.is_alive()]
        if not gone:
            return
        self.channel.stop.fill_(1)
        try:
            self.context.join(timeout=0, grace_period=3)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            reason = str(error).rpartition("InputError: ")[2].strip()  # or all of it
            raise RoleDied(f"{self.names[error.error_index]} died: {reason}") from None
        raise RoleDied(f"{gone[0]} left before the end")

    def check_ranks(self, timeout=0.0):
        """Raise RoleDied if a learner rank is gone, or goes within `timeout` seconds."""
        gone = select.select(self.ranks, [], [], timeout)[0]
        if gone:
            raise RoleDied(
                f"learner rank {self.ranks[gone[0]]} died: torchrun says how. --resume continues "
                "from the newest step_N; published_N has the last weights, for --student"
            )

    def stop(self):
        """Ask every role to leave its loop, then insist."""
        self.channel.stop.fill_(1)
        deadline = time.monotonic() + 10.0
        for process in self.context.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()


def run_role(index, config, channel, devices, held_out, next_ticket):
    """Entry of a spawned role: generators 0, 1, ..., then the teachers."""
    ignore_interrupts()
    device = devices[index - config.generators - config.teachers]  # these roles have the last
    set_up_process(config, device, len(devices))
    if index < config.generators:
        generate.run(config, channel, device, index, held_out)
    else:
        teacher.run(config, channel, device, index - config.generators, next_ticket)
