"""Claims about the whole run: real processes on tiny models."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from conftest import ROOT

import fork_server
import launch
import nodes
import train
from config import Config, InputError, parse
from kill import alive, children, trial
from log import Log, checkpoints, lock_output

BASE = [
    "--batch-size=8",
    "--slots=8",
    "--eval-size=8",
    "--max-prompt-tokens=32",
    "--max-new-tokens=12",
    "--cpu-threads=1",
]


def command(output, *flags, ranks=0):
    """`ranks` 0: without torchrun, which starts two seconds sooner."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [
        sys.executable,
        *(torchrun if ranks else []),
        str(ROOT / "train.py"),
        *BASE,
        f"--output-dir={output}",
        *flags,
    ]


def start(output, *flags, ranks=0):
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = dict(
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    return subprocess.Popen(command(output, *flags, ranks=ranks), env=environment, **pipes)


def finish(process, expect=0):
    out, _ = process.communicate(timeout=240)
    assert (process.returncode == 0) == (expect == 0), out
    return out


def metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def still_alive(family, within=20.0):
    """Command lines of those that outlive the deadline:
    the fork server and orphans notice by themselves."""
    deadline = time.monotonic() + within
    while any(alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [line for pid, line in family.items() if alive(pid)]


def read_until(process, pattern, within=120.0):
    """What is printed up to the pattern.
    A process that does not come to it is killed, with its session."""
    lines = []
    alarm = threading.Timer(within, os.killpg, (process.pid, signal.SIGKILL))
    alarm.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if re.search(pattern, line):
                return "".join(lines)
    finally:
        alarm.cancel()
    raise AssertionError(f"{pattern!r} never appeared:\n{''.join(lines)}")


SYNC = ["--max-staleness=0", "--steps=6", "--eval-every=3"]


@pytest.fixture(scope="module")
def sync_run(pair, tmp_path_factory):
    output = tmp_path_factory.mktemp("sync") / "run"
    return output, finish(start(output, *pair, *SYNC, "--save-every=3", ranks=1))


def comparable(records):
    timing = ("seconds", "busy", "per_second")
    return [{k: v for k, v in record.items() if not k.endswith(timing)} for record in records]


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
    assert {".lock", "config.yaml", "metrics.jsonl", "trace.json", "step_3", "step_6"} == {
        path.name for path in output.iterdir()
    }
    events = json.loads((output / "trace.json").read_text())
    tracks = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert tracks == {"generator 0", "teacher 0", "learner"} and {
        e["tid"] for e in events if e["ph"] == "X"
    } == {0, 1, 2}
    assert "accuracy before training" in text and "first prompt:" in text


def test_every_metric_is_defined_in_docs_metrics(sync_run):
    text = (ROOT / "docs" / "metrics.md").read_text()
    for record in metrics(sync_run[0]):
        assert all(f"`{name}`" in text for name in record)


def test_two_synchronous_runs_with_one_seed_write_identical_losses(sync_run, pair, tmp_path):
    finish(start(tmp_path / "run", *pair, *SYNC))
    assert [r["loss"] for r in metrics(tmp_path / "run")] == [
        r["loss"] for r in metrics(sync_run[0])
    ]


@pytest.mark.slow
def test_the_cache_serves_recurring_sequences_and_changes_no_loss(pair, tmp_path):
    """Two prompts, nearly greedy: sequences recur.
    A hit was computed in another batch shape, hence float rounding."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "47+58="}\n')
    flags = [
        f"--prompts={tmp_path}/p.jsonl",
        "--max-staleness=0",
        "--steps=6",
        "--loss=forward_kl",
        "--temperature=0.05",
        "--lr=1e-5",
    ]
    for process in [
        start(tmp_path / name, *pair, *flags, f"--teacher-cache-mb={size}")
        for name, size in (("with", 64), ("without", 0))
    ]:
        finish(process)
    cached, plain = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    assert cached[-1]["teacher_cache_hit_rate"] > 0.3 and plain[-1]["teacher_cache_hit_rate"] == 0
    assert [r["loss"] for r in cached] == pytest.approx([r["loss"] for r in plain], rel=1e-5)


def test_a_run_killed_after_update_3_and_resumed_ends_like_one_that_never_stopped(
    sync_run, pair, tmp_path
):
    output = tmp_path / "run"
    process = start(output, *pair, *SYNC, "--save-every=3")
    read_until(process, r"update +1/6")
    family = children(process.pid)
    read_until(process, r"update +4/6")  # so step_3 is complete
    for pid in [process.pid, *family]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    text = finish(start(output, *pair, *SYNC, "--save-every=3", "--resume"))
    assert "update    4/6" in text and "update    3/6" not in text, text
    straight, resumed = comparable(metrics(sync_run[0])), comparable(metrics(output))
    for record in straight + resumed:  # counts of this process, not of the run
        for name in ("teacher_cache_hit_rate", "teacher_cache_bytes", "teacher_cache_evictions"):
            del record[name]
    assert resumed == straight


def test_two_generators_in_arrival_order_train_to_the_end_with_lag(pair, tmp_path):
    flags = [
        "--max-staleness=2",
        "--steps=12",
        "--generators=2",
        "--order=arrival",
        "--eval-every=0",
        "--loss=forward_kl",
    ]
    finish(start(tmp_path / "run", *pair, *flags))
    records = metrics(tmp_path / "run")
    assert len(records) == 12 and max(r["lag_max"] for r in records) > 0
    assert not any("eval_accuracy" in r for r in records)


@pytest.mark.slow
def test_two_teachers_score_like_one(sync_run, pair, tmp_path):
    finish(start(tmp_path / "run", *pair, *SYNC, "--teachers=2"))
    for ours, one in zip(metrics(tmp_path / "run"), metrics(sync_run[0]), strict=True):
        for name in ("loss", "reverse_kl", "grad_norm", "teacher_cache_hit_rate"):
            assert ours[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    events = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
    assert names == {"generator 0": 0, "teacher 0": 1, "teacher 1": 2, "learner": 3}
    for name, span in (("teacher 0", "score"), ("teacher 1", "score"), ("learner", "update")):
        assert any(e["name"] == span and e["tid"] == names[name] for e in events if e["ph"] == "X")


def test_batch_order_never_exceeds_max_staleness_also_when_refreshed_at_batch_boundaries(
    pair, tmp_path
):
    finish(
        start(
            tmp_path / "run",
            *pair,
            "--max-staleness=2",
            "--steps=10",
            "--refresh=batch",
            "--eval-every=5",
            "--slots=4",
        )
    )
    lags = [r["lag_max"] for r in metrics(tmp_path / "run")]
    assert 0 < max(lags) <= 2


def test_two_learner_ranks_train_like_one(sync_run, pair, tmp_path):
    finish(start(tmp_path / "run", *pair, *SYNC, ranks=2))
    one, two = metrics(sync_run[0]), metrics(tmp_path / "run")
    # Same rollouts: the weights are still the same.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)
    # Weights differ by rounding since.
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=0.02)
    assert [r["tokens"] for r in two] == pytest.approx([r["tokens"] for r in one], rel=0.1)


def die_and_collect(process, victim, within=20.0):
    """SIGKILL the descendant whose command line and order match; returns output;
    nothing may survive."""
    read_until(process, r"update +2/")
    family = children(process.pid)
    # In order of birth: the server, generator, teacher.
    roles = sorted(pid for pid, line in family.items() if "forkserver" in line)[1:]
    ranks = sorted(pid for pid, line in family.items() if "train.py" in line)
    of = {"generator": roles[:1], "teacher": roles[1:2], "learner": ranks, "rank 1": ranks[1:]}
    os.kill(of[victim][0], signal.SIGKILL)
    started = time.monotonic()
    out = finish(process, expect=1)
    assert time.monotonic() - started < within
    assert not still_alive(family, within)
    return out


@pytest.mark.parametrize("victim, message", [
    pytest.param("generator", "generator 0 died: .*SIGKILL", marks=pytest.mark.slow),
    pytest.param("teacher", "teacher 0 died: .*SIGKILL", marks=pytest.mark.slow),
    ("learner", r"exitcode *: -9 .*"),
    ("rank 1", "a rank or a node died"),
])  # fmt: skip
def test_a_killed_role_ends_the_run_and_is_named(victim, message, pair, tmp_path):
    before = set(os.listdir("/dev/shm"))
    ranks = {"learner": 1, "rank 1": 2}.get(victim, 0)  # torchrun is who names rank 0
    out = die_and_collect(
        start(tmp_path / "run", *pair, "--steps=100000", "--eval-every=0", ranks=ranks), victim
    )
    assert re.search(message, out), out
    if ranks == 0:  # else a part of the masters is gone
        assert list((tmp_path / "run").glob("step_*/training_state.pt"))
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.slow
# Of tests/kill.py; most hit rank 0, torchrun or the fork server while they start.
@pytest.mark.parametrize("seed", [3, 7])
def test_a_process_killed_at_a_random_moment_ends_the_run(seed):
    assert trial(seed) == ""


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments():
    assert [failure for seed in range(100) if (failure := trial(seed))] == []


def test_what_a_role_refuses_is_one_sentence(pair, tmp_path):
    """The teacher's config asks for more layers than its weight file has,
    which only loading finds out."""
    broken = shutil.copytree(pair[1].split("=", 1)[1], tmp_path / "broken")
    settings = json.loads((broken / "config.json").read_text())
    layers = settings["num_hidden_layers"] + 1
    settings |= {"num_hidden_layers": layers, "layer_types": settings["layer_types"][:1] * layers}
    (broken / "config.json").write_text(json.dumps(settings))
    out = finish(
        start(tmp_path / "run", pair[0], f"--teacher={broken}", "--steps=3", ranks=2), expect=1
    )
    assert re.search(
        r"train.py: error: teacher 0 died: .*broken: "
        r"\d+ tensors are not in its files, model.layers.2.\S+ for one\n",
        out,
    ), out
    # No traceback, nor one of the other rank, which was told.
    assert "in load_model" not in out and "in follow" not in out


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
def stub_roles(monkeypatch):
    """roles(exits) -> launch.Roles with its real signal handlers over processes that do not
    exist."""
    # A shell's background job ignores some.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in fork_server.INTERRUPTS}

    def make(exits=()):
        monkeypatch.setattr(
            launch.mp, "start_processes", lambda *args, **kwargs: StubContext(exits)
        )
        channel = SimpleNamespace(stop=torch.zeros(1), running=lambda: not channel.stop.item())
        return launch.Roles(Config(), channel, [], [], 0)

    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


def waits(roles):
    """The two places where rank 0 waits, as functions:
    for rows that never come, for an evaluation that is never done."""
    empty = iter([[]] * 50)  # StopIteration where waiting would never end
    to_learner = SimpleNamespace(get_all=lambda timeout: next(empty))
    channel = SimpleNamespace(
        to_learner=to_learner,
        eval_due=torch.zeros(1),
        eval_done=torch.zeros(1),
        eval_accuracy=torch.zeros(1),
    )
    run = train.Run.__new__(train.Run)
    run.config, run.channel, run.roles, run.held_out = Config(), channel, roles, ["prompt"]
    run.learner, run.nodes = SimpleNamespace(version=3), nodes.Nodes()
    run.tickets = SimpleNamespace(batch=lambda version: None, receive=lambda rows: None)
    return roles.check, run.wait_for_rows, lambda: run.evaluate("eval_accuracy")


def test_waiting_ends_with_the_name_and_the_reason_when_a_role_is_gone(stub_roles):
    killed = mp.ProcessExitedException("terminated with signal SIGKILL", 1, 77, -9, "SIGKILL")
    for index, exits, message in (
        (0, None, "generator 0 died: its own traceback"),
        (1, killed, "teacher 0 died: .*SIGKILL"),
        (0, (), "left before the end"),
    ):
        raised = (
            mp.ProcessRaisedException("its own traceback", index, 77) if exits is None else exits
        )
        roles = stub_roles(raised)
        roles.check()  # as long as all live, nothing is raised
        roles.context.living[index] = False
        for wait in waits(roles):
            roles.channel.stop.fill_(0)
            with pytest.raises(nodes.RoleDied, match=message):
                wait()
            assert roles.channel.stop.item()  # the others are told to leave


@pytest.mark.parametrize("number", fork_server.INTERRUPTS)
def test_waiting_ends_after_a_signal_even_if_a_role_is_gone_too(number, stub_roles):
    roles = stub_roles()
    roles.check()
    # Raises nothing by itself: an update that is being made is finished.
    signal.raise_signal(number)
    for living in (True, False):
        roles.context.living[0] = living
        for wait in waits(roles):
            with pytest.raises(nodes.Interrupted):
                wait()


def test_a_terminal_that_is_closed_does_not_end_a_run_under_nohup(stub_roles):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    roles = stub_roles()
    signal.raise_signal(signal.SIGHUP)
    roles.check()


def test_waiting_ends_when_torchrun_is_gone(stub_roles):
    roles = stub_roles()
    roles.channel.running = lambda: False
    for wait in waits(roles):
        with pytest.raises(nodes.Interrupted):
            wait()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_saves_and_leaves(number, pair, tmp_path):
    """To every process at once: what a terminal does, also when it is closed,
    and a cluster's scheduler at the time limit."""
    output = tmp_path / "run"
    process = start(output, *pair, "--steps=100000", "--eval-every=0", ranks=1)
    read_until(process, r"update +2/")
    family = children(process.pid)
    for pid in [process.pid, *family]:
        if "resource_tracker" not in family.get(pid, ""):
            os.kill(pid, number)
    out, _ = process.communicate(timeout=60)
    done = int(re.search(r"interrupted after update (\d+)", out).group(1))
    assert (output / f"step_{done}" / "training_state.pt").exists() and len(metrics(output)) == done
    assert not still_alive(family, within=5.0)
    json.loads((output / "trace.json").read_text())


def test_bad_input_is_one_line_not_a_traceback(tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            f"--output-dir={tmp_path}/x",
            "--teacher=/nowhere",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and run.stderr.strip().startswith(
        "train.py: error: --teacher /nowhere: no model there"
    )
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_a_second_run_in_one_directory_is_refused(pair, tmp_path):
    first = start(tmp_path / "run", *pair, "--steps=100000", "--eval-every=0")
    read_until(first, "first prompt")
    family = children(first.pid)
    out = finish(start(tmp_path / "run", *pair, "--resume"), expect=1)
    assert out.splitlines() == [
        f"train.py: error: --output-dir {tmp_path}/run: another run uses it, choose another"
    ]
    first.kill()
    first.communicate()
    assert not still_alive(family)
    os.close(lock_output(tmp_path / "run"))  # the kernel has freed it


def test_weights_that_diverged_are_set_aside_and_good_ones_are_left(sync_run, pair, tmp_path):
    """Also with --keep-checkpoints 1, and if the same update diverged before."""
    output = shutil.copytree(sync_run[0], tmp_path / "run")
    (output / "diverged_7_1").mkdir()
    (output / "diverged_7_1" / "model.safetensors").touch()
    flags = [
        *pair,
        *SYNC,
        "--steps=9",
        "--eval-every=0",
        "--save-every=1",
        "--keep-checkpoints=1",
        "--warmup-steps=0",
        "--lr=1e30",
        "--resume",
    ]
    out = finish(start(output, *flags), expect=1)
    assert f"resuming from {output}/step_6" in out
    assert re.search(
        r"train.py: error: update 8: gradient norm is nan: lower --lr; "
        r"--resume takes the checkpoint before, if there is one",
        out,
    ), out
    assert len(list(output.glob("diverged_7_*"))) == 2
    assert checkpoints(output) == [output / "step_6"]


def test_what_diverged_is_not_saved_at_the_end(tmp_path):
    run = object.__new__(train.Run)
    run.config, run.saved_version = Config(output_dir=str(tmp_path)), 1
    run.learner = SimpleNamespace(version=3)  # without `save`
    run.set_aside()
    run.save()


def test_a_run_whose_prompts_have_changed_is_not_resumed(pair, tmp_path):
    """As rank 0 reads its input, before any model is loaded."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(5)))
    config = parse(
        [*pair, f"--prompts={prompts}", f"--output-dir={tmp_path}/run", "--eval-every=0"]
    )
    run = train.Run(config)
    os.close(run.lock)
    checkpoint = tmp_path / "run" / "step_3"
    checkpoint.mkdir()
    torch.save({}, checkpoint / "training_state.pt")
    progress = {"settings": asdict(config), "prompts": run.fingerprint, "trained_ahead": []}
    (checkpoint / "progress.yaml").write_text(yaml.safe_dump(progress))
    again = train.Run(replace(config, resume=True))
    os.close(again.lock)
    assert again.checkpoint == checkpoint
    prompts.write_text(prompts.read_text() + '{"prompt": "7+8="}\n')
    with pytest.raises(InputError, match="--resume: the prompts are not what they were"):
        train.Run(replace(config, resume=True))


def test_what_the_roles_are_forked_from_has_asked_for_no_gpu():
    """CUDA refuses to work in a process forked after the first question about devices."""
    code = f"""
import importlib, torch
def refuse(*args, **kwargs):
    raise RuntimeError("a device was asked for")
for name in ("is_available", "device_count", "_lazy_init", "current_device",
             "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
for name in {fork_server.PRELOAD}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_damaged_checkpoint_is_named_on_resume(sync_run, pair, tmp_path, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(sync_run[0], output)
    weights = output / "step_6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    monkeypatch.setattr("sys.argv", command(output, *pair, *SYNC, "--steps=8", "--resume")[1:])
    with pytest.raises(
        SystemExit, match=re.escape(f"train.py: error: {output}/step_6 cannot be loaded: ")
    ):
        train.main()


# ---- progress ------------------------------------------------------------------------------------


def test_the_progress_is_one_line_for_each_update(sync_run):
    output, text = sync_run
    assert "\r" not in text
    lines = [line for line in text.splitlines() if line.startswith("update ")]
    for line, record in zip(lines, metrics(output), strict=True):
        assert (
            line.startswith(f"update {record['step']:4d}/6  ")
            and f"reverse KL {record['reverse_kl']:.4f}" in line
        )
        assert ("accuracy" in line) == ("eval_accuracy" in record)


def test_a_save_that_failed_is_made_again_at_the_end(tmp_path):
    """A disk that was full for a moment must not lose what was learned."""
    saved = []

    def save(*args):
        saved.append(args)
        if len(saved) == 1:
            raise OSError("No space left on device")

    run = object.__new__(train.Run)
    run.config, run.tokenizer, run.saved_version, run.fingerprint = (
        Config(output_dir=str(tmp_path)),
        None,
        1,
        "of the prompts",
    )
    run.nodes = nodes.Nodes()
    run.learner = SimpleNamespace(version=2, save=save)
    run.tickets = SimpleNamespace(trained_ahead={5, 3})
    run.timeline = SimpleNamespace(span=lambda name: suppress())
    with pytest.raises(OSError):
        run.save()
    run.save()
    run.save()
    assert (
        len(saved) == 2
        and saved[1][2]
        == {"settings": asdict(run.config), "prompts": "of the prompts", "trained_ahead": [3, 5]}
        and run.saved_version == 2
    )


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3, 4]), (1, [3, 4]), (2, [2, 3, 4])])
def test_checkpoints_beside_the_newest_are_kept(keep, left, tmp_path):
    def save(output, tokenizer, progress):
        (output / f"step_{run.learner.version}").mkdir()
        torch.save(progress, output / f"step_{run.learner.version}" / "training_state.pt")

    run = object.__new__(train.Run)
    run.config, run.tokenizer, run.saved_version, run.fingerprint = (
        Config(output_dir=str(tmp_path), keep_checkpoints=keep),
        None,
        0,
        "",
    )
    run.nodes = nodes.Nodes()
    run.tickets = SimpleNamespace(trained_ahead=set())
    run.timeline = SimpleNamespace(span=lambda name: suppress())
    for version in (1, 2, 3, 4):
        run.learner = SimpleNamespace(version=version, save=save)
        run.save()
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_{version}" for version in left]


@pytest.mark.slow
def test_bad_input_gives_one_line_also_with_two_ranks(tmp_path):
    run = subprocess.run(
        command(tmp_path / "run", "--teacher=/nowhere", ranks=2), capture_output=True, text=True
    )
    assert (
        run.returncode
        and run.stderr.count("train.py: error: --teacher /nowhere: no model there") == 1
    )
    assert "run_rank" not in run.stderr  # the other rank waited in there


def test_the_log_adds_up_the_caches_of_all_teachers_and_averages_what_is_busy(
    tmp_path, monkeypatch
):
    (tmp_path / "metrics.jsonl").touch()
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    channel = SimpleNamespace(
        busy=torch.zeros(4), cache_stats=torch.tensor([[1, 3, 100, 5], [2, 2, 50, 0]])
    )
    log = Log(Config(output_dir=str(tmp_path), teachers=2), channel)
    channel.busy += torch.tensor([1.0, 0.5, 1.5, 2.0])
    log.write(1, {"tokens": 10, "reverse_kl": 0.5, "lag_mean": 0.0})
    (record,) = metrics(tmp_path)
    expected = {
        "teacher_cache_hit_rate": 3 / 8,
        "teacher_cache_bytes": 150,
        "teacher_cache_evictions": 5,
        "tokens_per_second": 5.0,
    }
    assert (
        record | expected | {"generator_busy": 0.5, "teacher_busy": 0.5, "learner_busy": 1.0}
        == record
    )
    assert log.busy == [0.5, 0.25, 0.75, 1.0]


def test_a_roles_process_does_not_use_cudnns_attention():
    state = "print(torch.backends.cuda.cudnn_sdp_enabled())"
    set_up = "launch.set_up_process(Config(), torch.device('cpu'), 1)"
    code = f"import torch, launch; from config import Config; {state}; {set_up}; {state}"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "True\nFalse\n"
