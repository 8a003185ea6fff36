"""Claims about several nodes: how leaders exchange, and whole runs.

The nodes are processes or torchrun agents on one machine.
"""

import itertools
import json
import os
import re
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import SYNC
from kill import children
from runs import (
    ENDLESS,
    PATIENCE,
    finish,
    forked,
    interrupt,
    learners,
    metrics,
    read_trace,
    read_until,
    start,
    start_nodes,
    still_alive,
    wait_until,
)
from test_train import assert_same_run

from support.checkpoint import checkpoints, read_progress
from support.ranks import Ranks, RoleDied

slow = pytest.mark.slow
GONE = "another node is gone: its torchrun says how"

# ---- the exchange --------------------------------------------------------------------------------


def join(rank, nodes, local, place):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}/rendezvous",
        rank=rank,
        world_size=nodes * local,
        timeout=timedelta(seconds=60),
    )
    return Ranks(rank, nodes * local, local)


def run_nodes(entry, nodes, local, place):
    """entry(Ranks, place) in a process for each rank: their exit codes, what they returned.

    A rank that is killed returns nothing.
    """
    context = mp.get_context("fork")  # they use nothing that a fork could break, and start at once
    world = nodes * local
    arguments = [(rank, entry, nodes, local, place) for rank in range(world)]
    processes = [context.Process(target=node_main, args=own) for own in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60.0)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    files = [place / f"rank_{rank}" for rank in range(world)]
    return codes, [torch.load(file) if file.exists() else None for file in files]


def node_main(rank, entry, nodes, local, place):
    result = entry(join(rank, nodes, local, place), place)
    torch.save(result, place / f"rank_{rank}")
    os._exit(0)


def exchange_twice(ranks, place):
    if ranks.local_rank > 0:
        return [ranks.tell(), ranks.tell()]
    if ranks.node == 1:  # the others wait for it
        wait_until(lambda: len([*place.glob("at_*")]) == 2)
    (place / f"at_{ranks.node}").touch()
    found = []
    for update in (3, 4):
        parts = ranks.exchange({"node": ranks.node, "update": update})
        found.append(ranks.tell((ranks.node, parts)))
    return found


def test_leaders_hear_the_parts_of_all_nodes_in_order_and_tell_the_ranks_of_their_own(tmp_path):
    codes, found = run_nodes(exchange_twice, 3, 2, tmp_path)
    assert codes == [0] * 6
    for rank, told in enumerate(found):
        parts = [[{"node": node, "update": update} for node in range(3)] for update in (3, 4)]
        assert told == [(rank // 2, part) for part in parts]


def lose_one(ranks, place):
    """Node 1 ends after the first exchange."""
    ranks.exchange({"node": ranks.node})
    if ranks.node == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RoleDied, match=GONE):
        ranks.exchange({"node": ranks.node})
    return True


def test_a_node_that_is_gone_is_noticed_in_the_next_exchange(tmp_path):
    codes, found = run_nodes(lose_one, 3, 1, tmp_path)
    assert codes == [0, -signal.SIGKILL, 0] and found == [True, None, True]


def test_one_node_has_nobody_to_wait_for():
    alone = Ranks()
    assert alone.exchange({"node": 0}) == [{"node": 0}]
    assert alone.tell("word") == "word"


# ---- whole runs ----------------------------------------------------------------------------------


@slow
def test_two_nodes_train_like_one_and_an_agent_that_is_killed_ends_both_saved(
    sync_run,
    pair,
    tmp_path,
):
    output = tmp_path / "run"
    agents = start_nodes(2, output, *pair, *SYNC, *ENDLESS)
    read_until(agents[0], r"update +6/")
    families = [children(agent.pid) for agent in agents]
    agents[1].kill()
    out = finish(agents[0], expect=1)
    assert_same_run(metrics(output)[:6], metrics(sync_run[0]))
    assert f"train.py: error: {GONE}" in out, out
    assert 'train.py", line' not in out, out
    done = len(metrics(output))
    assert len(metrics(output / "node_1")) == done
    assert checkpoints(output) == [output / f"step_{done}"]
    assert not checkpoints(output / "node_1")
    agents[1].communicate()
    assert not any(still_alive(family) for family in families)
    read_trace(output / "node_1")


@slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_node_whose_processes_are_all_killed_ends_the_other(ranks, pair, tmp_path):
    """As when a machine is gone, but for the sockets, which the kernel closes here."""
    output = tmp_path / "run"
    agents = start_nodes(2, output, *pair, *ENDLESS, ranks=ranks)
    read_until(agents[0], r"update +3/")
    families = [children(agent.pid) for agent in agents]
    for pid in [agents[1].pid, *families[1]]:
        os.kill(pid, signal.SIGKILL)
    out = finish(agents[0], expect=1)
    message = "error: (another node is gone: its torchrun|a rank or a node died: torchrun) says how"
    assert re.search(message, out), out
    if "another node" in out:  # else it was amid an update
        assert checkpoints(output) == [output / f"step_{len(metrics(output))}"]
    agents[1].communicate()
    assert not still_alive(families[0])


@slow
@pytest.mark.parametrize("node", [0, 1])
def test_an_agent_that_is_killed_during_the_imports_ends_both_nodes(node, pair, tmp_path):
    agents = start_nodes(2, tmp_path / "run", *pair, *ENDLESS)
    wait_until(lambda: all(learners(agent) for agent in agents))
    families = [children(agent.pid) for agent in agents]
    agents[node].kill()
    outs = [agent.communicate(timeout=PATIENCE)[0] for agent in agents]
    assert not any(still_alive(family) for family in families)
    reasons = ("a rank or a node died", "torchrun has died: its store", GONE)
    assert any(f"train.py: error: {reason}" in outs[1 - node] for reason in reasons), outs


@slow
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


NEWEST_FIRST = """
import json
from tickets import Tickets
real_batch, real_trained = Tickets.batch, Tickets.trained
def batch(self, version):  # so that an older one is always left
    share = self.config.batch_size // self.config.nodes
    under_way = self.config.table_rows - len(self.free_rows) - len(self.scored)
    if under_way and len(self.scored) <= share:
        return None
    self.scored = dict(sorted(self.scored.items(), reverse=True))
    return real_batch(self, version)
def trained(self, tickets):
    with open("{path}/tickets_" + str(self.config.node), "a") as file:
        file.write(json.dumps(tickets) + "\\n")
    real_trained(self, tickets)
Tickets.batch, Tickets.trained = batch, trained
"""


@slow
def test_in_arrival_order_2_then_1_then_3_nodes_train_every_ticket_once(pair, tmp_path):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(NEWEST_FIRST.format(path=tmp_path))
    flags = [*pair, "--batch-size=12", "--max-staleness=2", "--eval-every=0", "--window=100"]
    flags += [f"--plugin={plugin}"]
    ahead = []
    for steps, count, resume in ((3, 2, "--no-resume"), (6, 1, "--resume"), (9, 3, "--resume")):
        # The run is made for 9 updates, and interrupted: the last updates of a run have no choice.
        agents = start_nodes(count, tmp_path / "run", *flags, "--steps=9", resume)
        if steps < 9:
            read_until(agents[0], rf"update +{steps}/")
            interrupt(agents[0], signal.SIGTERM)
        outs = [agent.communicate(timeout=PATIENCE)[0] for agent in agents]
        saved = checkpoints(tmp_path / "run")
        assert saved, outs
        ahead.append(read_progress(saved[-1])["trained_ahead"])
    assert ahead[0] and ahead[1] and not ahead[2]  # so there was something to remember
    updates = [json.loads(line) for line in (tmp_path / "tickets_0").read_text().splitlines()]
    assert len(updates) == 9 and all(len(tickets) == 12 for tickets in updates)
    assert sorted(itertools.chain(*updates)) == list(range(9 * 12))


@slow
def test_two_nodes_reach_the_accuracy_of_one_on_the_built_in_task(tmp_path):
    flags = ["--batch-size=64", "--slots=64", "--eval-size=256"]
    flags += ["--max-prompt-tokens=64", "--max-new-tokens=40"]
    for agent in start_nodes(2, tmp_path / "run", *flags):
        finish(agent)
    assert metrics(tmp_path / "run")[-1]["eval_accuracy"] > 0.95
    assert not any("eval_accuracy" in record for record in metrics(tmp_path / "run" / "node_1"))


# ---- how they end --------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_role_that_dies_on_node_1_is_named_there_and_ends_both(ranks, pair, tmp_path):
    output = tmp_path / "run"
    agents = start_nodes(2, output, *pair, *ENDLESS, ranks=ranks)
    read_until(agents[0], r"update +1/")
    families = [children(agent.pid) for agent in agents]
    os.kill(forked(agents[1])[2], signal.SIGKILL)
    outs = [finish(agent, expect=1) for agent in agents]
    assert f"train.py: error: {GONE}" in outs[0], outs[0]
    assert re.search(r"error: teacher 0 died: .*SIGKILL", outs[1]), outs[1]
    assert not any("a rank or a node died" in out for out in outs), outs
    assert checkpoints(output) == [output / f"step_{len(metrics(output))}"]
    assert not any(still_alive(family) for family in families)


@slow
@pytest.mark.parametrize("node", [0, 1])
def test_an_interrupt_of_one_node_ends_both_saved(node, pair, tmp_path):
    output = tmp_path / "run"
    agents = start_nodes(2, output, *pair, *ENDLESS, ranks=2)
    read_until(agents[0], r"update +2/")
    families = [children(agent.pid) for agent in agents]
    interrupt(agents[node], signal.SIGINT)
    outs = [finish(agent, expect=1) for agent in agents]
    assert f"train.py: error: {GONE}" in outs[1 - node], outs
    assert not any("a rank or a node died" in out for out in outs), outs
    assert checkpoints(output) == [output / f"step_{len(metrics(output))}"]
    assert not any(still_alive(family) for family in families)


@slow
@pytest.mark.parametrize("nodes, ranks", [(1, 2), (2, 2)])
def test_a_gradient_that_is_not_finite_is_said_once_by_every_leader(nodes, ranks, pair, tmp_path):
    output = tmp_path / "run"
    flags = [*ENDLESS, "--save-every=1", "--warmup-steps=0", "--lr=1e30"]
    for agent in start_nodes(nodes, output, *pair, *flags, ranks=ranks):
        out = finish(agent, expect=1)
        assert len(re.findall(r"error: update 2: gradient norm is (nan|inf): lower", out)) == 1, out
        assert "died" not in out and "gone" not in out, out
        assert out.count("note: --lr is 1e+30, for ") == (out.count("update    1/") > 0), out
    assert checkpoints(output) == [output / "step_1"]  # the weights that have no gradient are left


FULL_DISK = """
import torch
def save(*args):
    raise RuntimeError("No space left on device")
torch.save = save
"""


@slow
@pytest.mark.parametrize("nodes, ranks", [(1, 2), (2, 2)])
def test_a_full_disk_is_said_and_ends_every_node(nodes, ranks, pair, tmp_path):
    (tmp_path / "full.py").write_text(FULL_DISK)
    flags = [*pair, *ENDLESS, f"--plugin={tmp_path}/full.py", "--save-every=2"]
    agents = start_nodes(nodes, tmp_path / "run", *flags, ranks=ranks)
    outs = [finish(agent, expect=1) for agent in agents]
    messages = ("step_2 cannot be written: No space left on device", GONE)
    for out, message in zip(outs, messages):
        assert re.search(f"train.py: error: .*{message}", out), out
        assert "a rank or a node died" not in out, out
    assert not list((tmp_path / "run").glob("*step*"))


@slow
def test_nodes_with_different_numbers_of_ranks_are_refused(pair, tmp_path):
    for agent in start_nodes(2, tmp_path / "run", *pair, *ENDLESS, ranks=[1, 2]):
        out = finish(agent, expect=1)
        assert "the nodes have different --nproc-per-node: make them the same" in out, out
