"""Asynchronous on-policy distillation: `torchrun --standalone --nproc-per-node=1 -- train.py`.

These are the calls of serial.py, each in a process of its own. torchrun starts the learner ranks.
Rank 0 makes the channel, starts generators and teacher (launch.py), and runs the main loop. All
ranks train. On several nodes each has such a rank 0, its leader (nodes.py). `--help` lists the
settings.
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
from experiments.memory import plan_memory
from launch import Roles, role_devices, set_up_process
from learner import Learner
from log import Log, Timeline, checkpoints, close_trace, lock_output, start_output
from model import compute_dtype, shared_vocabulary
from nodes import Interrupted, Nodes, RoleDied, broadcast, from_every_rank, join


class Run:
    """A run as the leader of a node sees it."""

    def __init__(self, config: Config):
        """Check and read all input, before anything else starts. On node 0, for all ranks."""
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

    def start(self, learner: Learner, channel: Channel, devices):
        """Set up the output directory and start the roles. `devices`: of all roles."""
        config = self.config
        self.learner, self.channel, self.nodes = learner, channel, learner.nodes
        start_output(config, self.checkpoint)
        self.timeline = Timeline(config, channel, config.generators + config.teachers, "learner")
        ahead = read_progress(self.checkpoint)["trained_ahead"] if self.checkpoint else []
        self.tickets = Tickets(config, channel, self.prompts, learner.version, ahead)
        self.saved_version = learner.version
        learner.publish(channel)
        if config.node > 0:
            self.held_out = []  # node 0 evaluates
        self.roles = Roles(config, channel, devices, self.held_out, self.tickets.lowest)

    def lead(self):
        """Run the main loop. What was learned is saved, unless an update of several ranks broke."""
        reason = ""
        try:
            self.main_loop()
        except Interrupted:
            reason = "interrupted"
        except RuntimeError as error:  # in the update
            if self.nodes.world == 1:
                self.leave(str(error))
            else:  # the ranks are out of step, and cannot save together
                self.nodes.say(leaves=str(error))
            error.add_note("Has a rank or a node died? torchrun says how.")
            raise
        except BaseException as error:
            if isinstance(error, FloatingPointError):
                self.set_aside()
            self.leave(str(error) or "an error")
            raise
        self.leave(reason)
        end = "done" if self.learner.version == self.config.steps else "interrupted"
        where = (checkpoints(self.config.output) or ["no checkpoint"])[-1]
        print(f"{end} after update {self.learner.version}: {where}")

    def leave(self, reason=""):
        """Tell the other nodes, save, send the ranks home."""
        self.nodes.say(leaves=reason)
        try:
            self.save()
            self.nodes.tell(None)
        finally:
            self.timeline.flush()

    def set_aside(self):
        """The present weights have no finite gradient: do not save them, nor resume from them."""
        self.saved_version = version = self.learner.version
        saved = self.config.output / f"step_{version}"
        if saved.exists():
            saved.rename(saved.with_name(f"diverged_{version}_{os.getpid()}"))

    def main_loop(self):
        """Wait for rollouts, train, publish, issue tickets, evaluate and log, save."""
        config, learner = self.config, self.learner
        self.tickets.issue(learner.version)
        before = self.evaluate("eval_accuracy_before") if learner.version == 0 else {}
        log = Log(config, self.channel)
        while learner.version < config.steps:
            rows = self.wait_for_rows()
            metrics = self.train_on(rows, log.busy)
            with self.timeline.span("publish"):
                metrics["publish_seconds"] = learner.publish(self.channel)
            self.tickets.issue(learner.version)
            try:
                if self.is_due(config.eval_every):
                    before |= self.evaluate("eval_accuracy")
            finally:  # the update was made, whoever died since
                log.write(learner.version, metrics | before)
            if self.is_due(config.save_every):
                self.save()
            before = {}

    def wait_for_rows(self):
        """The rows of the next update. Raises Interrupted or RoleDied."""
        while True:
            self.check()
            rows = self.tickets.batch(self.learner.version)
            if rows:
                return rows
            self.tickets.receive(self.channel.to_learner.get_all(timeout=0.5))

    def check(self):
        """Raise Interrupted or RoleDied if there is nothing to wait for any more."""
        self.roles.check()
        self.nodes.check()

    def train_on(self, rows: list[int], busy):
        """One update, on every rank of every node; frees the rows. `busy`: the node's, to log."""
        self.nodes.tell(("accumulate", rows))
        with self.timeline.span("update"):
            sums = self.learner.accumulate(self.channel, rows)
        part = sums, busy, self.nodes.waited
        parts = self.nodes.meet(self.learner.version, part, self.roles.check)
        sums, busy, waited = zip(*parts)
        self.nodes.tell(("apply", sums))
        with self.timeline.span("update"):
            metrics = self.learner.apply(sums)
        self.tickets.trained(rows)
        if self.nodes.count > 1:
            metrics |= {"nodes_busy": busy, "nodes_wait_seconds": waited}
        return metrics

    def evaluate(self, name: str):
        """Greedy accuracy of the published weights. We wait, so that they stay these weights."""
        if not (self.held_out and self.config.eval_every):
            return {}
        channel, version = self.channel, self.learner.version
        channel.eval_due.fill_(version + 1)  # 0 means that none is due
        while int(channel.eval_done) <= version:
            self.check()
            time.sleep(0.002)
        accuracy = float(channel.eval_accuracy)
        if version == 0:
            print(f"accuracy before training {accuracy:.1%}")
        return {name: accuracy}

    def is_due(self, every: int):
        version = self.learner.version
        return every > 0 and (version % every == 0 or version == self.config.steps)

    def save(self):
        if self.config.node == 0 and self.saved_version < self.learner.version:
            self.nodes.tell(["save"])
            ahead = self.tickets.trained_ahead if self.nodes.count == 1 else ()
            progress = {
                "settings": asdict(self.config),
                "prompts": self.fingerprint,
                "trained_ahead": sorted(ahead),
            }
            for old in checkpoints(self.config.output)[: -self.config.keep_checkpoints]:  # 0: none
                shutil.rmtree(old)
            with self.timeline.span("save"):
                self.learner.save(self.config.output, self.tokenizer, progress)
            self.saved_version = self.learner.version


def run_rank(nodes: Nodes):
    """One learner rank: load the student, then lead the node (rank 0) or follow."""
    run = broadcast(Run(parse()) if nodes.rank == nodes.node == 0 else None)
    config, checkpoint = run.config, run.checkpoint
    if nodes.node > 0:
        sys.stdout = open(os.devnull, "w")  # node 0 reports
    devices = role_devices(config, nodes.world)
    device = devices[nodes.rank]
    set_up_process(config, device, len(devices))
    # Each leader checks its GPUs; node 0 decides for all.
    recompute, memory = broadcast(nodes.rank or plan_memory(config, nodes.world, devices))
    dtype = compute_dtype(config, device)
    model = load_model(str(checkpoint or config.student_path), torch.float32, device)
    learner = Learner(model, config, shared_vocabulary(config), dtype, nodes, recompute)
    if checkpoint:
        learner.load(checkpoint)
    from_every_rank(None)  # all have loaded it
    if nodes.rank > 0:
        follow(learner, nodes.tell())
        return
    count = sum(p.numel() for p in learner.parameters)
    channel = nodes.tell(Channel.create(config, count, dtype))
    if device.type == "cuda":
        channel.pin()
    print(f"{memory}learners, generators, teachers on {', '.join(map(str, devices))}")
    run.start(learner, channel, devices)
    try:
        run.lead()
    finally:
        run.roles.stop()
        close_trace(config.trace)


def follow(learner: Learner, channel: Channel):
    """Ranks above 0: what their leader does in `Run`, until it says that there is no more to do."""
    fork_server.ignore_interrupts()
    learner.publish(channel)
    for command, *arguments in iter(learner.nodes.tell, None):
        with suppress(FloatingPointError):  # the leader has raised it, too
            if command == "accumulate":
                learner.accumulate(channel, *arguments)
            elif command == "apply":
                learner.apply(*arguments)
                learner.publish(channel)
            else:
                learner.save(learner.config.output, None, None)


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        nodes = join()
        run_rank(nodes)
        if dist.is_initialized():
            dist.destroy_process_group()
        if nodes.rank > 0:
            os._exit(0)  # gloo's threads may outlive Python, and abort
    except (InputError, MemoryError, FloatingPointError, OSError, RoleDied) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted before the first update")


if __name__ == "__main__":
    main()
