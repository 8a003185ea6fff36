"""Claims about several nodes: how they meet and part,
and whole runs of "nodes" that are torchrun agents on one machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from kill import children
from test_train import (  # noqa: F401
    BASE,
    SYNC,
    finish,
    metrics,
    read_until,
    start,
    still_alive,
    sync_run,
)

import nodes
import train
from channel import Tickets, may_start
from config import Config, InputError
from data import Prompt
from log import checkpoints
from losses import make_loss
from nodes import Nodes, RoleDied
from teacher import ready_rows
from test_channel import make


def place(monkeypatch, node, count):
    monkeypatch.setenv("GROUP_RANK", str(node))
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(count))


def close(channel):
    """Files would be many: `select` takes numbers below 1,024, and pytest is one process."""
    paths = channel.arguments[-1]
    for number in [int(path.rsplit("/", 1)[1]) for path in paths] + [
        queue.fd for queue in (channel.to_generator, channel.to_learner, *channel.to_teachers)
    ]:
        os.close(number)
    os.close(channel.watched)


# ---- meeting -------------------------------------------------------------------------------------


@pytest.fixture
def meet_on(monkeypatch):
    """meet_on(count) -> leaders of that many nodes, without heartbeats, on one store.
    `.server`: the store, `.clock`: what time it is."""
    made = []

    def make(count):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.port))
        # The first beat comes without the thread: `check` would keep it waiting.
        monkeypatch.setattr(Nodes, "beat", lambda self: None)
        leaders = [Nodes(0, 1, node, count) for node in range(count)]
        made.append(server)
        return leaders

    make.servers = made
    return make


def test_nodes_meet_once_all_have_come_and_hear_what_each_brings(meet_on):
    leaders = meet_on(3)
    heard, late = {}, threading.Event()

    def meet(leader, update):
        if leader.node == 2:
            late.wait()
        heard[leader.node] = leader.meet(update, [leader.node, "part"], lambda: None)

    for update in (0, 1):
        threads = [threading.Thread(target=meet, args=(leader, update)) for leader in leaders]
        for thread in threads:
            thread.start()
        threads[0].join(0.05)
        assert update or not heard  # nobody goes on without node 2
        late.set()
        for thread in threads:
            thread.join()
        assert heard == {node: [[0, "part"], [1, "part"], [2, "part"]] for node in range(3)}
        heard.clear()
    assert leaders[0].waited > 0


def test_while_a_node_waits_it_looks_after_its_own(meet_on):
    def own_generator_is_gone():
        raise RoleDied("generator 0 died")

    with pytest.raises(RoleDied, match="generator 0 died"):
        meet_on(2)[1].meet(0, None, own_generator_is_gone)


def test_a_heart_beats_as_long_as_the_process_lives(monkeypatch):
    monkeypatch.setattr(nodes, "BEAT", 0.01)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    leader = Nodes(0, 1, 1, 2)
    deadline = time.monotonic() + 20.0
    while leader.store.add("beat 1", 0) < 3 and time.monotonic() < deadline:
        pass
    assert leader.store.add("beat 1", 0) >= 3


class Elsewhere:
    """In the place of Nodes: another node that has left."""

    def __init__(self):
        self.said = []

    def say(self, **word):
        self.said.append(word)

    def check(self):
        raise RoleDied("node 1 is gone")


def leader(others, **parts):
    run = train.Run.__new__(train.Run)
    run.config, run.nodes, run.held_out = Config(), others, ["prompt"]
    run.roles, run.timeline = (
        SimpleNamespace(check=lambda: None),
        SimpleNamespace(flush=lambda: None),
    )
    run.learner = SimpleNamespace(version=3)
    vars(run).update(parts)
    return run


def test_wherever_a_leader_waits_it_hears_that_another_node_is_gone_also_while_rows_are_ready():
    tickets = SimpleNamespace(batch=lambda version: [1, 2])
    channel = SimpleNamespace(eval_due=torch.zeros(1), eval_done=torch.zeros(1))
    run = leader(Elsewhere(), tickets=tickets, channel=channel)
    for wait in (run.wait_for_rows, lambda: run.evaluate("eval_accuracy")):
        with pytest.raises(RoleDied, match="node 1 is gone"):
            wait()


def test_a_leader_tells_the_others_why_it_leaves_and_saves():
    def fail(error):
        raise error

    for error, world, saves in (
        (RoleDied("teacher 0 died"), 2, 1),
        (RuntimeError("out of memory"), 1, 1),
        (RuntimeError("out of memory"), 2, 0),
    ):
        others, saved = Elsewhere(), []
        others.world, others.tell = world, lambda value: None
        run = leader(others, main_loop=lambda: fail(error), save=lambda: saved.append(1))
        with pytest.raises(type(error)):
            run.lead()
        assert (
            others.said
            and all(word == {"leaves": str(error)} for word in others.said)
            and len(saved) == saves
        )


def test_an_update_waits_for_the_other_nodes_with_an_eye_on_its_own_roles():
    seen = {}

    def meet(update, part, check):
        seen["check"] = check
        raise RoleDied("enough")

    others = SimpleNamespace(meet=meet, tell=lambda value: None, waited=0.0)
    learner = SimpleNamespace(version=3, accumulate=lambda channel, rows: {})
    run = leader(
        others,
        learner=learner,
        channel=None,
        timeline=SimpleNamespace(span=lambda name: suppress()),
    )
    with pytest.raises(RoleDied, match="enough"):
        run.train_on([1], [])
    assert seen["check"] is run.roles.check


def test_m2po_is_refused_on_several_nodes(monkeypatch):
    """Its bound needs the samples of all nodes before any has a gradient."""
    config = Config(loss="sampled_reverse_kl", correction="m2po")
    make_loss(config)
    place(monkeypatch, 0, 2)
    with pytest.raises(
        InputError, match="--correction m2po needs all samples at once: use one node"
    ):
        make_loss(config)


def test_one_node_has_nobody_to_wait_for():
    alone = Nodes()
    alone.say(update=3)
    assert alone.check() == [] and alone.meet(3, "part", lambda: None) == ["part"]


def test_what_a_node_says_when_it_leaves_ends_the_others(meet_on):
    first, second, third = meet_on(3)
    second.say(leaves="")  # it has made all updates
    assert len(third.check()) == 3
    second.say(leaves="teacher 0 died: killed")
    with pytest.raises(
        RoleDied, match=rf"node 1 \({socket.gethostname()}\) is gone: teacher 0 died: killed"
    ):
        first.meet(0, None, lambda: None)
    second.say(leaves="interrupted")
    with pytest.raises(RoleDied, match="node 1 .* is gone: interrupted"):
        third.check()


def test_a_node_without_a_sign_of_life_is_dead_unless_it_was_done(meet_on, monkeypatch):
    first, second = meet_on(2)
    now = [100.0]
    monkeypatch.setattr(nodes, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep))
    first.check()
    for _ in range(5):  # it beats, however long its update takes
        now[0] += 29.0
        first.store.add("beat 0", 1)
        second.store.add("beat 1", 1)
        first.check()
    now[0] += 31.0
    first.store.add("beat 0", 1)
    with pytest.raises(RoleDied, match=r"node 1 \(.*\) is gone: no sign of life for 30 s"):
        first.check()
    second.say(leaves="")
    first.check()


def test_a_store_that_is_gone_means_that_node_0_is(meet_on):
    leaders = meet_on(2)
    meet_on.servers.clear()  # closes it
    with pytest.raises(RoleDied, match="torchrun's store does not answer: its node is gone"):
        leaders[1].check()
    leaders[1].say(leaves="error")  # nobody hears it, and nothing is raised


# ---- whole runs ----------------------------------------------------------------------------------


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def start_nodes(count, output, *flags, ranks=1):
    """torchrun agents on loopback, numbered by `--node-rank`."""
    port = free_port()
    agents = []
    for node in range(count):
        torchrun = [
            f"--nnodes={count}",
            f"--nproc-per-node={ranks}",
            f"--node-rank={node}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
        ]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *torchrun,
            "--",
            str(ROOT / "train.py"),
            *BASE,
            f"--output-dir={output}",
            *flags,
        ]
        pipes = dict(
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        agents.append(
            subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **pipes)
        )
    return agents


def assert_same_run(ours, one):
    """The same rollouts in the first update, since the weights are the same;
    then the weights differ by rounding."""
    for name in ("loss", "reverse_kl", "grad_norm", "lag_mean"):
        assert ours[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-6), name
    assert ours[0]["tokens"] == one[0]["tokens"]
    for mine, theirs in zip(ours, one):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.02)


def test_two_nodes_train_like_one_and_an_agent_that_is_killed_ends_both_saved(
    sync_run,  # noqa: F811
    pair,
    tmp_path,
):
    agents = start_nodes(2, tmp_path / "run", *pair, *SYNC, "--steps=100000", "--eval-every=0")
    read_until(agents[0], r"update +6/")
    families = [children(agent.pid) for agent in agents]
    agents[1].kill()
    started = time.monotonic()
    out = finish(agents[0], expect=1)
    assert time.monotonic() - started < 30.0
    assert_same_run(metrics(tmp_path / "run")[:6], metrics(sync_run[0]))
    assert re.search(r"train.py: error: node 1 \(.*\) is gone: interrupted", out), out
    done = len(metrics(tmp_path / "run"))
    assert len(metrics(tmp_path / "run" / "node_1")) == done
    assert checkpoints(tmp_path / "run") == [tmp_path / "run" / f"step_{done}"]
    agents[1].communicate()
    assert not any(still_alive(family) for family in families)
    record = metrics(tmp_path / "run")[-1]
    # Generator, teacher, learner.
    assert len(record["nodes_busy"]) == 2 and all(len(node) == 3 for node in record["nodes_busy"])
    json.loads((tmp_path / "run" / "node_1" / "trace.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_node_whose_processes_are_all_killed_ends_the_other_within_a_minute_saved(
    ranks, pair, tmp_path
):
    """As when a machine is gone, but for the sockets, which the kernel closes here."""
    agents = start_nodes(
        2, tmp_path / "run", *pair, "--steps=100000", "--eval-every=0", ranks=ranks
    )
    read_until(agents[0], r"update +3/")
    families = [children(agent.pid) for agent in agents]
    for pid in [agents[1].pid, *families[1]]:
        os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    out = finish(agents[0], expect=1)
    assert time.monotonic() - started < 60.0
    assert re.search(r"node 1 \(.*\) is gone: no sign of life|Has a rank or a node died", out), out
    if "is gone" in out or ranks == 1:  # else it was amid the exchange
        assert checkpoints(tmp_path / "run") == [
            tmp_path / "run" / f"step_{len(metrics(tmp_path / 'run'))}"
        ]
    agents[1].communicate()
    assert not still_alive(families[0])


@pytest.mark.slow
def test_a_node_that_is_held_back_shows_in_the_metrics(pair, tmp_path):
    """Its generator stands still for three seconds:
    then the other node has waited, and it has not."""
    agents = start_nodes(2, tmp_path / "run", *pair, *SYNC, "--steps=12", "--eval-every=0")
    read_until(agents[0], r"update +3/")
    server, generator, teacher = sorted(
        pid for pid, line in children(agents[1].pid).items() if "forkserver" in line
    )
    os.kill(generator, signal.SIGSTOP)
    time.sleep(3)
    os.kill(generator, signal.SIGCONT)
    assert [finish(agent) for agent in agents]
    waits = [record["nodes_wait_seconds"] for record in metrics(tmp_path / "run")]
    mine, its = max(waits)
    assert mine > 2.0 and its < 1.0


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_nodes(pair, tmp_path):
    """Two nodes, then one, then three: the same updates as one node makes that never stops."""
    flags = [*pair, "--batch-size=12", "--max-staleness=0", "--eval-every=0"]
    finish(start(tmp_path / "one", *flags, "--steps=6"))
    for steps, count, resume in ((2, 2, "--no-resume"), (4, 1, "--resume"), (6, 3, "--resume")):
        for agent in start_nodes(count, tmp_path / "run", *flags, f"--steps={steps}", resume):
            finish(agent)
    ours = metrics(tmp_path / "run")
    assert [record["step"] for record in ours] == list(range(1, 7))
    assert_same_run(ours, metrics(tmp_path / "one"))


@pytest.mark.slow
def test_two_nodes_reach_the_accuracy_of_one_on_the_built_in_task(tmp_path):
    flags = [
        "--batch-size=64",
        "--slots=64",
        "--eval-size=256",
        "--max-prompt-tokens=64",
        "--max-new-tokens=40",
    ]
    for agent in start_nodes(2, tmp_path / "run", *flags):
        finish(agent)
    assert metrics(tmp_path / "run")[-1]["eval_accuracy"] > 0.95
    assert not any("eval_accuracy" in record for record in metrics(tmp_path / "run" / "node_1"))


@pytest.mark.slow
def test_a_node_whose_teacher_dies_is_named_and_ends_the_others(pair, tmp_path):
    agents = start_nodes(2, tmp_path / "run", *pair, "--steps=100000")
    read_until(agents[0], r"update +1/")
    family = children(agents[1].pid)
    teacher = sorted(pid for pid, line in family.items() if "forkserver" in line)[2]
    os.kill(teacher, signal.SIGKILL)
    outs = [finish(agent, expect=1) for agent in agents]
    assert re.search(
        r"train.py: error: node 1 \(.*\) is gone: teacher 0 died: .*SIGKILL", outs[0]
    ), outs[0]
    assert re.search(r"train.py: error: teacher 0 died: .*SIGKILL", outs[1]), outs[1]
