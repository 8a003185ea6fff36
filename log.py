"""What a run writes beside its checkpoints: the output directory with config.yaml, metrics.jsonl, trace.json; the progress line.

docs/metrics.md defines every metric. The trace is in Chrome's event format, one track per role: open it in Perfetto
to see who waits for whom.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor

from channel import Channel
from config import Config, ConfigError

MUST_MATCH = ("student", "prompts", "eval_prompts", "eval_size", "seed", "batch_size", "samples_per_prompt", "order",
              "max_prompt_tokens", "drop_long_prompts")  # fmt: skip


def newest_checkpoint(output_dir: Path) -> Path | None:
    complete = (path.parent for path in output_dir.glob("step_*/training_state.pt"))
    return max((path for path in complete if path.name.removeprefix("step_").isdigit()), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def check_output(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, None for a new run; and what the user should be told. Makes the directory, writes nothing.

    Raises ConfigError if the directory cannot be written or holds another run, if there is nothing to resume, or if a
    setting that decides which rollouts come next has changed since.
    """
    output = Path(config.output_dir)
    checkpoint = newest_checkpoint(output)
    if not config.resume:
        metrics = output / "metrics.jsonl"
        if checkpoint or metrics.exists() and metrics.stat().st_size:
            fix = f"--resume continues it after update {step_of(checkpoint)}" if checkpoint else "it has no checkpoint to resume from"
            raise ConfigError(f"--output-dir {output} holds another run: choose a new directory ({fix})")
        try:
            output.mkdir(parents=True, exist_ok=True)
            if not os.access(output, os.W_OK):
                raise PermissionError("no permission to write into it")
        except OSError as error:
            raise ConfigError(f"--output-dir {output}: {error}: choose another directory") from None
        return None, []
    if checkpoint is None:
        raise ConfigError(f"--resume: no checkpoint (step_N) in --output-dir {output}: start without --resume")
    try:
        before = dict(yaml.safe_load((output / "config.yaml").read_text()))
        if not zipfile.is_zipfile(checkpoint / "training_state.pt"):
            raise OSError(f"training_state.pt is damaged, without {checkpoint} an older one is taken")
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--resume: {output}/config.yaml or {checkpoint} cannot be read: {error}") from None
    for name in MUST_MATCH:
        if before.get(name) != getattr(config, name):
            raise ConfigError(f"--resume: {name} was {before.get(name)!r} and is {getattr(config, name)!r}: keep it")
    if step_of(checkpoint) >= config.steps:
        raise ConfigError(f"--resume: {output} has made {step_of(checkpoint)} updates already, --steps is {config.steps}: raise it")
    now = yaml.safe_load(config.dump())
    changed = [f"{name} was {before.get(name)!r} and is now {value!r}" for name, value in now.items() if before.get(name) != value]
    return checkpoint, [f"resuming from {checkpoint}", *changed]


def start_output(config: Config, checkpoint: Path | None) -> Path:
    """Set up the output directory: config.yaml as used; metrics of updates that will be made again are dropped."""
    output = Path(config.output_dir)
    used = output / "config.yaml"
    if checkpoint and used.read_text() != config.dump():
        used.rename(output / f"config_until_{checkpoint.name}.yaml")
    used.write_text(config.dump())
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if checkpoint and metrics.exists() else []
    whole = (line for line in lines if line.endswith("}"))  # a machine that went down may have cut the last one
    metrics.write_text("".join(line + "\n" for line in whole if json.loads(line)["step"] <= step_of(checkpoint)))
    return output


class Timeline:
    """What a role does when: busy seconds for the metrics, spans for trace.json (Chrome trace event format).

    Every role appends whole lines to one file; the monotonic clock is the same in all processes. Spans of one
    name that follow each other within a millisecond are drawn as one.
    """

    def __init__(self, busy: Tensor, path: Path, track: int, name: str):
        """`busy`: this role's float64 [1] in the channel. `path`: trace.json. `track`: the row in the picture."""
        self.busy, self.track, self.open_span = busy, track, None
        self.file = open(path, "a", buffering=1)
        self._write({"name": "thread_name", "ph": "M", "pid": 0, "tid": track, "args": {"name": name}})

    @contextmanager
    def span(self, name: str):
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self.busy += end - start
            last = self.open_span
            if last and last[0] == name and start - last[2] < 1e-3 and end - last[1] < 1.0:
                last[2] = end
            else:
                self.flush()
                self.open_span = [name, start, end]

    def flush(self):
        if self.open_span:
            name, start, end = self.open_span
            self._write({"name": name, "ph": "X", "pid": 0, "tid": self.track, "ts": start * 1e6, "dur": (end - start) * 1e6})
            self.open_span = None

    def _write(self, event: dict):
        self.file.write(json.dumps(event) + ",\n")


def open_trace(path: Path):
    path.write_text("[\n")


def close_trace(path: Path):
    """Make the trace valid JSON once every role has flushed (viewers also read it without)."""
    path.write_text(path.read_text().rstrip().rstrip(",") + "\n]\n")


class Log:
    """metrics.jsonl, one object per update, and the progress line. Busy times are fractions since the last update."""

    def __init__(self, config: Config, channel: Channel):
        self.config, self.channel = config, channel
        path = Path(config.output_dir) / "metrics.jsonl"
        lines = path.read_text().splitlines()
        self.earlier = json.loads(lines[-1])["wall_seconds"] if lines else 0.0  # of the run that is resumed
        self.file = open(path, "a", buffering=1)
        self.started = self.last = time.monotonic()
        self.busy = channel.busy.clone()

    def write(self, step: int, metrics: dict):
        now, busy = time.monotonic(), self.channel.busy.clone()
        elapsed, spent = now - self.last, (busy - self.busy).split([self.config.generators, 1, 1])
        share = dict(zip(("generator", "teacher", "learner"), (float(part.mean()) / elapsed for part in spent)))
        hits, misses, used, evicted = self.channel.cache_stats.tolist()
        record = {"step": step, **metrics, "tokens_per_second": metrics["tokens"] / elapsed}
        record |= {f"{role}_busy": value for role, value in share.items()}
        record |= {"teacher_cache_hit_rate": hits / max(1, hits + misses)}
        record |= {"teacher_cache_bytes": used, "teacher_cache_evictions": evicted}
        record |= {"wall_seconds": self.earlier + now - self.started}
        if torch.cuda.is_available():
            record["learner_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.last, self.busy = now, busy
        self.file.write(json.dumps(record) + "\n")
        slower = max(("generator", "teacher"), key=share.get)
        print(
            f"update {step:4d}/{self.config.steps}  reverse KL {record['reverse_kl']:7.4f}  loss {record['loss']:8.4f}  "
            f"{record['tokens_per_second']:7.0f} tokens/s  lag {record['lag_mean']:.2f}  "
            f"learner {share['learner']:4.0%} busy, else waits for the {slower} ({share[slower]:.0%} busy)"
            + (f"  accuracy {record['eval_accuracy']:.1%}" if "eval_accuracy" in record else ""), flush=True,
        )  # fmt: skip
