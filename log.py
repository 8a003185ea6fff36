"""What a run writes beside its checkpoints: config.yaml, metrics.jsonl, trace.json, progress.

docs/metrics.md defines every metric. The trace has Chrome's event format, one track per role: open
it in Perfetto to see who waits for whom.
"""

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config

# ---- the output directory ---------------------------------------------------------------------


def newest_checkpoint(output: Path):
    found = [path.parent for path in output.glob("step_*/training_state.pt")]
    return max((path for path in found if path.name[5:].isdigit()), key=step_of, default=None)


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step_"))


def start_output(config: Config, checkpoint: Path | None):
    """Write config.yaml and drop the metrics of updates that will be made again."""
    used = config.output / "config.yaml"
    if checkpoint and used.read_text() != config.dump():
        used.rename(used.with_name(f"config_until_{checkpoint.name}.yaml"))
    used.write_text(config.dump())
    metrics = config.output / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if checkpoint and metrics.exists() else []
    whole = [line for line in lines if line.endswith("}")]  # a crash may have cut the last one
    kept = [line + "\n" for line in whole if json.loads(line)["step"] <= step_of(checkpoint)]
    metrics.write_text("".join(kept))
    config.trace.write_text("[\n")  # each event follows as a line


# ---- who works when ---------------------------------------------------------------------------


class Timeline:
    """What a role does when: busy seconds for the metrics, spans for trace.json.

    Every role appends whole lines to one file, and all processes read the same monotonic clock.
    Spans of one name that follow each other within a millisecond are drawn as one.
    """

    def __init__(self, config: Config, channel, track, name):
        """`track`: the role's place in `channel.busy` and on screen."""
        self.busy = channel.busy[track : track + 1]
        self.track = track
        self.last_span = None
        self.file = open(config.trace, "a", buffering=1)
        self.write(name="thread_name", ph="M", args={"name": name})

    @contextmanager
    def span(self, name):
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, start, time.monotonic())

    def add(self, name, start, end):
        self.busy += end - start
        last = self.last_span
        if last and last[0] == name and start - last[2] < 1e-3 and end - last[1] < 1.0:
            last[2] = end
        else:
            self.flush()
            self.last_span = [name, start, end]

    def flush(self):
        if self.last_span:
            name, start, end = self.last_span
            self.write(name=name, ph="X", ts=start * 1e6, dur=(end - start) * 1e6)
            self.last_span = None

    def write(self, **event):
        self.file.write(json.dumps({"pid": 0, "tid": self.track, **event}) + ",\n")


def close_trace(path):
    """Make the trace valid JSON once every role has flushed. Viewers also read it without."""
    path.write_text(path.read_text().rstrip().rstrip(",") + "\n]\n")


# ---- metrics and progress ---------------------------------------------------------------------

ROLES = ("generator", "teacher", "learner")


class Log:
    """metrics.jsonl and the progress. Busy times are fractions of the time since the last update.

    On a terminal the progress is one line that is drawn again, elsewhere a line per update.
    """

    def __init__(self, config: Config, channel):
        self.config, self.channel = config, channel
        path = config.output / "metrics.jsonl"
        lines = path.read_text().splitlines()
        before = json.loads(lines[-1])["wall_seconds"] if lines else 0.0  # of the resumed run
        self.file = open(path, "a", buffering=1)
        self.last = time.monotonic()
        self.started = self.last - before
        self.began = self.last
        self.busy = self.busy_before = channel.busy.clone()
        self.first = None
        self.warned = set()
        self.accuracy = ""  # on a terminal the last one stays
        self.bar = tqdm(
            total=config.steps,
            initial=len(lines),
            disable=not (sys.stdout.isatty() and sys.stderr.isatty()),
            bar_format="{n}/{total} [{elapsed}, {remaining} left]{postfix}",
        )

    def write(self, step, metrics):
        """Append the record of update number `step` and show it."""
        now = time.monotonic()
        elapsed = now - self.last
        self.last = now
        record = {"step": step, **metrics, "tokens_per_second": metrics["tokens"] / elapsed}
        for role, share in zip(ROLES, self.shares(self.busy, elapsed)):
            record[f"{role}_busy"] = share
        self.busy = self.channel.busy.clone()
        record |= self.cache_metrics()
        record["wall_seconds"] = now - self.started
        if torch.cuda.is_available():
            record["learner_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.file.write(json.dumps(record) + "\n")
        self.warn(record)
        self.show(record)

    def warn(self, record):
        """Say once what asks for attention; docs/metrics.md says what to do about it."""
        self.first = self.first or record
        mass, is_sparse = "support_mass_student", self.config.loss == "sparse_reverse_kl"
        signs = {
            "drift_k3 > 0.02 without lag": not record["lag_max"] and record["drift_k3"] > 0.02,
            "support_mass_student has halved": is_sparse and 2 * record[mass] < self.first[mass],
            "truncated_fraction is above 0.9": record["truncated_fraction"] > 0.9,
        }
        for sign, is_due in signs.items():
            if is_due and sign not in self.warned:
                tqdm.write(f"warning: {sign}")
                self.warned.add(sign)

    def close(self):
        self.file.close()
        self.bar.close()

    def shares(self, before, seconds):
        """How busy each of ROLES was, a mean over its processes. `before`: channel.busy then."""
        busy = (self.channel.busy - before) / seconds
        sizes = (self.config.generators, self.config.teachers, 1)
        return [float(role.mean()) for role in busy.split(sizes)]

    def bottleneck(self, ranks):
        """How busy the roles were in this run, and what an even split of its processes would give.

        Taken for granted: a role with twice the processes needs half the time.
        """
        shares = self.shares(self.busy_before, self.last - self.began)
        text = ", ".join(f"{role} {share:.0%}" for role, share in zip(ROLES, shares))
        counts = (self.config.generators, self.config.teachers, ranks)
        work = [share * count for share, count in zip(shares, counts)]
        if self.config.max_staleness and torch.cuda.is_available() and max(shares) > 0.5:
            scale = sum(counts) / sum(work)
            even = ", ".join(f"{scale * part:.1f} {role}s" for role, part in zip(ROLES, work))
            text += f"; {even} would be equally busy, up to {scale * max(shares):.1f} times as fast"
        return f"busy: {text}"

    def cache_metrics(self):
        hits, misses, used, evicted = self.channel.cache_stats.sum(0).tolist()
        return {
            "teacher_cache_hit_rate": hits / max(1, hits + misses),
            "teacher_cache_bytes": used,
            "teacher_cache_evictions": evicted,
        }

    def show(self, record):
        text = (
            "reverse KL {reverse_kl:.4f}  {tokens_per_second:.0f} tokens/s  lag {lag_mean:.2f}  "
            "busy: generator {generator_busy:.0%}, teacher {teacher_busy:.0%}, "
            "learner {learner_busy:.0%}"
        )
        text = text.format(**record)
        if "eval_accuracy" in record:
            self.accuracy = f"accuracy {record['eval_accuracy']:.1%}  "
        if self.bar.disable:
            step = f"update {record['step']:4d}/{self.config.steps}"
            print(f"{step}  {self.accuracy}{text}", flush=True)
            self.accuracy = ""
        self.bar.n = record["step"]
        self.bar.set_postfix_str(self.accuracy + text)  # draws the line
