"""Claims about logging a run elsewhere: every update once, whatever happens to the run."""

import json
import os
import sqlite3
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec

import pytest
from conftest import ROOT
from test_page import NASTY, write_lines, write_run

from experiments import follow
from support.checkpoint import lock_output

ONCE = Namespace(to="list", once=True, every=0.01, project="p", name="n")


def needs(package):
    why = f"{package} is not installed: pip install {package}, then this test runs"
    return pytest.mark.skipif(not find_spec(package), reason=why)


@pytest.fixture
def logged(monkeypatch):
    """What a target would get: a list of (step, numbers, samples)."""
    calls = []
    target = lambda run, args, settings, state: lambda *call: calls.append(call)  # noqa: E731
    monkeypatch.setitem(follow.TARGETS, "list", target)
    return calls


def test_every_update_is_logged_once_with_its_samples(logged, tmp_path):
    run = write_run(tmp_path / "run")
    assert follow.follow(run, ONCE) == 60
    assert [step for step, _, _ in logged] == list(range(61))
    assert logged[0][1] == {"eval_accuracy_before": 0.0} and "step" not in logged[7][1]
    assert logged[7][1]["reverse_kl"] == 1 / 7
    assert {step for step, _, samples in logged if samples} == {0, 20, 40, 60}
    assert [sample["prompt"] for sample in logged[20][2]] == ["always", "worst of 20"]
    assert follow.follow(run, ONCE) == 0 and len(logged) == 61


def test_a_run_that_grows_is_killed_and_resumed_is_logged_without_a_gap_or_a_repetition(
    logged, tmp_path
):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)

    def has(count, half=""):
        (run / "metrics.jsonl").write_text("".join(lines[:count]) + half)

    has(10, half=lines[10][:30])  # it is being written
    assert follow.follow(run, ONCE) == 10
    has(25)
    assert follow.follow(run, ONCE) == 15
    has(20)  # resumed from a checkpoint: five updates are made again
    assert follow.follow(run, ONCE) == 0
    has(60)
    assert follow.follow(run, ONCE) == 35
    assert [step for step, _, _ in logged] == list(range(61))


def test_it_follows_as_long_as_the_run_holds_its_directory(logged, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(whole[:5]))
    holder = [sys.executable, "-c", "import sys, fcntl\nf = open(sys.argv[1], 'w')\n"]
    holder[-1] += "fcntl.flock(f, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [*holder, str(run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        pauses = []

        def sleep(seconds):  # the run goes on, and ends after the third look
            pauses.append(seconds)
            (run / "metrics.jsonl").write_text("".join(whole[: 5 + 5 * len(pauses)]))
            if len(pauses) == 3:
                process.stdin.close()
                process.wait()

        monkeypatch.setattr(follow.time, "sleep", sleep)
        assert follow.follow(run, Namespace(**vars(ONCE) | {"once": False})) == 20
    assert pauses == [0.01] * 3


def test_looking_at_a_run_does_not_take_its_directory(tmp_path):
    assert not follow.is_running(tmp_path)
    (tmp_path / ".lock").touch()
    assert not follow.is_running(tmp_path)
    lock_output(tmp_path)


def test_a_second_one_is_refused_and_a_verdict_that_is_none_is_not_shown(logged, tmp_path):
    run = write_run(tmp_path / "run")
    refused = []

    def second(*call):
        with pytest.raises(ValueError, match="another follow logs it to list: end that one first"):
            follow.follow(run, ONCE)
        refused.append(call)

    follow.TARGETS["list"] = lambda *arguments: second
    follow.follow(run, ONCE)
    assert len(refused) == 61 and not list(run.glob("*.partial"))
    sample = {"prompt": "a | b", "response": "two\nlines", "answer": None, "correct": None}
    assert follow.as_markdown([sample]).splitlines()[-1] == "| a \\| b | two lines |  |  |"


def command(run, target, **environment):
    line = [sys.executable, "-m", "experiments.follow", str(run), "--to", target, "--once"]
    settings = {"cwd": ROOT, "env": os.environ | environment}
    return subprocess.run(line, capture_output=True, text=True, **settings)


def test_a_package_that_is_missing_is_named(tmp_path):
    (tmp_path / "trackio.py").write_text("raise ImportError('No module named trackio')")
    run = write_run(tmp_path / "run")
    done = command(run, "trackio", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "pip install trackio" in done.stderr
    assert "Traceback" not in done.stderr
    done = command(tmp_path / "none", "trackio")
    assert done.returncode == 1 and "no such directory" in done.stderr


@pytest.mark.slow
@needs("tensorboard")
def test_tensorboard_reads_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = write_run(tmp_path / "run")
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for count in (30, 60):  # two sessions
        (run / "metrics.jsonl").write_text("".join(whole[:count]))
        assert command(run, "tensorboard").returncode == 0
    found = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "tensors": 0})
    found.Reload()
    curve = found.Scalars("reverse_kl")
    assert [event.step for event in curve] == list(range(1, 61))
    assert [event.value for event in curve] == pytest.approx([1 / i for i in range(1, 61)])
    assert [event.step for event in found.Scalars("eval_accuracy")] == [20, 40, 60]
    texts = found.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 20, 40, 60]
    assert NASTY in texts[0].tensor_proto.string_val[0].decode()


@pytest.mark.slow
@needs("trackio")
def test_trackio_keeps_what_was_logged(tmp_path):
    run = write_run(tmp_path / "run")
    done = command(run, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == list(range(61))
    values = [json.loads(text) for _, text in rows]
    assert values[4]["reverse_kl"] == 0.25


@pytest.mark.slow
@needs("wandb")
def test_wandb_keeps_what_was_logged_on_this_machine(tmp_path):
    run = write_run(tmp_path / "run")
    whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    ids = set()
    for count in (30, 60):
        write_lines(run / "metrics.jsonl", map(json.loads, whole[:count]))
        done = command(run, "wandb", WANDB_MODE="offline", HOME=str(tmp_path))
        assert done.returncode == 0 and "30 updates logged" in done.stdout, done.stderr
        ids.add(json.loads((run / "follow_wandb.json").read_text())["id"])
    (own,) = ids
    kept = sorted((run / "wandb").glob(f"offline-run-*-{own}/run-{own}.wandb"))
    assert len(kept) == 2 and all(path.stat().st_size > 2000 for path in kept)
