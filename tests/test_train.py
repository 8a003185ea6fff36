"""Claims about the whole run: real processes on tiny models."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from conftest import ROOT, SYNC
from kill import children, trial
from runs import (
    BASE,
    ENDLESS,
    PATIENCE,
    command,
    finish,
    forked,
    interrupt,
    learners,
    metrics,
    read_trace,
    read_until,
    start,
    still_alive,
    wait_until,
)

import train
from channel import Channel
from support.checkpoint import checkpoints, lock_output
from support.config import InputError, builtin, parse
from support.data import Prompt
from support.log import Log
from support.ranks import Interrupted, Ranks, RoleDied
from support.roles import INTERRUPTS, PRELOAD

__all__ = ["BASE", "command", "finish", "metrics", "start"]
slow = pytest.mark.slow


def lines_of(output, name):
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


def comparable(records):
    """Without times, and without counts of a process."""
    ends = ("seconds", "busy", "per_second", "cache_hit_rate", "cache_bytes", "cache_evictions")
    return [
        {k: v for k, v in record.items() if not k.partition("/")[0].endswith(ends)}
        for record in records
    ]


def assert_same_run(ours, one):
    """The same rollouts in the first update. Then the weights differ by rounding."""
    for name in ("loss", "reverse_kl", "grad_norm", "lag_mean"):
        assert ours[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-6), name
    assert ours[0]["tokens"] == one[0]["tokens"]
    for mine, theirs in zip(ours, one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.02)


# ---- what a run makes ---------------------------------------------------------------------------


def test_a_synchronous_run_has_no_lag_and_writes_everything(sync_run):
    output, text = sync_run
    records = metrics(output)
    assert [r["step"] for r in records] == list(range(1, 7))
    assert all(r["lag_max"] == 0 and r["lag_mean"] == 0 for r in records)
    evaluated = [r["step"] for r in records if "eval_accuracy" in r]
    assert evaluated == [3, 6] and "eval_accuracy_before" in records[0]
    wanted = """step loss reverse_kl tokens tokens_per_second lag_mean lag_max truncated_fraction
        support_mass_student support_mass_teacher grad_norm lr generator_busy teacher_busy
        learner_busy teacher_cache_hit_rate publish_seconds wall_seconds""".split()
    assert all(name in record for record in records for name in wanted)
    files = {path.name for path in output.iterdir()}
    written = {"metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "trace.json"}
    assert files == {".lock", "config.yaml", "step_3", "step_6"} | written
    events = read_trace(output)
    tracks = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert tracks == {"generator 0", "teacher 0", "learner"}
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0, 1, 2}
    assert "accuracy before training" in text and "first prompt:" in text
    assert text.rstrip().endswith(f"done after update 6: {output}/step_6")


def test_every_metric_is_defined_in_docs_metrics(sync_run):
    text = (ROOT / "docs" / "metrics.md").read_text()
    for name in ("metrics", "samples", "rollouts"):
        for record in lines_of(sync_run[0], f"{name}.jsonl"):
            assert all(f"`{name}`" in text for name in record)


def test_every_evaluation_leaves_the_same_prompts_and_the_worst_answers(sync_run):
    output, text = sync_run
    samples = lines_of(output, "samples.jsonl")
    assert sorted({line["step"] for line in samples}) == [0, 3, 6]
    for step in (0, 3, 6):
        lines = [line for line in samples if line["step"] == step]
        assert [line["prompt"] for line in lines[:4]] == [x["prompt"] for x in samples[:4]]
        assert not any(line["correct"] for line in lines[4:])
        assert len({line["prompt"] for line in lines}) == len(lines) <= 8
        if step:
            assert f"{lines[0]['prompt']!r} -> " in text
    records = metrics(output)
    first, last = records[0]["eval_accuracy_before"], records[-1]["eval_accuracy"]
    assert f"accuracy {first:.1%} -> {last:.1%}" in text
    assert "they take turns: --max-staleness 4 lets them overlap" in text


def test_the_rollouts_of_a_run_hold_all_that_the_loss_saw(sync_run):
    """Synchronous, so the student that trains is the sampler: its log-probabilities say so."""
    output, _ = sync_run
    rollouts = lines_of(output, "rollouts.jsonl")
    assert [line["step"] for line in rollouts] == [1] * 4 + [3] * 4 + [6] * 4
    for line in rollouts:
        count, stop = len(line["tokens"]), line["columns"]["tail"][1]
        assert set(line["weight_version"]) == {line["step"] - 1}
        assert "".join(line["tokens"]) == line["response"]
        names = ("candidate_ids", "student_logp", "teacher_logp", "behavior_logp")
        ids, s, t, b = (torch.tensor(line[name], dtype=torch.float64) for name in names)
        assert all(x.shape == (count, stop) for x in (ids, s, t, b))
        assert [line["texts"][str(int(i))] for i in ids[:, 0]] == line["tokens"]
        top = slice(*line["columns"]["top"])
        assert torch.allclose(s[:, top], b[:, top], atol=2e-4) and not torch.allclose(
            s, t, atol=0.1
        )
        assert (s[:, top].diff() <= 0).all() and (s[:, top].exp().sum(-1) < 1.001).all()


def test_the_progress_is_one_line_for_each_update(sync_run):
    output, text = sync_run
    assert "\r" not in text
    lines = [line for line in text.splitlines() if line.startswith("update ")]
    for line, record in zip(lines, metrics(output), strict=True):
        assert line.startswith(f"update {record['step']:4d}/6  ")
        assert f"reverse KL {record['reverse_kl']:.4f}" in line
        assert ("accuracy" in line) == ("eval_accuracy" in record)


@slow
def test_generators_share_the_evaluation_and_find_the_accuracy_of_one(tmp_path):
    """Of the built-in student: some prompts are answered, some are not."""
    found = {}
    for count in (1, 3):
        flags = ["--max-staleness=0", "--steps=1", "--eval-every=1", f"--generators={count}"]
        finish(start(tmp_path / str(count), *flags))
        found[count] = metrics(tmp_path / str(count))[0]["eval_accuracy_before"]
    assert 0.2 < found[1] < 0.6 and found[3] == found[1]
    evaluations = [e["tid"] for e in read_trace(tmp_path / "3") if e["name"] == "evaluate"]
    assert sorted(evaluations) == [0, 0, 1, 1, 2, 2]


@slow
def test_a_run_killed_after_update_3_and_resumed_ends_like_one_that_never_stopped(
    sync_run, pair, tmp_path
):
    """Every loss is the same number: two runs with one seed are equal, too."""
    output = tmp_path / "run"
    process = start(output, *pair, *SYNC, "--save-every=3")
    read_until(process, r"update +1/6")
    family = children(process.pid)
    read_until(process, r"update +4/6")  # so step_3 is complete
    for pid in [process.pid, *family]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    text = finish(start(output, *pair, *SYNC, "--save-every=3", "--resume"))
    assert "update    4/6" in text and "update    3/6" not in text, text
    assert comparable(metrics(output)) == comparable(metrics(sync_run[0]))


FULL_DISK = """
import support.log

before = support.log.append

def append(path, lines):
    if path.name == "rollouts.jsonl":
        raise OSError("no space left for rollouts")
    before(path, lines)

support.log.append = append
"""


@slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_rollouts_that_cannot_be_written_end_the_run_and_lose_no_update(ranks, pair, tmp_path):
    (tmp_path / "full.py").write_text(FULL_DISK)
    flags = [*pair, *SYNC, f"--plugin={tmp_path}/full.py"]
    out = finish(start(tmp_path / "run", *flags, ranks=ranks), expect=1)
    assert "train.py: error: no space left for rollouts" in out, out
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "step_1" / "training_state.pt").exists()


@slow
def test_a_hybrid_trains_is_reproducible_and_resumes(model_dir, tmp_path):
    """Qwen3.5: recurrent states in the slots, also with weights picked up in flight."""
    models = [f"--student={model_dir('qwen3_5')}", f"--teacher={model_dir('qwen3_5', seed=1)}"]
    flags = [f"--config={ROOT / 'assets' / 'builtin.yaml'}", *models, "--eval-every=0", "--lr=3e-3"]
    for name in ("one", "two"):
        finish(start(tmp_path / name, *flags, "--max-staleness=0", "--steps=6", "--save-every=3"))
    shutil.rmtree(tmp_path / "two" / "step_6")
    finish(start(tmp_path / "two", *flags, "--max-staleness=0", "--steps=6", "--resume"))
    one, two = (comparable(metrics(tmp_path / name)) for name in ("one", "two"))
    assert one == two and len(one) == 6
    finish(start(tmp_path / "async", *flags, "--max-staleness=1", "--steps=40"))
    found = metrics(tmp_path / "async")
    first, last = (sum(r["reverse_kl"] for r in part) / 5 for part in (found[:5], found[-5:]))
    assert last < 0.9 * first and max(r["lag_max"] for r in found) == 1


RAISES = """
import os
import losses
class Raises(losses.SampledReverseKL):
    calls = 0
    def value(self, s, t, b):
        Raises.calls += 1
        if Raises.calls > 9 and os.environ.get("RANK") == "0":
            raise ValueError("what the plug-in says")
        return super().value(s, t, b)
losses.LOSSES["raises"] = Raises
"""


@slow
def test_an_error_amid_an_update_of_several_ranks_is_shown_and_ends_the_run(pair, tmp_path):
    """The ranks are out of step, so they must not try to save together: that would hang."""
    (tmp_path / "raises.py").write_text(RAISES)
    flags = [*pair, *ENDLESS, f"--plugin={tmp_path}/raises.py", "--loss=raises"]
    process = start(tmp_path / "run", *flags, ranks=2)
    out = finish(process, expect=1, within=100.0)
    assert "ValueError: what the plug-in says" in out and "update    1/" in out, out
    assert not checkpoints(tmp_path / "run")


@slow
def test_a_student_whose_generation_config_cannot_be_saved_is_refused_at_the_start(
    model_dir, tmp_path
):
    """transformers loads it with a warning, and would refuse to save it at the end."""
    student = shutil.copytree(model_dir(), tmp_path / "student")
    (student / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": 1}')
    flags = [f"--config={ROOT / 'assets' / 'builtin.yaml'}", f"--student={student}"]
    out = finish(start(tmp_path / "run", *flags, f"--teacher={model_dir()}"), expect=1)
    assert "its generation_config.json cannot be saved again: " in out and "temperature" in out, out


@slow
def test_the_cache_serves_recurring_sequences_and_changes_no_loss(pair, tmp_path):
    """Two prompts, nearly greedy: sequences recur. A hit was computed in another batch shape."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "47+58="}\n')
    flags = [
        f"--prompts={tmp_path}/p.jsonl",
        "--max-staleness=0",
        "--steps=6",
        "--loss=forward_kl",
        "--temperature=0.05",
        "--lr=1e-5",
    ]
    for name, size in (("with", 64), ("without", 0)):
        finish(start(tmp_path / name, *pair, *flags, f"--teacher-cache-mb={size}"))
    cached, plain = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    assert cached[-1]["teacher_cache_hit_rate"] > 0.3 and plain[-1]["teacher_cache_hit_rate"] == 0
    assert [r["loss"] for r in cached] == pytest.approx([r["loss"] for r in plain], rel=1e-5)


@slow
def test_two_generators_in_arrival_order_train_to_the_end_with_lag(pair, tmp_path):
    flags = ["--max-staleness=2", "--steps=12", "--generators=2", "--window=100"]
    finish(start(tmp_path / "run", *pair, *flags, "--eval-every=0", "--loss=forward_kl"))
    records = metrics(tmp_path / "run")
    assert len(records) == 12 and max(r["lag_max"] for r in records) > 0
    assert not any("eval_accuracy" in r for r in records)


@slow
def test_batch_order_never_exceeds_max_staleness_also_when_refreshed_at_batch_boundaries(
    pair, tmp_path
):
    flags = ["--max-staleness=2", "--steps=10", "--refresh=batch", "--eval-every=5", "--slots=4"]
    finish(start(tmp_path / "run", *pair, *flags))
    lags = [r["lag_max"] for r in metrics(tmp_path / "run")]
    assert 0 < max(lags) <= 2


@slow
def test_two_teachers_score_like_one(sync_run, pair, tmp_path):
    finish(start(tmp_path / "run", *pair, *SYNC, "--teachers=2"))
    for ours, one in zip(metrics(tmp_path / "run"), metrics(sync_run[0]), strict=True):
        for name in ("loss", "reverse_kl", "grad_norm", "teacher_cache_hit_rate"):
            assert ours[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    events = read_trace(tmp_path / "run")
    names = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
    assert names == {"generator 0": 0, "teacher 0": 1, "teacher 1": 2, "learner": 3}
    for name, span in (("teacher 0", "score"), ("teacher 1", "score"), ("learner", "update")):
        assert any(e["name"] == span and e["tid"] == names[name] for e in events if e["ph"] == "X")


# ---- who dies is named, and nothing is left -----------------------------------------------------


def kill_and_collect(process, victim):
    """SIGKILL one process. Returns the output of the run, of which nothing may be left."""
    family = {process.pid: "torchrun", **children(process.pid)}
    os.kill(victim, signal.SIGKILL)
    out = finish(process, expect=1)
    assert not still_alive(family)
    return out


@slow
def test_two_learner_ranks_train_like_one_until_one_dies(sync_run, pair, tmp_path):
    before = set(os.listdir("/dev/shm"))
    process = start(tmp_path / "run", *pair, *SYNC, *ENDLESS, ranks=2)
    read_until(process, r"update +6/")
    out = kill_and_collect(process, learners(process)[1])
    assert out.count("train.py: error: a rank or a node died: torchrun says how") == 1, out
    assert 'train.py", line' not in out, out  # no traceback but torchrun's
    assert_same_run(metrics(tmp_path / "run")[:6], metrics(sync_run[0]))
    assert not checkpoints(tmp_path / "run")  # a part of the masters is gone
    assert set(os.listdir("/dev/shm")) <= before


@slow
@pytest.mark.parametrize("victim, message", [
    ("generator", "error: generator 0 died: .*SIGKILL"),
    ("teacher", "error: teacher 0 died: .*SIGKILL"),
    ("server", "error: generator 0 died: .* exit code 255"),  # its parent, who could say more
    ("learner", r"exitcode *: -9 .*"),  # torchrun names it
])  # fmt: skip
def test_a_killed_process_ends_the_run_and_is_named(victim, message, pair, tmp_path):
    ranks = int(victim == "learner")
    process = start(tmp_path / "run", *pair, *ENDLESS, ranks=ranks)
    read_until(process, r"update +2/")
    server, generator, teacher = forked(process)
    victims = {"server": server, "generator": generator, "teacher": teacher}
    out = kill_and_collect(process, victims.get(victim) or learners(process)[0])
    assert re.search(message, out), out
    assert len(checkpoints(tmp_path / "run")) == (ranks == 0)


@slow
def test_a_fork_server_that_dies_while_it_imports_ends_the_run_and_is_named(pair, tmp_path):
    process = start(tmp_path / "run", *pair, *ENDLESS)
    (server,) = wait_until(lambda: forked(process))
    out = kill_and_collect(process, server)
    assert "error: the fork server died while it started the roles" in out, out


@slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_torchrun_that_dies_during_the_imports_or_later_ends_the_run_saved(ranks, pair, tmp_path):
    process = start(tmp_path / "run", *pair, *ENDLESS, ranks=ranks)
    wait_until(lambda: len(learners(process)) == ranks)
    kill_and_collect(process, process.pid)
    process = start(tmp_path / "other", *pair, *ENDLESS, ranks=ranks)
    read_until(process, r"update +2/")
    out = kill_and_collect(process, process.pid)
    (saved,) = checkpoints(tmp_path / "other")
    assert f"interrupted after update {saved.name[5:]}: {saved}" in out, out


@slow
def test_a_rank_that_dies_while_the_leader_waits_for_rows_ends_the_run(pair, tmp_path):
    process = start(tmp_path / "run", *pair, *ENDLESS, ranks=2)
    read_until(process, r"update +2/")
    generator = forked(process)[1]
    os.kill(generator, signal.SIGSTOP)
    path = tmp_path / "run" / "metrics.jsonl"
    sizes = [path.stat().st_size]

    def is_quiet():  # half a second without an update: nothing is left to train on
        time.sleep(0.5)
        sizes.append(path.stat().st_size)
        return sizes[-1] == sizes[-2]

    wait_until(is_quiet)
    out = kill_and_collect(process, learners(process)[1])
    assert "train.py: error: a rank or a node died: torchrun says how" in out, out


@slow
# Of tests/kill.py; most hit rank 0, torchrun or the fork server while they start.
@pytest.mark.parametrize("seed", [3, 7])
def test_a_process_killed_at_a_random_moment_ends_the_run(seed):
    assert trial(seed) == ""


@slow
def test_a_hundred_kills_at_random_moments():
    assert [failure for seed in range(100) if (failure := trial(seed))] == []


@slow
def test_what_a_role_refuses_is_one_sentence(pair, tmp_path):
    """The teacher's config asks for more layers than its weights have. Only loading finds out."""
    broken = shutil.copytree(pair[1].split("=", 1)[1], tmp_path / "broken")
    settings = json.loads((broken / "config.json").read_text())
    layers = settings["num_hidden_layers"] + 1
    settings |= {"num_hidden_layers": layers, "layer_types": settings["layer_types"][:1] * layers}
    (broken / "config.json").write_text(json.dumps(settings))
    flags = [pair[0], f"--teacher={broken}", "--steps=3"]
    out = finish(start(tmp_path / "run", *flags, ranks=2), expect=1)
    message = r"error: teacher 0 died: .*broken: \d+ tensors are not in its files, model.layers.2"
    assert re.search(message, out), out
    # No traceback, nor one of the other rank, which was told.
    assert "in load_model" not in out and "in follow" not in out


OUT_OF_MEMORY = """
import torch
import {module}
def fail(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
{module}.{function} = fail
"""


@slow
@pytest.mark.parametrize("module, function, ranks, name", [
    ("generate", "Generator.step", 0, "generator 0 died"),
    ("teacher", "Teacher.score", 0, "teacher 0 died"),
    ("learner", "Learner.step", 0, "learner rank 0"),
    ("learner", "Learner.step", 2, "learner rank [01]"),
])  # fmt: skip
def test_too_little_gpu_memory_is_one_sentence_that_names_the_role(
    module, function, ranks, name, pair, tmp_path
):
    (tmp_path / "full.py").write_text(OUT_OF_MEMORY.format(module=module, function=function))
    flags = [*pair, *ENDLESS, f"--plugin={tmp_path}/full.py"]
    process = start(tmp_path / "run", *flags, ranks=ranks)
    out = finish(process, expect=1)
    assert re.search(f"train.py: error: {name}: its GPU has too little memory. Generator: ", out)
    assert ranks or "Traceback" not in out, out  # torchrun has one of its own
    assert "in fail" not in out, out


# ---- waiting -------------------------------------------------------------------------------------


class StubContext:
    """What torch's process context shows of a generator and the teacher."""

    def __init__(self, exits=()):
        self.living = [True, True]
        self.exits = exits  # what `join` raises
        self.processes = [SimpleNamespace(is_alive=lambda i=i: self.living[i]) for i in range(2)]

    def join(self, timeout, grace_period):
        if self.exits:
            raise self.exits


@pytest.fixture
def new_leader(monkeypatch, tmp_path):
    """new_leader(exits) -> train.Leader with its real handlers, of processes that do not exist."""
    # A shell's background job ignores some.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in INTERRUPTS}
    monkeypatch.setattr("support.roles.start_fork_server", lambda: None)
    monkeypatch.setattr("train.show_sample", lambda *arguments: None)  # no generator writes one

    def make(exits=(), held_out=(Prompt("y", [2]),), **settings):
        monkeypatch.setattr(mp, "start_processes", lambda *args, **kwargs: StubContext(exits))
        config = builtin(output_dir=str(tmp_path), batch_size=4, **settings)
        channel = Channel.create(config, 1, torch.float32)
        learner = SimpleNamespace(version=0, ranks=Ranks(), publish=lambda channel: 0.0)
        inputs = SimpleNamespace(
            config=config,
            checkpoint=None,
            prompts=[Prompt("x", [1])],
            held_out=[*held_out],
            progress={"prompts": "their fingerprint", "trained_ahead": []},
            tokenizer=None,
        )
        return train.Leader(inputs, learner, channel, [])

    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_accuracy_of_each_teacher_is_that_of_its_own_prompts(new_leader):
    held_out = [Prompt("y", [2], teacher=name) for name in ("b", "a", "b", "b", "a")]
    leader = new_leader(held_out=held_out, teacher=("a=x", "b=y", "c=z"))
    leader.channel.eval_correct[:5] = torch.tensor([1, 0, 1, 0, 0])
    leader.channel.eval_done += 1  # it was made as soon as it was asked for
    assert leader.evaluate("eval_accuracy") == {
        "eval_accuracy": 2 / 5, "eval_accuracy/a": 0.0, "eval_accuracy/b": 2 / 3
    }  # fmt: skip
    leader.channel.eval_correct[:5] = torch.tensor([1, -1, -1, 0, -1])  # without an answer
    leader.channel.eval_done += 1
    assert leader.evaluate("x") == {"x": 1 / 2, "x/b": 1 / 2}
    leader.channel.eval_correct[:5] = -1
    leader.channel.eval_done += 1
    assert leader.evaluate("x") == {}
    leader = new_leader(held_out=held_out, teacher="x")
    leader.channel.eval_done += 1
    assert list(leader.evaluate("eval_accuracy")) == ["eval_accuracy"]


def waits(leader):
    """Where it waits: for rows that never come, for an evaluation that is never made."""
    empty = iter([[]] * 50)  # StopIteration where waiting would never end
    leader.channel.to_learner = SimpleNamespace(get_all=lambda timeout: next(empty))
    return leader.check, leader.wait_for_rows, lambda: leader.evaluate("eval_accuracy")


def test_waiting_ends_with_the_name_and_the_reason_when_a_role_is_gone(new_leader):
    killed = mp.ProcessExitedException("terminated with signal SIGKILL", 1, 77, -9, "SIGKILL")
    raised = mp.ProcessRaisedException("its own traceback", 0, 77)
    refused = mp.ProcessRaisedException("Traceback\nsupport.config.InputError: no such", 1, 77)
    for index, exits, message in (
        (0, raised, "^generator 0 died: .*its own traceback"),
        (1, refused, "^teacher 0 died: no such$"),
        (1, killed, "^teacher 0 died: .*SIGKILL"),
        (0, (), "left before the end"),
    ):
        leader = new_leader(exits)
        leader.check()  # as long as all live, nothing is raised
        leader.roles.context.living[index] = False
        for wait in waits(leader):
            leader.channel.stop.fill_(0)
            with pytest.raises(RoleDied, match=message):
                wait()
            assert leader.channel.stop.item()  # the others are told to leave


@pytest.mark.parametrize("number", INTERRUPTS)
def test_waiting_ends_after_a_signal_even_if_a_role_is_gone_too(number, new_leader):
    leader = new_leader()
    leader.check()
    signal.raise_signal(number)  # raises nothing by itself: the update in hand is finished
    signal.raise_signal(number)
    for living in (True, False):
        leader.roles.context.living[0] = living
        for wait in waits(leader):
            with pytest.raises(Interrupted):
                wait()


def test_a_terminal_that_is_closed_does_not_end_a_run_under_nohup(new_leader):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    leader = new_leader()
    signal.raise_signal(signal.SIGHUP)
    leader.check()


def test_waiting_ends_when_torchrun_is_gone_and_a_run_without_it_outlives_its_shell(
    new_leader, monkeypatch
):
    leader = new_leader()
    leader.ranks.parent = 1  # once it was another process
    leader.check()
    monkeypatch.setenv("RANK", "0")  # as torchrun sets it
    for wait in waits(leader):
        with pytest.raises(Interrupted):
            wait()
    leader.ranks.parent = os.getppid()
    leader.check()


# ---- interrupts ----------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("ranks", [0, 1, 2])
@pytest.mark.parametrize("number", INTERRUPTS)
def test_a_signal_saves_and_leaves(number, ranks, pair, tmp_path):
    """To every process at once: as a terminal does, also when it is closed, and a scheduler."""
    output = tmp_path / "run"
    process = start(output, *pair, *ENDLESS, ranks=ranks)
    read_until(process, r"update +2/")
    family = children(process.pid)
    interrupt(process, number)
    interrupt(process, number)  # the second changes nothing
    out, _ = process.communicate(timeout=PATIENCE)
    done = int(re.search(r"interrupted after update (\d+)", out).group(1))
    assert checkpoints(output) == [output / f"step_{done}"] and len(metrics(output)) == done
    assert not still_alive(family)
    assert ranks or (process.returncode == 0 and "error" not in out)
    read_trace(output)


@slow
def test_nohup_lets_a_run_without_torchrun_go_on(pair, tmp_path):
    flags = [*pair, "--steps=20", "--eval-every=0"]
    process = start(tmp_path / "run", *flags, wrapper=["nohup"])
    read_until(process, r"update +2/")
    interrupt(process, signal.SIGHUP)
    finish(process)
    assert len(metrics(tmp_path / "run")) == 20


# ---- input ---------------------------------------------------------------------------------------


def test_bad_input_is_one_line_not_a_traceback(tmp_path):
    flags = [f"--output-dir={tmp_path}/x", "--teacher=/nowhere"]
    run = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags], capture_output=True, text=True
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.strip().startswith("train.py: error: --teacher /nowhere: no model there")


@slow
def test_bad_input_gives_one_line_also_with_two_ranks(tmp_path):
    line = command(tmp_path / "run", "--teacher=/nowhere", ranks=2)
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode
    assert run.stderr.count("train.py: error: --teacher /nowhere: no model there") == 1
    assert run.stderr.count("train.py: error") == 1  # the other rank has nothing to add
    assert "run_rank" not in run.stderr  # it waited in there


@slow
def test_a_second_run_in_one_directory_is_refused(pair, tmp_path):
    first = start(tmp_path / "run", *pair, *ENDLESS)
    read_until(first, "first prompt")
    family = children(first.pid)
    out = finish(start(tmp_path / "run", *pair, "--resume"), expect=1)
    message = "another run uses it, choose another"
    assert out.splitlines() == [f"train.py: error: --output-dir {tmp_path}/run: {message}"]
    first.kill()
    first.communicate()
    assert not still_alive(family)
    os.close(lock_output(tmp_path / "run"))  # the kernel has freed it


def test_a_run_whose_prompts_have_changed_is_not_resumed(pair, tmp_path, monkeypatch, capsys):
    """As rank 0 reads its input, before any model is loaded."""
    monkeypatch.setattr("support.checkpoint.lock_output", lambda output: None)  # three runs in one
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(5)))
    output = f"--output-dir={tmp_path}/run"
    config = parse([*pair, f"--prompts={prompts}", output, "--eval-every=0"])
    first = train.read_inputs(config)
    checkpoint = tmp_path / "run" / "step_3"
    checkpoint.mkdir(parents=True)
    torch.save({}, checkpoint / "training_state.pt")
    (checkpoint / "progress.yaml").write_text(yaml.safe_dump(first.progress))
    again = train.read_inputs(replace(config, resume=True, eval_every=5))
    few = "note: 0 prompts to evaluate on: --eval-prompts FILE gives more"
    assert capsys.readouterr().out.count(few) == 1  # not where nothing is to be evaluated
    assert first.checkpoint is None and again.checkpoint == checkpoint
    prompts.write_text(prompts.read_text() + '{"prompt": "7+8="}\n')
    with pytest.raises(InputError, match="--resume: the prompts are not what they were"):
        train.read_inputs(replace(config, resume=True))


def test_a_damaged_checkpoint_is_named_on_resume(sync_run, pair, tmp_path, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(sync_run[0], output)
    weights = output / "step_6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    monkeypatch.setattr("sys.argv", command(output, *pair, *SYNC, "--steps=8", "--resume")[1:])
    message = re.escape(f"train.py: error: {output}/step_6 cannot be loaded: ")
    with pytest.raises(SystemExit, match=message):
        train.main()


# ---- saving --------------------------------------------------------------------------------------


@slow
def test_weights_that_diverged_are_named_and_good_ones_are_left(sync_run, pair, tmp_path):
    output = shutil.copytree(sync_run[0], tmp_path / "run")
    flags = [*SYNC, "--steps=9", "--eval-every=0", "--save-every=1", "--keep-checkpoints=2"]
    diverging = ["--warmup-steps=0", "--lr=1e30", "--resume"]
    out = finish(start(output, *pair, *flags, *diverging), expect=1)
    assert f"resuming from {output}/step_6" in out
    message = (
        "update 8: gradient norm is nan: lower --lr; if --resume fails in the same way, remove"
    )
    assert f"train.py: error: {message} the newest step_N" in out, out
    assert checkpoints(output) == [output / "step_6", output / "step_7"]


def test_what_diverged_is_not_saved_at_the_end(new_leader, monkeypatch):
    def diverge():
        leader.learner.version = 3  # without `save`
        leader.amid_update = True
        raise FloatingPointError("update 4: gradient norm is nan")

    leader = new_leader()
    monkeypatch.setattr(leader, "main_loop", diverge)
    with pytest.raises(FloatingPointError, match="update 4"):
        leader.lead()


def test_a_save_that_failed_is_made_again_at_the_end(new_leader):
    """A disk that was full for a moment must not lose what was learned."""
    saved = []

    def save(*args):
        saved.append(args)
        if len(saved) == 1:
            raise OSError("No space left on device")

    leader = new_leader()
    leader.learner = SimpleNamespace(version=2, save=save)
    leader.tickets.trained_ahead = {5, 3}
    with pytest.raises(OSError):
        leader.save()
    leader.save()
    leader.save()
    assert len(saved) == 2
    assert saved[1][2] == {"prompts": "their fingerprint", "trained_ahead": [3, 5]}


def test_only_node_0_saves(new_leader):
    leader = new_leader()
    leader.ranks = SimpleNamespace(node=1)
    leader.learner = SimpleNamespace(version=2)  # without `save`
    leader.save()


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_the_newest_checkpoints_are_kept(keep, left, new_leader, tmp_path):
    def save(output, tokenizer, progress):
        (output / f"step_{leader.learner.version}").mkdir()
        torch.save(progress, output / f"step_{leader.learner.version}" / "training_state.pt")

    leader = new_leader(keep_checkpoints=keep)
    for version in (1, 2, 3, 4):
        leader.learner = SimpleNamespace(version=version, save=save)
        leader.save()
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_{version}" for version in left]


# ---- processes -----------------------------------------------------------------------------------


def test_what_the_roles_are_forked_from_has_asked_for_no_gpu():
    """CUDA refuses to work in a process forked after the first question about devices."""
    code = f"""
import importlib, torch
def refuse(*args, **kwargs):
    raise RuntimeError("a device was asked for")
for name in ("is_available", "device_count", "_lazy_init", "current_device",
             "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
for name in {PRELOAD}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_roles_process_does_not_use_cudnns_attention():
    state = "print(torch.backends.cuda.cudnn_sdp_enabled())"
    code = f"""
import torch
from support.config import builtin
from support.roles import set_up_process
{state}
set_up_process(builtin(), torch.device("cpu"), 1)
{state}
"""
    line = [sys.executable, "-c", code]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "True\nFalse\n"


def test_the_log_adds_up_the_caches_of_all_teachers_and_averages_what_is_busy(
    tmp_path, monkeypatch
):
    (tmp_path / "metrics.jsonl").touch()
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("support.log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    stats = torch.tensor([[1, 3, 100, 5], [2, 2, 50, 0]])
    channel = SimpleNamespace(busy=torch.zeros(4), cache_stats=stats)
    log = Log(builtin(output_dir=str(tmp_path), teachers="2"), channel)
    channel.busy += torch.tensor([1.0, 0.5, 1.5, 2.0])
    log.write(1, {"tokens": 10, "reverse_kl": 0.5, "lag_mean": 0.0})
    (record,) = metrics(tmp_path)
    expected = {
        "teacher_cache_hit_rate": 3 / 8,
        "teacher_cache_bytes": 150,
        "teacher_cache_evictions": 5,
        "tokens_per_second": 5.0,
        "generator_busy": 0.5,
        "teacher_busy": 0.5,
        "learner_busy": 1.0,
    }
    assert record | expected == record
