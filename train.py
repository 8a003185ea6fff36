"""Asynchronous on-policy distillation: `torchrun --standalone --nproc-per-node=1 train.py`.

serial.py makes the same calls in one process: read it first. Here each role is a process, so that
they overlap. torchrun starts the learner ranks. The first of each node leads it: it makes the
channel, starts generators and teachers, and runs the main loop. The others follow it. `--help`
lists the settings.

How a run ends:
  1. all updates are made, or `Leader.check` raises, which every wait but that for other nodes calls
  2. what was learned is saved
  3. the ranks that follow are told; other nodes notice that this one is gone
  4. generators and teachers see that `channel.stop` is set, and leave

Left out: starting a role again that died. The run ends and can be resumed.
"""

import os

TORCHRUN = os.getppid()  # asked before the slow imports: it may die during them

import signal
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist

import generate
import teacher
from channel import Channel
from learner import Learner
from model import compute_dtype
from support import checkpoint as on_disk
from support.config import Config, InputError, from_torchrun, parse, refusal
from support.data import Prompt, fingerprint, load_prompts
from support.load import check_models, load_model, load_tokenizer, shared_vocabulary, stop_ids
from support.log import Log, Timeline, announced, show_sample, write_rollouts
from support.ranks import Interrupted, Ranks, RoleDied, join
from support.roles import OUT_OF_MEMORY, Roles, ignore_interrupts, on_interrupt
from support.roles import role_devices, set_up_process
from tickets import Tickets

# ---- input ------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What rank 0 has read and checked, for all ranks."""

    config: Config
    tokenizer: object
    prompts: list[Prompt]
    held_out: list[Prompt]  # to evaluate on
    checkpoint: Path | None  # to resume from
    progress: dict  # what the next checkpoint says of the run, see checkpoint.read_progress


def read_inputs(config: Config):
    """Check and read everything before a model is loaded. Raises InputError."""
    on_disk.lock_output(config.output)  # until this process ends
    with announced("checking the models"):
        notes = check_models(config)
    tokenizer = load_tokenizer("--student", config.path("student"))
    progress = {"started": datetime.now(), "prompts": fingerprint(config), "trained_ahead": []}
    checkpoint = on_disk.check_output(config, progress["prompts"])
    if checkpoint:
        progress = on_disk.read_progress(checkpoint)
    progress["settings"] = asdict(config)
    with announced("reading the prompts"):
        prompts, held_out = load_prompts(config, tokenizer, progress["started"])
    if config.eval_every and len(held_out) < min(20, config.eval_size):
        notes.append(f"{len(held_out)} prompts to evaluate on: --eval-prompts FILE gives more")
    for note in notes:
        print(f"note: {note}")
    first = prompts[0]
    print(f"first prompt: {tokenizer.decode(first.ids)!r}")
    if first.teacher_ids:
        print(f"for its teacher: {tokenizer.decode(first.teacher_ids)!r}")
    for part, use in ((prompts, "train"), (held_out, "evaluate")):
        counts = Counter(prompt.teacher for prompt in part)
        named = ", ".join(f"{counts[name]} of {name}" for name in config.teacher_paths if name)
        print(f"{len(part)} prompts to {use} on" + f": {named}" * bool(named))
    return Inputs(config, tokenizer, prompts, held_out, checkpoint, progress)


# ---- generators and teachers ------------------------------------------------------------------


def run_role(index, config, channel, devices, held_out):
    """Entry of a role's process: generators 0, 1, ..., then the teachers.

    `devices`: of all roles. `held_out`: evaluation prompts.
    """
    ignore_interrupts()
    device = devices[index - len(config.role_names) + 1]  # these roles have the last
    set_up_process(config, device, len(devices))
    if index < config.generators:
        generate.run(config, channel, device, index, held_out)
    else:
        teacher.run(config, channel, device, index - config.generators)


# ---- the leader of a node ---------------------------------------------------------------------


class Leader:
    """The first learner rank of a node: it decides what comes next."""

    def __init__(self, inputs: Inputs, learner: Learner, channel: Channel, devices):
        """Set up the output directory and start the roles. `devices`: of all roles."""
        self.inputs = inputs
        self.config = config = inputs.config
        self.learner = learner
        self.channel = channel
        self.ranks = learner.ranks
        self.saved_version = learner.version
        self.amid_update = False
        self.interrupts = []
        on_interrupt(lambda *_: self.interrupts.append(1))
        on_disk.start_output(config, inputs.checkpoint)
        self.timeline = Timeline(config, channel, len(config.role_names) - 1)
        ahead = inputs.progress["trained_ahead"]
        self.tickets = Tickets(config, channel, inputs.prompts, learner.version, ahead)
        self.held_out = inputs.held_out if self.ranks.node == 0 else []  # node 0 evaluates
        learner.publish(channel)
        for_all = (config, channel, devices, self.held_out)
        self.roles = Roles(run_role, for_all, config, channel)

    def main_loop(self):
        """Wait for rollouts, train, publish, issue tickets, evaluate and log, save."""
        config, learner = self.config, self.learner
        self.tickets.issue(learner.version)
        with announced("generators and teachers start"):
            before = self.evaluate("eval_accuracy_before") if learner.version == 0 else {}
        with closing(Log(config, self.channel)) as log:
            while learner.version < config.steps:
                rows = self.wait_for_rows()
                metrics = self.train_on(rows)
                with self.timeline.span("publish"):
                    metrics["publish_seconds"] = learner.publish(self.channel)
                try:
                    if learner.version in (1, config.steps) or self.is_due(config.save_every):
                        write_rollouts(config, self.channel, learner, self.inputs.tokenizer)
                    self.tickets.issue(learner.version)  # from here on `rows` are others'
                    if self.is_due(config.eval_every):
                        before |= self.evaluate("eval_accuracy")
                finally:  # the update was made, whoever died since
                    log.write(learner.version, metrics | before)
                if self.is_due(config.save_every):
                    self.save()
                before = {}

    def wait_for_rows(self):
        """The rows of the next update."""
        while True:
            self.check()
            rows = self.tickets.batch(self.learner.version)
            if rows:
                return rows
            self.tickets.receive(self.channel.to_learner.get_all(timeout=0.5))

    def check(self):
        """Raise Interrupted or RoleDied if there is nothing to wait for any more."""
        if self.interrupts or self.ranks.is_orphan():
            raise Interrupted
        self.roles.check()

    def train_on(self, rows: list[int]):
        """One update, on every rank of every node."""
        parts = self.ranks.exchange(self.learner.describe(self.channel, rows))
        self.ranks.tell(("update", rows, parts))
        self.amid_update = True
        with self.timeline.span("update"):
            metrics = self.learner.update(self.channel, rows, parts)
        self.amid_update = False
        self.tickets.trained([ticket for part in parts for ticket in part["tickets"]])
        return metrics

    def evaluate(self, name: str):
        """Greedy accuracy of the published weights. We wait, so that they stay these weights."""
        if not (self.held_out and self.config.eval_every):
            return {}
        channel = self.channel
        channel.eval_asked += 1
        while (channel.eval_done < channel.eval_asked).any():
            self.check()
            time.sleep(0.002)
        show_sample(self.config, self.learner.version, self.held_out[0].text)
        right = channel.eval_correct[: len(self.held_out)].double()
        accuracy = {}
        for owner in ("", *filter(None, self.config.teacher_paths)):
            is_of = torch.tensor([owner in ("", prompt.teacher) for prompt in self.held_out])
            judged = right[is_of & (right >= 0)]
            if len(judged):
                accuracy[f"{name}/{owner}".rstrip("/")] = float(judged.mean())
        if accuracy and self.learner.version == 0:
            print(f"accuracy before training {accuracy[name]:.1%}")
        return accuracy

    def is_due(self, every: int):
        version = self.learner.version
        return every > 0 and (version % every == 0 or version == self.config.steps)

    # ---- how it ends --------------------------------------------------------------------------

    def lead(self):
        """Run the main loop, and leave it in order."""
        try:
            self.main_loop()
        except Interrupted:
            pass
        except BaseException as error:
            # Amid an update several ranks are out of step, and cannot save together. Weights that
            # have no finite gradient are ruined.
            is_lost = self.ranks.world_size > 1 or isinstance(error, FloatingPointError)
            if not (self.amid_update and is_lost):
                self.leave()
            raise
        self.leave()
        end = "done" if self.learner.version == self.config.steps else "interrupted"
        where = (on_disk.checkpoints(self.config.output) or ["no checkpoint"])[-1]
        print(f"{end} after update {self.learner.version}: {where}")

    def leave(self):
        """Save, and send the ranks home. The other nodes notice that this one is gone."""
        try:
            self.save()
        finally:
            self.timeline.flush()
            self.ranks.tell(None)

    def save(self):
        """A checkpoint of what was learned since the last. Node 0 writes it."""
        if self.ranks.node > 0 or self.saved_version == self.learner.version:
            return
        self.ranks.tell(["save"])
        self.inputs.progress["trained_ahead"] = sorted(self.tickets.trained_ahead)
        with self.timeline.span("save"), announced("saving"):
            self.learner.save(self.config.output, self.inputs.tokenizer, self.inputs.progress)
        self.saved_version = self.learner.version
        on_disk.drop_old(self.config.output, self.config.keep_checkpoints)


# ---- every rank -------------------------------------------------------------------------------


def run_rank(ranks: Ranks):
    """One learner rank: load the student, then lead the node or follow its leader."""
    inputs = read_inputs(parse()) if ranks.rank == 0 else None
    inputs = ranks.broadcast(inputs, ranks.everyone)
    config, checkpoint = inputs.config, inputs.checkpoint
    if ranks.node > 0:
        sys.stdout = open(os.devnull, "w")  # node 0 reports
    devices = role_devices(config, ranks.local_world_size, torch.cuda.device_count())
    device = devices[ranks.local_rank]
    set_up_process(config, device, len(devices))
    dtype = compute_dtype(config, device)
    with announced("loading the student"):
        model = load_model(str(checkpoint or config.path("student")), torch.float32, device)
    stops = stop_ids(config.path("student"), inputs.tokenizer, config.stop_token)
    model.generation_config.eos_token_id = sorted(stops)  # of its checkpoints
    with refusal(f"--student {config.student}: its generation_config.json cannot be saved again"):
        model.generation_config.validate(strict=True)
    learner = Learner(model, config, shared_vocabulary(config), dtype, ranks)
    if checkpoint:
        learner.load(checkpoint)
    ranks.gather(None)  # all have loaded it: from now on it may be dropped
    if ranks.local_rank > 0:
        follow(learner, ranks.tell())
        return
    count = sum(p.numel() for p in learner.parameters)
    ratio = config.lr / (0.1 / count**0.5)  # to what is usual: 1e-5 for 100M, 1e-6 for 10B
    if not 1 / 30 < ratio < 30:
        print(f"note: --lr is {config.lr:g}, for {count:,} parameters {ratio:.3g} times the usual")
    channel = ranks.tell(Channel.create(config, count, dtype))
    channel.pin(device)
    names = ["learner"] * ranks.local_world_size + config.role_names[:-1]
    print(", ".join(f"{name} on {device}" for name, device in zip(names, devices)))
    leader = Leader(inputs, learner, channel, devices)
    try:
        leader.lead()
    finally:
        leader.roles.stop()


def follow(learner: Learner, channel: Channel):
    """What the leader does, on the other ranks of its node, until it has no more to do."""
    ignore_interrupts()
    learner.publish(channel)
    for command, *arguments in iter(learner.ranks.tell, None):
        if command == "save":
            learner.save(learner.config.output, None, None)
            continue
        with suppress(FloatingPointError):  # the leader has raised it, too
            learner.update(channel, *arguments)
            learner.publish(channel)


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    try:
        ranks = join(TORCHRUN)
        run_rank(ranks)
    except torch.OutOfMemoryError:
        sys.exit(f"train.py: error: learner rank {ranks.rank}: {OUT_OF_MEMORY}")
    except (InputError, MemoryError, FloatingPointError, OSError, RoleDied) as error:
        sys.exit(f"train.py: error: {error}")
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        rank = from_torchrun("LOCAL_RANK", 0)  # who followed has lost its leader, which says why
        sys.exit(
            rank or f"train.py: error: a rank or a node died: torchrun says how ({error!s:.90})"
        )
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted before the first update")
    if dist.is_initialized():
        dist.destroy_process_group()
        if ranks.local_rank > 0:
            os._exit(0)  # gloo's threads may outlive Python, and abort


if __name__ == "__main__":
    main()
