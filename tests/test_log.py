"""Claims about what a run shows while it goes on."""

import fcntl
import json
import os
import struct
import sys
import termios
from types import SimpleNamespace

import pytest
import torch
from runs import read_trace

from channel import STOP
from losses import make_loss
from support.checkpoint import start_output
from support.config import builtin
from support.log import (
    BAR,
    POSTFIX,
    Log,
    Timeline,
    announced,
    is_terminal,
    read_samples,
    show_sample,
    token_texts,
    write_rollouts,
    write_samples,
)


def test_the_timeline_adds_up_busy_seconds_and_writes_a_trace_that_is_json(tmp_path, monkeypatch):
    # Begin and end of each span below.
    clock = iter([1.0, 1.5, 1.5005, 1.9, 2.1, 2.2, 5.0, 6.0, 6.0, 6.5])
    monkeypatch.setattr("support.log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    ours, config = SimpleNamespace(busy=torch.zeros(3)), builtin(output_dir=str(tmp_path))
    start_output(config, None)
    first, second = (Timeline(config, ours, i) for i in (0, 1))
    for timeline, name in (
        (first, "decode"),
        (first, "decode"),
        (first, "decode"),
        (second, "score"),
        (second, "publish"),
    ):
        with timeline.span(name):
            pass
    first.flush()
    second.flush()
    events = read_trace(config.output)
    spans = [(e["tid"], e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events if e["ph"] == "X"]
    # 0.5 ms between them, 100 ms.
    merged, apart = (0, "decode", 1.0, pytest.approx(0.9)), (0, "decode", 2.1, pytest.approx(0.1))
    assert sorted(spans, key=lambda span: span[2]) == [
        merged,
        apart,
        (1, "score", 5.0, 1.0),
        (1, "publish", 6.0, 0.5),
    ]
    assert ours.busy[:2].tolist() == pytest.approx([0.9995, 1.5])


def log_of(tmp_path, values, step=1, **changes):
    """What `Log.advise` prints for updates with these reverse KLs."""
    config = builtin(output_dir=str(tmp_path))
    start_output(config, None)
    log = Log(config, SimpleNamespace(busy=torch.zeros(3)))
    for number, value in enumerate(values, step):
        log.advise({"step": number, "reverse_kl": value, "truncated_fraction": 0.0} | changes)


@pytest.mark.parametrize(
    "values, told",
    [
        ([1.0 - 0.02 * i for i in range(60)], 0),
        ([1.0, 0.86, 1.47] * 20, 0),
        ([0.8] * 10 + [0.9] * 10, 0),
        ([0.5] * 10 + [0.7] * 10, 0),
        ([0.5] * 10 + [0.8] * 10, 1),
        ([0.01] * 19 + [0.7], 0),
        ([0.3] * 30 + [1.0] * 30, 1),
        ([0.1 * i for i in range(100)], 1),
        ([0.002, 0.006] * 30, 0),
        ([0.5] * 9 + [5.0] * 10, 0),
    ],
)
def test_a_reverse_kl_that_rises_over_twenty_updates_is_said_once(values, told, tmp_path, capsys):
    log_of(tmp_path, values)
    out = capsys.readouterr().out
    assert out.count("note: the reverse KL has risen over 20 updates: lower --lr") == told
    assert out.count("note") == told


@pytest.mark.parametrize("fraction, step, told", [(0.6, 1, 1), (0.5, 1, 0), (0.9, 40, 1)])
def test_responses_that_are_mostly_cut_are_said_early_and_once(
    fraction, step, told, tmp_path, capsys
):
    log_of(tmp_path, [0.5] * 8, step, truncated_fraction=fraction)
    note = "note: most responses are cut at --max-new-tokens: raise it"
    assert capsys.readouterr().out.count(note) == told


def test_of_wrong_answers_those_are_kept_that_the_student_is_surest_of(tmp_path, capsys):
    config = builtin(output_dir=str(tmp_path), generators=2)  # two of each kind then
    logp = [-9.0, -9.0, -3.0, -1.0, -0.1, -2.0]
    answers = [
        {"prompt": str(i), "response": "x", "answer": "y", "correct": i == 4, "logp": value}
        for i, value in enumerate(logp)
    ]
    write_samples(config, 7, answers)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["0", "1", "3", "5"]
    write_samples(config, 70, answers[:1])
    assert list(read_samples(config, 7)) == ["0", "1", "3", "5"]
    assert list(read_samples(config, 70)) == ["0"]
    capsys.readouterr()
    show_sample(config, 7, "1")  # whichever generator wrote first
    assert capsys.readouterr().out == "'1' -> 'x': wrong, the answer is 'y'\n"


class Bytes:
    """A tokenizer whose decoder drops the space of the first word, as sentencepiece's does."""

    words = {3: " the", 5: " cat", 8: "s"}

    def decode(self, ids):
        return "".join(self.words[int(i)] for i in ids).removeprefix(" ")

    def batch_decode(self, rows):
        return [self.decode(row) for row in rows]


def test_tokens_keep_the_space_that_some_decoders_drop():
    assert token_texts(torch.tensor([[5, 8], [8, 3]]), Bytes()) == {3: " the", 5: " cat", 8: "s"}


@pytest.mark.parametrize("loss, known", [("forward_kl", 1), ("sparse_reverse_kl", 3)])
def test_no_density_is_written_of_ids_that_the_sampler_did_not_propose(loss, known, tmp_path):
    config = builtin(output_dir=str(tmp_path), loss=loss, top_k=2)
    channel = SimpleNamespace(
        length=torch.tensor([3]),
        prompt_len=torch.tensor([1]),
        tokens=torch.tensor([[3, 5, 8]]),
        finish=torch.tensor([STOP]),
        weight_version=torch.tensor([[0, 0]]),
    )
    s = torch.full((2, 3), -1.25)
    table = ([0], s, torch.tensor([[5, 5, 8], [8, 8, 3]]), s - 1, s - 2)
    student = SimpleNamespace(loss=make_loss(config))
    write_rollouts(
        config, channel, SimpleNamespace(student=student, shown=[table], version=1), Bytes()
    )
    line = json.loads((tmp_path / "rollouts.jsonl").read_text())
    assert line["behavior_logp"] == 2 * [known * [-3.25] + (3 - known) * [None]]
    assert line["teacher_logp"] == 2 * [3 * [-2.25]] and line["tokens"] == [" cat", "s"]


RECORD = {"tokens": 10, "reverse_kl": 0.5, "lag_mean": 0.0, "truncated_fraction": 0.0}


def closed_log(tmp_path, busy, **settings):
    """What a log says at the end of a run whose roles start in 99 s, make an update, and are busy
    for so many seconds of the 10 s of the second one.
    """
    config = builtin(output_dir=str(tmp_path), **settings)
    start_output(config, None)
    channel = SimpleNamespace(busy=torch.zeros(len(busy)), cache_stats=torch.zeros(1, 4))
    with pytest.MonkeyPatch.context() as patch:
        clock = iter([0.0, 99.0, 109.0])
        patch.setattr("support.log.time", SimpleNamespace(monotonic=lambda: next(clock)))
        log = Log(config, channel)
        log.write(1, RECORD)
        channel.busy += torch.tensor(busy)
        log.write(2, RECORD)
        log.close()


@pytest.mark.parametrize(
    "busy, settings, told",
    [
        ([9.0, 2.0, 4.0], {}, "the others wait for the generator: raise --generators"),
        ([9.0, 9.0, 2.0, 4.0], {"generators": 2}, "the others wait for the generator"),
        ([3.0, 9.5, 2.0], {}, "the others wait for the teacher: raise --teachers"),
        ([4.0, 2.0, 9.5], {}, "the others wait for the learner: raise --nproc-per-node"),
        ([6.0, 2.0, 7.0], {}, "they wait for each other: raise --max-staleness or --window"),
        ([6.0, 1.0, 3.0], {"max_staleness": 0}, "they take turns: --max-staleness 4"),
        ([9.0, 1.0, 5.0], {"max_staleness": 0, "window": 1}, "wait for the generator"),
    ],
)
def test_the_end_names_who_held_the_run_up(busy, settings, told, tmp_path, capsys):
    closed_log(tmp_path, busy, **settings)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("10 s of updates"))
    assert told in line


def test_a_terminal_gets_one_bar_and_a_file_gets_a_line_for_each_update(
    tmp_path, monkeypatch, capsys
):
    closed_log(tmp_path / "file", [9.0, 2.0, 4.0], steps=3)
    plain = capsys.readouterr().out
    assert "update    1/3  reverse KL 0.5000" in plain and "\r" not in plain
    monkeypatch.setattr("support.log.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    closed_log(tmp_path / "terminal", [9.0, 2.0, 4.0], steps=3)
    bar = capsys.readouterr().out
    assert "update " not in bar and "2/3 " in bar and "KL 0.500  " in bar
    widest = {"postfix": POSTFIX, "n_fmt": "1000", "total_fmt": "1000", "bar": "", "remaining": ""}
    line = BAR.replace("{bar:8}", 8 * "#").format(**widest | {"remaining": "1:00:00"})
    numbers = {"reverse_kl": 12.345, "tokens_per_second": 123456, "lag_mean": 4.0}
    shares = dict.fromkeys(("generator_busy", "teacher_busy", "learner_busy"), 0.99)
    assert len(", accuracy 100.0%  " + line.format(**numbers, **shares)) <= 110


@pytest.mark.parametrize("lines", [0, 30])
def test_a_terminal_without_lines_gets_no_bar(lines):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, 100, 0, 0))
    with open(theirs, "w") as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        found = is_terminal()
    os.close(ours)
    assert found == (lines > 0)


@pytest.mark.parametrize("updates, told", [(0, ""), (1, "to look at it"), (2, "s of updates")])
def test_a_run_that_ends_early_says_what_there_is_to_say(updates, told, tmp_path, capsys):
    config = builtin(output_dir=str(tmp_path))
    start_output(config, None)
    log = Log(config, SimpleNamespace(busy=torch.zeros(3), cache_stats=torch.zeros(1, 4)))
    for step in range(1, updates + 1):
        log.write(step, RECORD | ({"eval_accuracy": 0.5} if step == 1 else {}))
    capsys.readouterr()
    log.close()
    out = capsys.readouterr().out
    assert told in out and (out == "") == (told == "")
    assert "->" not in out  # one evaluation is no way from here to there


def test_what_takes_two_seconds_is_announced_and_what_does_not_is_not(monkeypatch, capsys):
    timers = []

    class Timer:
        def __init__(self, seconds, call, arguments):
            self.seconds, self.fire = seconds, lambda: self.running and call(*arguments)
            timers.append(self)

        def start(self):
            self.running = True

        def cancel(self):
            self.running = False

    monkeypatch.setattr("support.log.Timer", Timer)
    with announced("saving"):
        timers[0].fire()
    assert timers[0].seconds == 2.0 and capsys.readouterr().out == "saving ...\n"
    with pytest.raises(ZeroDivisionError), announced("loading"):
        1 / 0
    timers[1].fire()
    assert capsys.readouterr().out == ""


def test_the_end_shows_a_prompt_that_was_wrong_and_is_right_now(tmp_path, capsys):
    config = builtin(output_dir=str(tmp_path))
    start_output(config, None)
    log = Log(config, SimpleNamespace(busy=torch.zeros(3), cache_stats=torch.zeros(1, 4)))
    verdicts = {0: (None, True, False, False), 50: (None, True, True, False)}
    for step, correct in verdicts.items():
        answers = [
            {"prompt": f"p{i}", "response": f"r{i} at {step}", "answer": "x", "correct": verdict}
            for i, verdict in enumerate(correct)
        ]
        write_samples(config, step, [answer | {"logp": -1.0} for answer in answers])
    log.write(49, RECORD | {"eval_accuracy_before": 0.25})
    log.write(50, RECORD | {"eval_accuracy": 0.5})
    log.close()
    out = capsys.readouterr().out.splitlines()
    place = out.index("accuracy 25.0% -> 50.0%")
    assert out[place + 1] == "before: 'p2' -> 'r2 at 0': wrong, the answer is 'x'"
    assert out[place + 2] == "now:    'p2' -> 'r2 at 50': right"
    assert out[place + 3].startswith("to look at it: ")
