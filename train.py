"""Asynchronous on-policy distillation: `torchrun --standalone --nproc-per-node=1 train.py` (see --help).

torchrun starts the learner ranks; rank 0 makes the channel, starts the generators and the teacher, hands out tickets
and watches everyone. Each update: wait for rollouts, train, publish, issue the next tickets, log.

Left out: several nodes, restarting a role that died (the run ends and can be resumed).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import generate
import teacher
from channel import Channel, Timeline, close_trace, may_start, open_trace
from config import Config, ConfigError, parse
from data import DataError, Prompt, TicketOrder, load_prompts
from learner import Learner, check_output, start_output
from model import compute_dtype, load_model, shared_vocabulary

WATCH_SECONDS = 0.5  # how often a wait looks after the other roles


def place(config: Config, ranks: int) -> list[torch.device]:
    """A device for each role: learner ranks first, then generators, the teacher last; they share where GPUs are few."""
    gpus, roles = torch.cuda.device_count(), ranks + config.generators + 1
    return [torch.device("cuda", i % gpus) if gpus else torch.device("cpu") for i in range(roles)]


def set_up_process(config: Config, device: torch.device, ranks: int):
    """Threads and precision of a role's process. Synchronous roles take turns, so each may have every core."""
    roles, cores = ranks + config.generators + 1, len(os.sched_getaffinity(0))
    torch.set_num_threads(config.cpu_threads or (cores if config.max_staleness == 0 else max(1, cores // roles)))
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        torch.cuda.set_device(device)


def worker(index: int, config: Config, paths: list[str], parameters: int, devices: list[torch.device], ranks: int, first: int, trace: Path):
    """Entry of a spawned role: generators 0..G-1, then the teacher. Ctrl-C is rank 0's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    device = devices[ranks + index]
    set_up_process(config, device, ranks)
    channel = Channel(config, parameters, compute_dtype(config, device), paths)
    if index < config.generators:
        generate.run(config, channel, index, device, trace)
    else:
        teacher.run(config, channel, first, device, trace)


class Roles:
    """The spawned processes, as rank 0 sees them."""

    def __init__(self, config: Config, channel: Channel, arguments: tuple):
        self.config, self.channel = config, channel
        self.context = mp.start_processes(worker, arguments, config.generators + 1, join=False, daemon=True)

    def check(self):
        """Raise with the traceback, or the signal, of a role that is gone."""
        self.context.join(timeout=0)
        for i, process in enumerate(self.context.processes):
            if not process.is_alive():
                raise RuntimeError(f"{self.name(i)} left early, exit status {process.exitcode}")

    def name(self, index: int) -> str:
        return f"generator {index}" if index < self.config.generators else "teacher"

    def stop(self, patience: float = 10.0):
        """Ask everyone to leave, then insist."""
        self.channel.stop.fill_(1)
        deadline = time.monotonic() + patience
        for process in self.context.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


class Dispatcher:
    """Rank 0's books: which row carries which ticket, which tickets were trained, which may start."""

    def __init__(self, config: Config, channel: Channel, prompts: list[Prompt], version: int, trained_ahead: list[int]):
        self.config, self.channel, self.prompts = config, channel, prompts
        self.order = TicketOrder(len(prompts), config.samples_per_prompt, config.seed)
        self.free, self.scored = list(range(config.table_rows)), {}  # scored: ticket -> row
        self.lowest = version * config.batch_size - len(trained_ahead)  # all tickets below were trained
        self.next_ticket, self.trained_ahead = self.lowest, set(trained_ahead)

    def issue(self, version: int):
        """Give free rows to the tickets that weights of `version` admit, with their prompts, in one write."""
        rows = []
        last = self.config.steps * self.config.batch_size
        while self.next_ticket < last and may_start(self.next_ticket, version, self.config):
            ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
            if ticket in self.trained_ahead:
                continue
            row, index = self.free.pop(), self.order(ticket)
            ids = self.prompts[index].ids
            self.channel.tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.channel.prompt_len[row], self.channel.prompt_index[row], self.channel.ticket[row] = len(ids), index, ticket
            rows.append(row)
        self.channel.to_generator.put(rows)

    def next_batch(self, version: int, keep_waiting) -> list[int] | None:
        """Rows of the next update, in ticket order or as they arrived; None once `keep_waiting()` says so."""
        size = self.config.batch_size
        wanted = range(version * size, (version + 1) * size)
        while True:
            ready = [t for t in (wanted if self.config.order == "batch" else self.scored) if t in self.scored][:size]
            if len(ready) == size:
                return [self.scored[ticket] for ticket in ready]
            if not keep_waiting():
                return None
            row = self.channel.to_learner.get(WATCH_SECONDS)
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


class Log:
    """metrics.jsonl, one object per update, and the progress line. Busy times are fractions since the last update."""

    def __init__(self, config: Config, channel: Channel, output: Path):
        self.config, self.channel = config, channel
        path = output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        self.earlier = json.loads(lines[-1])["wall_seconds"] if lines else 0.0  # of the run that is resumed
        self.file = open(path, "a", buffering=1)
        self.started = self.last = time.monotonic()
        self.busy = channel.busy.clone()

    def write(self, step: int, metrics: dict, extra: dict):
        now, busy = time.monotonic(), self.channel.busy.clone()
        elapsed = now - self.last
        generator, teacher_, learner_ = (part.mean().item() / elapsed for part in (busy - self.busy).split([self.config.generators, 1, 1]))
        hits, misses, used, evicted = self.channel.cache_stats.tolist()
        record = {"step": step, **metrics, "tokens_per_second": metrics["tokens"] / elapsed}
        record |= {"generator_busy": generator, "teacher_busy": teacher_, "learner_busy": learner_}
        record |= {"teacher_cache_hit_rate": hits / max(1, hits + misses), "teacher_cache_bytes": used, "teacher_cache_evictions": evicted}
        record |= {"wall_seconds": self.earlier + now - self.started, **extra}
        if torch.cuda.is_available():
            record["learner_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.last, self.busy = now, busy
        self.file.write(json.dumps(record) + "\n")
        waits = "generator" if generator >= teacher_ else "teacher"
        line = (
            f"update {step:4d}/{self.config.steps}  loss {metrics['loss']:8.4f}  reverse KL {metrics['reverse_kl']:7.4f}  "
            f"{record['tokens_per_second']:7.0f} tokens/s  lag {metrics['lag_mean']:.2f}  "
            f"learner busy {learner_:4.0%}, waits for {waits} ({max(generator, teacher_):.0%} busy)"
        )
        print(line + (f"  accuracy {extra['eval_accuracy']:.1%}" if "eval_accuracy" in extra else ""), flush=True)


def train(config: Config, rank: int, world: int):
    """One learner rank.

    Start: check everything that can be checked, load, make the channel, start the roles, publish, issue tickets.
    End:   save, stop the roles (they leave their loops), close the trace. An error anywhere ends every role.
    """
    devices = place(config, world)
    set_up_process(config, devices[rank], world)
    checkpoint = check_output(config)
    tokenizer, _, vocab, notes = shared_vocabulary(config)
    prompts, held = load_prompts(config, tokenizer)
    model = load_model(str(checkpoint or config.student_path), torch.float32, devices[rank])
    learner = Learner(model, config, vocab, compute_dtype(config, devices[rank]), rank, world)
    trained_ahead = learner.load(checkpoint) if checkpoint else []
    count, weight_dtype = sum(p.numel() for p in learner.parameters), compute_dtype(config, devices[world])
    channel = Channel(config, count, weight_dtype) if rank == 0 else None
    paths = broadcast(channel.paths if channel else None) if world > 1 else channel.paths
    channel = channel or Channel(config, count, weight_dtype, paths)
    if rank > 0:
        return follow(learner, channel)
    output = start_output(config, checkpoint)
    for note in notes:
        print(f"note: {note}")
    print(f"first prompt: {prompts[0].text!r}")
    print(f"{len(prompts)} prompts, {len(held)} held out; {count:,} parameters; {config.loss}; head in chunks of {config.head_chunk} (plain torch)")
    print("devices: " + ", ".join(map(str, devices)) + f" (learner x{world}, generator x{config.generators}, teacher)", flush=True)
    trace = output / "trace.json"
    open_trace(trace)
    timeline = Timeline(channel.busy[-1:], trace, config.generators + 1, "learner")
    dispatcher = Dispatcher(config, channel, prompts, learner.version, trained_ahead)
    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.append(1))
    channel.eval_due.fill_(-1)
    channel.eval_done.fill_(-1)
    learner.publish(channel)
    roles = Roles(config, channel, (config, paths, count, devices, world, dispatcher.lowest, trace))

    def keep_waiting() -> bool:
        roles.check()
        return not interrupted and channel.running()

    def evaluated() -> float | None:
        """Greedy accuracy of the weights just published, by generator 0; the update waits for it."""
        channel.eval_due.fill_(learner.version)
        while int(channel.eval_done) < learner.version and keep_waiting():
            time.sleep(0.002)
        return float(channel.eval_accuracy) if int(channel.eval_done) == learner.version else None

    saved = learner.version
    try:
        dispatcher.issue(learner.version)
        evaluating = bool(held) and config.eval_every > 0
        before = {"eval_accuracy_before": evaluated()} if evaluating and not checkpoint else {}
        if before:
            print(f"accuracy before training {before['eval_accuracy_before'] or 0:.1%}", flush=True)
        log = Log(config, channel, output)
        while learner.version < config.steps and keep_waiting():
            rows = dispatcher.next_batch(learner.version, keep_waiting)
            if rows is None:
                break
            if world > 1:
                broadcast(rows)
            with timeline.span("update"):
                metrics = learner.update(channel, rows)
            with timeline.span("publish"):
                extra = {"publish_seconds": learner.publish(channel)}
            dispatcher.trained(rows)
            dispatcher.issue(learner.version)
            due = learner.version == config.steps or learner.version % max(1, config.eval_every) == 0
            if evaluating and due and (accuracy := evaluated()) is not None:
                extra["eval_accuracy"] = accuracy
            if learner.version == config.steps or (config.save_every and learner.version % config.save_every == 0):
                with timeline.span("save"):
                    learner.save(output, tokenizer, sorted(dispatcher.trained_ahead))
                saved = learner.version
            log.write(learner.version, metrics, extra | before)
            before = {}
        if world > 1:
            broadcast(None)
        if interrupted and saved < learner.version:
            learner.save(output, tokenizer, sorted(dispatcher.trained_ahead))
        print(f"{'interrupted' if interrupted else 'done'} after update {learner.version}: {output}", flush=True)
    finally:
        timeline.flush()
        roles.stop()
        close_trace(trace)


def follow(learner: Learner, channel: Channel):
    """Ranks above 0: train on the rows that rank 0 names, until it names none. Interrupts are rank 0's business."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while (rows := broadcast(None)) is not None:
        learner.update(channel, rows)


def broadcast(value):
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def main():
    config = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        train(config, rank, world)
    except (ConfigError, DataError, MemoryError) as error:
        sys.exit(f"train.py: error: {error}")
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        index = error.error_index
        sys.exit(f"train.py: {'teacher' if index == config.generators else f'generator {index}'} died: {error}")
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
