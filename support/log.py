"""What a run shows while it goes on: metrics.jsonl, trace.json, the progress line.

docs/metrics.md defines every metric. The trace has Chrome's event format, one track per role: open
it in Perfetto to see who waits for whom. It is an array without its end, which viewers allow.
"""

import json
import time
from collections import deque
from contextlib import contextmanager

from support.config import Config

# ---- who works when ---------------------------------------------------------------------------


class Timeline:
    """What a role does when: busy seconds for the metrics, spans for trace.json.

    Every role appends whole lines to one file, and all processes read the same monotonic clock.
    Spans of one name that follow each other within a millisecond are drawn as one.
    """

    def __init__(self, config: Config, channel, track):
        """`track`: the role's place in `channel.busy` and on screen."""
        self.busy = channel.busy[track : track + 1]
        self.track = track
        self.last_span = None
        self.file = open(config.output / "trace.json", "a", buffering=1)
        self.write(name="thread_name", ph="M", args={"name": config.role_names[track]})

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


def cache_figures(stats):
    """Metrics of a row of `channel.cache_stats`."""
    hits, misses, used, evicted = stats.tolist()
    return {
        "teacher_cache_hit_rate": hits / max(1, hits + misses),
        "teacher_cache_bytes": used,
        "teacher_cache_evictions": evicted,
    }


# ---- metrics and progress ---------------------------------------------------------------------


class Log:
    """metrics.jsonl and the progress. Busy: a fraction of the time since the last update."""

    def __init__(self, config: Config, channel):
        self.config, self.channel = config, channel
        path = config.output / "metrics.jsonl"
        lines = path.read_text().splitlines()
        before = json.loads(lines[-1])["wall_seconds"] if lines else 0.0  # of the resumed run
        self.file = open(path, "a", buffering=1)
        self.last = time.monotonic()
        self.started = self.last - before
        self.seconds = channel.busy.clone()
        self.reverse_kl = deque(maxlen=20)

    def write(self, step, metrics):
        """Append the record of update number `step` and show it."""
        now = time.monotonic()
        elapsed = now - self.last
        self.last = now
        record = {"step": step, **metrics, "tokens_per_second": metrics["tokens"] / elapsed}
        seconds = self.channel.busy.clone()
        busy = (seconds - self.seconds) / elapsed  # of every role
        self.seconds = seconds
        names = self.config.role_names
        for role in ("generator", "teacher", "learner"):
            of_role = [name.startswith(role) for name in names]
            record[f"{role}_busy"] = float(busy[of_role].mean())
        record |= cache_figures(self.channel.cache_stats.sum(0))
        if len(self.channel.cache_stats) > 1:  # of each teacher process
            start = self.config.generators
            for name, part, stats in zip(names[start:], busy[start:], self.channel.cache_stats):
                own = {"teacher_busy": float(part), **cache_figures(stats)}
                label = name.removeprefix("teacher ")
                record |= {f"{key}/{label}": value for key, value in own.items()}
        record["wall_seconds"] = now - self.started
        self.file.write(json.dumps(record) + "\n")
        self.show(record)
        self.advise(record)

    def show(self, record):
        text = (
            "update {step:4d}/{steps}  reverse KL {reverse_kl:.4f}  {tokens_per_second:.0f} tok/s  "
            "lag {lag_mean:.2f}  busy: generator {generator_busy:.0%}, teacher {teacher_busy:.0%}, "
            "learner {learner_busy:.0%}"
        ).format(**record, steps=self.config.steps)
        if "eval_accuracy" in record:
            text += f"  accuracy {record['eval_accuracy']:.1%}"
        print(text, flush=True)

    def advise(self, record):
        """Say once what looks wrong, and which option changes it."""
        self.reverse_kl.append(record["reverse_kl"])
        values = list(self.reverse_kl)
        if len(values) == 3 and record["truncated_fraction"] > 0.5:
            print("note: most responses are cut at --max-new-tokens: raise it")
        # Of medians: one noisy update is no rise.
        if len(values) == 20 and sorted(values[10:])[5] > 1.3 * sorted(values[:10])[5] + 0.1:
            print("note: the reverse KL has risen over 20 updates: lower --lr")
            self.reverse_kl = deque(maxlen=0)  # say it once
