"""What a run shows: metrics.jsonl, trace.json, samples.jsonl, rollouts.jsonl, the progress.

docs/metrics.md defines every metric. The trace has Chrome's event format, one track per role: open
it in Perfetto to see who waits for whom. It is an array without its end, which viewers allow.
`python -m experiments.page` makes one page of all four files.
"""

import json
import math
import os
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from threading import Timer

from tqdm import tqdm

from channel import STOP
from support.config import Config

MORE = {"generator": "--generators", "teacher": "--teachers", "learner": "--nproc-per-node"}
LINE = (
    "reverse KL {reverse_kl:.4f}  {tokens_per_second:.0f} tok/s  lag {lag_mean:.2f}  "
    "busy: generator {generator_busy:.0%}, teacher {teacher_busy:.0%}, learner {learner_busy:.0%}"
)
BAR = "{n_fmt}/{total_fmt} {bar:8} {remaining} left{postfix}"  # 100 columns show all of it
POSTFIX = (
    "KL {reverse_kl:.3f}  {tokens_per_second:.0f} tok/s  lag {lag_mean:.1f}  "
    "busy G {generator_busy:.0%} T {teacher_busy:.0%} L {learner_busy:.0%}"
)
SHOWN = 4  # prompts of an evaluation, and rollouts of an update, that are written out

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


# ---- text ------------------------------------------------------------------------------------


def append(path, lines):
    """Add lines in one write, so that those of several processes do not mix."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_samples(config: Config, step: int, answers: list[dict]):
    """Append to samples.jsonl: a generator's first prompts, and its worst answers to the others.

    `answers`: see Sampler.evaluate. The worst are the wrong ones that the student is surest of.
    """
    count = max(1, SHOWN // config.generators)
    wrong = [answer for answer in answers[count:] if answer["correct"] is False]
    wrong.sort(key=lambda answer: -answer["logp"])
    chosen = answers[:count] + wrong[:count]
    append(config.output / "samples.jsonl", [{"step": step, **answer} for answer in chosen])


def read_samples(config: Config, step: int):
    """What the evaluation after update `step` has written, by prompt."""
    with open(config.output / "samples.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.startswith(f'{{"step": {step},')]
    return {line["prompt"]: line for line in lines}


def show_sample(config: Config, step: int, prompt: str):
    """Print what the student said to a prompt in the evaluation after update `step`."""
    tqdm.write(one_line(read_samples(config, step)[prompt]))


def one_line(sample):
    wrong = f": wrong, the answer is {sample['answer']!r}"
    verdict = {None: "", True: ": right", False: wrong}[sample["correct"]]
    return f"{sample['prompt'][-60:]!r} -> {sample['response'][:80]!r}{verdict}"


def write_rollouts(config: Config, channel, learner, tokenizer):
    """Append to rollouts.jsonl: a few rollouts of the last update, with all that the loss saw.

    Ids and log-probabilities are lists [T][C]; `columns` says which are draws, top, tail, and
    `texts` what the ids stand for. `behavior_logp` is None for the teacher's own ids.
    """
    loss = learner.student.loss
    kinds = {"draws": loss.draws, "top": loss.top, "tail": loss.tail}
    unknown = [None] * loss.teacher_top
    found = []
    for rows, *tables in learner.shown:
        counts = (channel.length[rows] - channel.prompt_len[rows]).tolist()
        found += zip(rows, *(table.cpu().split(counts) for table in tables))
    lines = []
    for row, s, ids, t, b in found[:: math.ceil(len(found) / SHOWN) or 1]:  # long and short
        texts = token_texts(ids, tokenizer)
        lines.append(
            {
                "step": learner.version,
                "prompt": tokenizer.decode(channel.tokens[row, : channel.prompt_len[row]]),
                "response": tokenizer.decode(ids[:, 0]),
                "finish": "stop" if channel.finish[row] == STOP else "length",
                "weight_version": channel.weight_version[row, : len(ids)].tolist(),
                "columns": {name: [kind.start, kind.stop] for name, kind in kinds.items()},
                "tokens": [texts[i] for i in ids[:, 0].tolist()],
                "texts": texts,
                "candidate_ids": ids.tolist(),
                "student_logp": rounded(s),
                "teacher_logp": rounded(t),
                "behavior_logp": [x[: loss.num_proposed] + unknown for x in rounded(b)],
            }
        )
    append(config.output / "rollouts.jsonl", lines)


def token_texts(ids, tokenizer):
    """{id: its text after another token}. Some tokenizers drop the space of a word at the start."""
    known = ids.unique().tolist()
    first = tokenizer.decode(known[:1])
    pairs = tokenizer.batch_decode([[known[0], i] for i in known])
    return dict(zip(known, (pair.removeprefix(first) for pair in pairs)))


def rounded(table):
    return [[round(value, 4) for value in row] for row in table.tolist()]


# ---- metrics and progress ---------------------------------------------------------------------


@contextmanager
def announced(what: str):
    """Say what is being done once it has taken two seconds."""
    timer = Timer(2.0, tqdm.write, [f"{what} ..."])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_terminal():
    """Whether a bar is seen. In a terminal without lines, as some containers have, it is not."""
    with suppress(OSError, ValueError):  # what is no terminal has no size, or no descriptor
        return os.get_terminal_size(sys.stdout.fileno()).lines > 0
    return False


class Log:
    """metrics.jsonl and the progress. Busy: a fraction of the time since the last update."""

    def __init__(self, config: Config, channel):
        self.config, self.channel = config, channel
        path = config.output / "metrics.jsonl"
        lines = path.read_text().splitlines()
        before = json.loads(lines[-1]) if lines else {"step": 0, "wall_seconds": 0.0}  # if resumed
        self.file = open(path, "a", buffering=1)
        self.last = time.monotonic()
        self.started = self.last - before["wall_seconds"]
        self.seconds = channel.busy.clone()
        self.first = None  # time and busy seconds after the first update: until then roles start
        self.reverse_kl = deque(maxlen=20)
        self.accuracy = {}  # update -> of the evaluation after it
        options = {"dynamic_ncols": True, "bar_format": BAR, "file": sys.stdout}
        options["disable"] = not is_terminal()
        self.bar = tqdm(total=config.steps, initial=before["step"], **options)

    def write(self, step, metrics):
        """Append the record of update number `step` and show it."""
        now = time.monotonic()
        elapsed = now - self.last
        self.last = now
        record = {"step": step, **metrics, "tokens_per_second": metrics["tokens"] / elapsed}
        seconds = self.channel.busy.clone()
        busy = (seconds - self.seconds) / elapsed  # of every role
        self.seconds = seconds
        self.first = self.first or (now, seconds)
        record |= {f"{kind}_busy": value for kind, value in self.by_kind(busy).items()}
        record |= cache_figures(self.channel.cache_stats.sum(0))
        if len(self.channel.cache_stats) > 1:  # of each teacher process
            start = self.config.generators
            names = self.config.role_names[start:]
            for name, part, stats in zip(names, busy[start:], self.channel.cache_stats):
                own = {"teacher_busy": float(part), **cache_figures(stats)}
                label = name.removeprefix("teacher ")
                record |= {f"{key}/{label}": value for key, value in own.items()}
        record["wall_seconds"] = now - self.started
        self.file.write(json.dumps(record) + "\n")
        for key, update in (("eval_accuracy_before", 0), ("eval_accuracy", step)):
            if key in record:
                self.accuracy[update] = record[key]
        self.show(record)
        self.advise(record)

    def by_kind(self, busy):
        """The mean of a number of every role, by the kind of role."""
        names = self.config.role_names
        kinds = {kind: [name.startswith(kind) for name in names] for kind in MORE}
        return {kind: float(busy[of_kind].mean()) for kind, of_kind in kinds.items()}

    def show(self, record):
        step, accuracy = record["step"], [*self.accuracy.values()][-1:]
        if self.bar.disable:
            text = LINE.format(**record)
            if step in self.accuracy:
                text += f"  accuracy {accuracy[0]:.1%}"
            print(f"update {step:4d}/{self.config.steps}  {text}", flush=True)
        else:
            text = "".join(f"accuracy {share:.1%}  " for share in accuracy)
            self.bar.set_postfix_str(text + POSTFIX.format(**record), refresh=False)
            self.bar.update()

    def advise(self, record):
        """Say once what looks wrong, and which option changes it."""
        self.reverse_kl.append(record["reverse_kl"])
        values = list(self.reverse_kl)
        if len(values) == 3 and record["truncated_fraction"] > 0.5:
            tqdm.write("note: most responses are cut at --max-new-tokens: raise it")
        # Of medians: one noisy update is no rise.
        if len(values) == 20 and sorted(values[10:])[5] > 1.3 * sorted(values[:10])[5] + 0.1:
            tqdm.write("note: the reverse KL has risen over 20 updates: lower --lr")
            self.reverse_kl = deque(maxlen=0)  # say it once

    def close(self):
        """Say what the updates came to, who held them up, and where to look."""
        self.bar.close()
        if self.first is None:
            return
        started, seconds = self.first
        if self.last > started:
            self.judge(self.last - started, self.seconds - seconds)
        if len(self.accuracy) > 1:
            first, last = min(self.accuracy), max(self.accuracy)
            print(f"accuracy {self.accuracy[first]:.1%} -> {self.accuracy[last]:.1%}")
            old, new = (read_samples(self.config, step) for step in (first, last))
            wrong = [prompt for prompt in old if old[prompt]["correct"] is False]
            for prompt in [p for p in wrong if p in new and new[p]["correct"]][:1]:
                print(f"before: {one_line(old[prompt])}\nnow:    {one_line(new[prompt])}")
        print(f"to look at it: python -m experiments.page {self.config.output_dir}")

    def judge(self, elapsed, seconds):
        """Print how busy the roles were, `seconds` of `elapsed`, and which option helps."""
        busy = self.by_kind(seconds / elapsed)
        busiest = max(busy, key=busy.get)
        if self.config.max_staleness + self.config.window == 0:
            advice = "they take turns: --max-staleness 4 lets them overlap"
        elif busy[busiest] < 0.8:
            advice = "they wait for each other: raise --max-staleness or --window"
        else:
            fix = f"{MORE[busiest]} where cores or GPUs are left"
            advice = f"the others wait for the {busiest}: raise {fix}"
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in busy.items())
        print(f"{elapsed:.0f} s of updates, busy: {shares}: {advice}")
