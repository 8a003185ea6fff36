"""Asynchronous on-policy distillation: `torchrun --standalone --nproc-per-node=1 -- train.py` (see --help).

torchrun starts the learner ranks; rank 0 makes the channel, starts the generators and the teacher, hands out tickets
and watches everyone. Each update: wait for rollouts, train, publish, issue the next tickets, log.

Left out: several nodes, restarting a role that died (the run ends and can be resumed).
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

PRELOAD = ["transformers.models.auto.modeling_auto", "transformers.generation"]
if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    # The process that the roles will be forked from imports the libraries while we do. It leaves interrupts to us.
    forkserver.set_forkserver_preload(PRELOAD)
    tempfile.tempdir = "/tmp" if len(tempfile.gettempdir()) > 60 else None  # a socket's path may have 107 characters
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import generate
import teacher
from channel import Channel, Tickets
from config import Config, ConfigError, parse
from data import DataError, load_prompts
from learner import Learner
from log import Log, Timeline, check_output, close_trace, newest_checkpoint, open_trace, start_output
from model import check_path, compute_dtype, load_model, shared_vocabulary


def place(config: Config, ranks: int) -> list[torch.device]:
    """A device for each role: learner ranks first, then generators, the teacher last; they share where GPUs are few."""
    gpus, roles = torch.cuda.device_count(), ranks + config.generators + 1
    return [torch.device("cuda", i % gpus) if gpus else torch.device("cpu") for i in range(roles)]


def set_up_process(config: Config, device: torch.device, ranks: int):
    """Threads and precision of a role's process."""
    roles, cores = ranks + config.generators + 1, len(os.sched_getaffinity(0))
    torch.set_num_threads(config.cpu_threads or max(1, cores // roles))
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        torch.cuda.set_device(device)


def ignore_interrupts():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def worker(index: int, config: Config, paths: list[str], parameters: int, devices: list, ranks: int, held: list, first: int, trace: Path):
    """Entry of a spawned role: generators 0..G-1, then the teacher. Being interrupted is rank 0's business."""
    ignore_interrupts()
    device = devices[ranks + index]
    set_up_process(config, device, ranks)
    channel = Channel(config, parameters, compute_dtype(config, device), paths)
    if index < config.generators:
        generate.run(config, channel, index, device, held, trace)
    else:
        teacher.run(config, channel, first, device, trace)


class RoleDied(RuntimeError):
    """A generator or the teacher is gone; the message says which, and has its traceback or signal."""


class Roles:
    """The spawned processes, as rank 0 sees them."""

    def __init__(self, config: Config, channel: Channel, arguments: tuple):
        self.channel, self.names = channel, [*(f"generator {i}" for i in range(config.generators)), "teacher"]
        self.context = mp.start_processes(worker, arguments, len(self.names), join=False, daemon=True, start_method="forkserver")

    def check(self):
        """Raise RoleDied as soon as any role has left."""
        gone = [name for name, process in zip(self.names, self.context.processes) if not process.is_alive()]
        if gone:
            self.channel.stop.fill_(1)
            try:
                self.context.join(timeout=0, grace_period=3)
            except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
                raise RoleDied(f"{self.names[error.error_index]} died: {error}") from None
            raise RoleDied(f"{gone[0]} left before the end")

    def stop(self, patience: float = 10.0):
        """Ask every role to leave its loop, then insist."""
        self.channel.stop.fill_(1)
        deadline = time.monotonic() + patience
        for process in self.context.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()


def train(config: Config, rank: int, world: int):
    """One learner rank: check everything that can be checked, load, make or open the channel, then lead or follow."""
    devices = place(config, world)
    set_up_process(config, devices[rank], world)
    checkpoint, notes = check_output(config)
    tokenizer, _, vocab, more = shared_vocabulary(config)
    notes += more
    prompts, held = load_prompts(config, tokenizer)
    dtype = compute_dtype(config, devices[rank])
    if checkpoint:
        check_path("--resume", str(checkpoint))
    model = load_model(str(checkpoint or config.student_path), torch.float32, devices[rank])
    learner = Learner(model, config, vocab, dtype, rank, world)
    trained_ahead = learner.load(checkpoint) if checkpoint else []
    parameters = sum(p.numel() for p in learner.parameters)
    channel = Channel(config, parameters, dtype) if rank == 0 else None
    paths = broadcast(channel and channel.paths)
    if rank > 0:
        return follow(learner, Channel(config, parameters, dtype, paths))
    output = start_output(config, checkpoint)
    if config.eval_every and not held:
        notes.append("no evaluation: it needs 10 --prompts, some with an answer, or --eval-prompts; --eval-every 0 says so")
    for note in notes:
        print(f"note: {note}")
    print(f"first prompt: {prompts[0].text!r}")
    print(f"{len(prompts)} prompts to train on, {len(held)} others to evaluate on; {parameters:,} parameters")
    print(f"{config.loss}, head in {'Triton kernels' if devices[rank].type == 'cuda' else 'plain torch'}")
    print(f"devices: {', '.join(map(str, devices))} (learner x{world}, generator x{config.generators}, teacher)", flush=True)
    open_trace(output / "trace.json")
    tickets = Tickets(config, channel, prompts, learner.version, trained_ahead)
    learner.publish(channel)
    roles = Roles(config, channel, (config, paths, parameters, devices, world, held, tickets.lowest, output / "trace.json"))
    try:
        lead(config, learner, channel, tickets, roles, tokenizer, evaluating=bool(held) and config.eval_every > 0)
    finally:
        roles.stop()
        close_trace(output / "trace.json")


def lead(config: Config, learner: Learner, channel: Channel, tickets: Tickets, roles: Roles, tokenizer, evaluating: bool):
    """Rank 0: wait, train, publish, issue, evaluate, save, log. Ctrl-C ends the loop after the update at hand."""
    output, interrupts, saved, before, accuracies = Path(config.output_dir), [], learner.version, {}, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupts.append(1))
    timeline = Timeline(channel.busy[-1:], output / "trace.json", config.generators + 1, "learner")

    def going_on() -> bool:
        if not interrupts:
            roles.check()
        return not interrupts and channel.running()

    def evaluate(key: str) -> dict[str, float]:
        """Greedy accuracy of the weights just published; the learner waits, so that they are these weights."""
        channel.eval_due.fill_(learner.version + 1)  # one more than the version: 0 means that none is due
        while int(channel.eval_done) <= learner.version and going_on():
            time.sleep(0.002)
        if int(channel.eval_done) <= learner.version:
            return {}
        accuracies.append(float(channel.eval_accuracy))
        return {key: accuracies[-1]}

    def save() -> int:
        with timeline.span("save"):
            learner.save(output, tokenizer, sorted(tickets.trained_ahead))
        return learner.version

    try:
        tickets.issue(learner.version)
        if evaluating and learner.version == 0:
            before = evaluate("eval_accuracy_before")
            print(*(f"accuracy before training {value:.1%}" for value in before.values()), flush=True)
        log = Log(config, channel)
        while learner.version < config.steps and (rows := tickets.next_batch(learner.version, going_on)):
            broadcast(rows)
            with timeline.span("update"):
                metrics = learner.update(channel, rows)
            with timeline.span("publish"):
                metrics["publish_seconds"] = learner.publish(channel)
            tickets.trained(rows)
            tickets.issue(learner.version)
            last = learner.version == config.steps
            try:
                if evaluating and (last or learner.version % config.eval_every == 0):
                    metrics |= evaluate("eval_accuracy")
            finally:  # the update was made, whoever died since
                log.write(learner.version, metrics | before)
            before = {}
            if last or config.save_every and learner.version % config.save_every == 0:
                saved = save()
        broadcast(None)
    except (RoleDied, OSError):  # a full disk, say; after FloatingPointError every rank has left
        with suppress(RuntimeError):  # a follower may be gone too
            broadcast(None)
        raise
    finally:  # whatever ended the loop, what was learned is kept
        if saved < learner.version:
            save()
        timeline.flush()
    gain = f", accuracy {accuracies[0]:.1%} -> {accuracies[-1]:.1%}" if len(accuracies) > 1 else ""
    end = "done" if learner.version == config.steps else "interrupted"
    print(f"{end} after update {learner.version}{gain}: {newest_checkpoint(output) or output}", flush=True)


def follow(learner: Learner, channel: Channel):
    """Ranks above 0: train on the rows that rank 0 names, until it names none."""
    ignore_interrupts()
    while rows := broadcast(None):
        learner.update(channel, rows)


def broadcast(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def main():
    config = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if world > int(os.environ.get("LOCAL_WORLD_SIZE", world)):
            raise ConfigError(f"{world} ranks on several nodes: one node only, use torchrun --standalone")
        if torch.cuda.is_available() and world > torch.cuda.device_count():
            raise ConfigError(f"{world} learner ranks, {torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        if world > 1:  # ranks wait for rank 0 as long as rollouts take; torchrun ends the run when one dies
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=7))
        train(config, rank, world)
        if world > 1:
            dist.destroy_process_group()
    except (ConfigError, DataError, MemoryError, FloatingPointError, RoleDied) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted before the first update")


if __name__ == "__main__":
    main()
