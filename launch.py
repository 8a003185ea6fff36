"""The processes of a node: devices and threads, the spawned roles, signals.

torchrun starts the learner ranks. Rank 0 starts the generators and the teachers as its daemons and
watches them. The roles ignore interrupts: they leave when rank 0 says so or is gone.

Left out: restarting a role that died (the run ends and can be resumed).
"""

import faulthandler
import os
import signal
import time

import torch
import torch.multiprocessing as mp

import generate
import teacher
from channel import Channel
from config import Config, InputError
from fork_server import INTERRUPTS, ignore_interrupts
from nodes import Interrupted, RoleDied

# ---- devices ----------------------------------------------------------------------------------


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


# ---- the spawned roles ------------------------------------------------------------------------


class Roles:
    """The other processes of a run, as rank 0 sees them."""

    def __init__(self, config: Config, channel: Channel, devices, held_out, next_ticket):
        """`devices`: of all roles. `held_out`: evaluation prompts. `next_ticket`: to be scored."""
        self.channel = channel
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
