"""Asynchronous on-policy distillation: `torchrun --standalone --nproc-per-node=1 -- train.py`.

These are the calls of serial.py, each in a process of its own. torchrun starts the learner ranks.
Rank 0 makes the channel, starts generators and teacher (launch.py), and runs the main loop. All
ranks train. `--help` lists the settings.
"""

import fork_server

if __name__ == "__main__":
    fork_server.start()  # it makes the slow imports at the same time as we do

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict

import torch
import torch.distributed as dist

from channel import Channel, Tickets
from checks import check_models, check_output, load_model, load_tokenizer, read_progress
from config import Config, InputError, parse
from data import fingerprint, load_prompts
from launch import Interrupted, RoleDied, Roles, broadcast, join_ranks, role_devices, set_up_process
from learner import Learner, from_every_rank
from log import Log, Timeline, checkpoints, close_trace, lock_output, start_output
from memory import plan_memory
from model import compute_dtype, shared_vocabulary


class Run:
    """A run as rank 0 leads it."""

    def __init__(self, config: Config):
        """Check and read all input, before anything else starts."""
        self.config = config
        self.lock = lock_output(config.output)
        notes = check_models(config)
        self.tokenizer = load_tokenizer("--student", config.student_path)
        self.prompts, self.held_out = load_prompts(config, self.tokenizer)
        self.fingerprint = fingerprint(self.prompts + self.held_out)
        self.checkpoint, told = check_output(config, self.fingerprint)
        notes += told
        if config.eval_every and not self.held_out:
            notes.append(
                "no evaluation: fewer than 10 prompts, or none has an answer: "
                "give --eval-prompts, or --eval-every 0 to silence this"
            )
        for note in notes:
            print(f"note: {note}")
        print(
            f"first prompt: {self.prompts[0].text!r}\n"
            f"{len(self.prompts)} prompts to train on, {len(self.held_out)} to evaluate on"
        )

    def start(self, learner: Learner, channel: Channel, devices, pids):
        """Set up the output directory and start the roles. `devices`, `pids`: see Roles."""
        config = self.config
        self.learner, self.channel = learner, channel
        print(f"learners, generators, teachers on {', '.join(map(str, devices))}", flush=True)
        start_output(config, self.checkpoint)
        self.timeline = Timeline(config, channel, config.generators + config.teachers, "learner")
        ahead = read_progress(self.checkpoint)["trained_ahead"] if self.checkpoint else []
        self.tickets = Tickets(config, channel, self.prompts, learner.version, ahead)
        self.saved_version = learner.version
        learner.publish(channel)
        self.roles = Roles(config, channel, devices, self.held_out, self.tickets.lowest, pids)

    def lead(self):
        """Run the main loop. Whatever ends it, what was learned is saved."""
        try:
            with suppress(Interrupted):  # `report` says so
                self.main_loop()
        except BaseException as error:
            if isinstance(error, FloatingPointError):
                self.set_aside()
            is_amid_update = isinstance(error, RuntimeError) and self.learner.world > 1
            (self.rescue if is_amid_update else self.leave)()
            raise
        self.leave()
        self.report()

    def leave(self):
        """Save, and send the other ranks home. Raises RoleDied if one of them is gone."""
        try:
            self.save()
            broadcast(None)
        except RuntimeError:
            self.rescue()
            raise
        finally:
            self.timeline.flush()

    def set_aside(self):
        """The present weights have no finite gradient: do not save them, nor resume from them."""
        self.saved_version = version = self.learner.version
        saved = self.config.output / f"step_{version}"
        if saved.exists():
            saved.rename(saved.with_name(f"diverged_{version}_{os.getpid()}"))

    def rescue(self):
        """Save what was published: the other ranks, with their part of the masters, are lost."""
        self.learner.rescue(self.channel, self.config.output, self.tokenizer)
        self.roles.check_ranks(timeout=5.0)

    def report(self):
        end = "done" if self.learner.version == self.config.steps else "interrupted"
        where = (checkpoints(self.config.output) or ["no checkpoint"])[-1]
        print(f"{end} after update {self.learner.version}: {where}", flush=True)

    def main_loop(self):
        """Wait for rollouts, train, publish, issue tickets, evaluate and log, save."""
        config, learner = self.config, self.learner
        self.tickets.issue(learner.version)
        before = self.evaluate("eval_accuracy_before") if learner.version == 0 else {}
        log = Log(config, self.channel)
        while learner.version < config.steps:
            rows = self.wait_for_rows()
            metrics = self.train_on(rows) | before
            with self.timeline.span("publish"):
                metrics["publish_seconds"] = learner.publish(self.channel)
            self.tickets.issue(learner.version)
            try:
                if self.is_due(config.eval_every):
                    metrics |= self.evaluate("eval_accuracy")
            finally:  # the update was made, whoever died since
                log.write(learner.version, metrics)
            if self.is_due(config.save_every):
                self.save()
            before = {}

    def wait_for_rows(self):
        """The rows of the next update. Raises Interrupted or RoleDied."""
        deadline = time.monotonic() + 60
        while True:
            self.roles.check()
            rows = self.tickets.batch(self.learner.version)
            if rows:
                return rows
            self.tickets.receive(self.channel.to_learner.get_all(timeout=0.5))
            if time.monotonic() > deadline:
                deadline += 60
                print(
                    f"{len(self.tickets.scored)} of {self.config.batch_size} rollouts are there, "
                    "waiting for generator and teacher",
                    flush=True,
                )

    def train_on(self, rows: list[int]):
        """One update, on every rank; frees the rows."""
        broadcast(rows)
        with self.timeline.span("update"):
            metrics = self.learner.update(self.channel, rows)
        self.tickets.trained(rows)
        return metrics

    def evaluate(self, name: str):
        """Greedy accuracy of the published weights. We wait, so that they stay these weights."""
        if not (self.held_out and self.config.eval_every):
            return {}
        channel, version = self.channel, self.learner.version
        channel.eval_due.fill_(version + 1)  # 0 means that none is due
        while int(channel.eval_done) <= version:
            self.roles.check()
            time.sleep(0.002)
        accuracy = float(channel.eval_accuracy)
        if version == 0:
            print(f"accuracy before training {accuracy:.1%}", flush=True)
        return {name: accuracy}

    def is_due(self, every: int):
        version = self.learner.version
        return every > 0 and (version % every == 0 or version == self.config.steps)

    def save(self):
        if self.saved_version < self.learner.version:
            broadcast("save")  # instead of rows
            progress = {
                "settings": asdict(self.config),
                "prompts": self.fingerprint,
                "trained_ahead": sorted(self.tickets.trained_ahead),
            }
            for old in checkpoints(self.config.output)[: -self.config.keep_checkpoints]:  # 0: none
                shutil.rmtree(old)
            with self.timeline.span("save"):
                self.learner.save(self.config.output, self.tokenizer, progress)
            self.saved_version = self.learner.version


def run_rank(config: Config, rank: int, world: int):
    """One learner rank: load the student, then lead (rank 0) or follow."""
    devices = role_devices(config, world)
    device = devices[rank]
    set_up_process(config, device, len(devices))
    run = Run(config) if rank == 0 else None
    checkpoint = broadcast(run and run.checkpoint)
    recompute, memory = broadcast(run and plan_memory(config, world, devices))
    dtype = compute_dtype(config, device)
    model = load_model(str(checkpoint or config.student_path), torch.float32, device)
    learner = Learner(model, config, shared_vocabulary(config), dtype, rank, world, recompute)
    if checkpoint:
        learner.load(checkpoint)
    pids = from_every_rank(os.getpid(), world)
    if rank > 0:
        follow(learner, broadcast())
        return
    channel = broadcast(Channel.create(config, sum(p.numel() for p in learner.parameters), dtype))
    if device.type == "cuda":
        channel.pin()
    if memory:
        print(memory)
    run.start(learner, channel, devices, pids)
    try:
        run.lead()
    finally:
        run.roles.stop()
        close_trace(config.trace)


def follow(learner: Learner, channel: Channel):
    """Ranks above 0: what rank 0 does in `Run`, until it says that there is no more to do."""
    fork_server.ignore_interrupts()
    learner.publish(channel)
    for command in iter(broadcast, None):
        if command == "save":
            learner.save(learner.config.output, None, None)
        else:
            with suppress(FloatingPointError):  # rank 0 has raised it, too
                learner.update(channel, command)
                learner.publish(channel)


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        rank, world = join_ranks()
        run_rank(parse(), rank, world)
        if world > 1:
            dist.destroy_process_group()
        if rank > 0:
            os._exit(0)  # gloo's threads may outlive Python, and abort
    except (InputError, MemoryError, FloatingPointError, OSError, RoleDied) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted before the first update")


if __name__ == "__main__":
    main()
