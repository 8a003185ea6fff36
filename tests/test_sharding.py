"""Claims about several learner ranks: sharded over 2 and 4 of them, updates,
checkpoints and mailbox are those of one.

Also about several nodes of them: their updates are those of one.
"""

import os
from datetime import timedelta
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import load
from frozen import MAX_NEW, ROWS
from test_learner import new_learner, stale_table
from torch.distributed.fsdp import FSDPModule

import fork_server
from channel import Channel
from config import Config
from learner import Learner, whole
from model import layers_of
from nodes import Nodes, from_every_rank

# 28 padded tokens hold one or two rollouts: the ranks have different numbers of micro-batches.
# Every loss; tied and untied.
SMALL = dict(max_prompt_tokens=16, max_new_tokens=MAX_NEW, micro_batch_tokens=28, max_grad_norm=1e9)
CASES = [
    ("qwen3", Config(loss="forward_kl", top_k=6, **SMALL)),
    ("llama", Config(loss="sparse_reverse_kl", top_k=4, temperature=0.7, **SMALL)),
    ("qwen3", Config(loss="sampled_reverse_kl", num_samples=3, correction="m2po", **SMALL)),
    ("llama", Config(loss="stratified_reverse_kl", top_k=4, num_samples=2, **SMALL)),
    ("qwen3", Config(loss="stratified_reverse_kl", top_k=4, num_samples=2, **SMALL)),
]
UPDATES = (ROWS[:7], ROWS[:1])  # in the second all ranks but one have no rows


def train(learner, table):
    """Metrics and whole gradients of each update."""
    found = []
    for rows in UPDATES:
        metrics = learner.update(table, rows)
        found.append((metrics, torch.cat([whole(p.grad).flatten() for p in learner.parameters])))
    return found


def rank_main(rank, world, out, paths, tables, mailbox):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)  # ranks that are out of step fail, and do not hang
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out}/rendezvous{world}",
        rank=rank,
        world_size=world,
        timeout=limit,
    )
    nodes = Nodes(rank, world)
    results = []
    for number, ((family, config), fields) in enumerate(zip(CASES, tables)):
        last = number == len(CASES) - 1  # it recomputes its layers
        learner, table = (
            new_learner(paths[family], config, nodes=nodes, recompute=last),
            SimpleNamespace(**fields),
        )
        # Each is gathered for itself.
        assert all(isinstance(layer, FSDPModule) for layer in layers_of(learner.model))
        found = train(learner, table)
        moments = [state["exp_avg"] for state in learner.optimizer.state.values()]
        held = [
            sum(x.to_local().numel() for x in kind)
            for kind in (learner.parameters, [p.grad for p in learner.parameters], moments)
        ]
        results.append((found, held))
        if number == 0:
            learner.publish(mailbox)
            results.append([whole(p.detach()) for p in learner.parameters])
            directory = out / f"of_{world}"
            learner.save(directory, SimpleNamespace(save_pretrained=lambda path: None), [7])
            dist.barrier()
            again = new_learner(str(directory / "step_2"), config, nodes=nodes)
            again.load(directory / "step_2")
            assert again.version == 2
            results.append(again.update(table, ROWS[:7]))
            if (out / "of_2" / "step_2").exists():  # saved by two ranks, continued by these
                other = new_learner(str(out / "of_2" / "step_2"), config, nodes=nodes)
                other.load(out / "of_2" / "step_2")
                results.append(other.update(table, ROWS[:7]))
    in_bfloat16 = Learner(load(paths["qwen3"]), CASES[-1][1], 173, torch.bfloat16, nodes)
    dtypes = set()
    mlp = layers_of(in_bfloat16.model)[0].mlp
    mlp.register_forward_hook(
        lambda module, inputs, output: dtypes.add(
            (inputs[0].dtype, output.dtype, module.gate_proj.weight.dtype)
        )
    )
    metrics = in_bfloat16.update(table, ROWS[:7])
    assert dtypes == {(torch.bfloat16, torch.bfloat16, torch.bfloat16)}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in in_bfloat16.parameters)
    # Of the last case, in float32.
    assert abs(metrics["grad_norm"] / found[0][0]["grad_norm"] - 1) < 0.1
    torch.save(results, out / f"{world}_{rank}")
    dist.destroy_process_group()


def assert_same_metrics(found, expected):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def of_one(model_dir):
    """(table, learner after its updates, what they gave) of every case, by one rank."""
    made = []
    for family, config in CASES:
        table = stale_table(model_dir, config)
        learner = new_learner(model_dir(family, seed=2), config)
        made.append((table, learner, train(learner, table)))
    return made


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    forkserver.set_forkserver_preload(fork_server.PRELOAD)
    return tmp_path_factory.mktemp("ranks")


# In this order: four ranks continue what two have saved.
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_the_parameters_train_save_and_publish_like_one(
    world, of_one, places, model_dir, tokenizer
):
    paths = {family: model_dir(family, seed=2) for family in ("qwen3", "llama")}
    count = sum(p.numel() for p in of_one[0][1].parameters)
    mailbox = Channel.create(
        Config(batch_size=1, max_prompt_tokens=4, max_new_tokens=4), count, torch.bfloat16
    )
    arguments = (world, places, paths, [vars(table) for table, *_ in of_one], mailbox)
    mp.start_processes(rank_main, arguments, nprocs=world, start_method="forkserver")
    ranks = [torch.load(places / f"{world}_{rank}") for rank in range(world)]

    continued = [part for part in ranks[0] if isinstance(part, dict)]
    cases = [[part for part in results if isinstance(part, tuple)] for results in ranks]
    for case, ((family, config), (_, learner, expected)) in enumerate(zip(CASES, of_one)):
        for results in cases:
            for (metrics, gradient), (metrics_of_one, gradient_of_one) in zip(
                results[case][0], expected
            ):
                assert_same_metrics(metrics, metrics_of_one)
                scale = float(gradient_of_one.abs().max())
                torch.testing.assert_close(
                    gradient,
                    gradient_of_one,
                    rtol=1e-3,
                    atol=1e-5 * scale,
                    msg=f"{family} {config.loss}",
                )
        total = sum(p.numel() for p in learner.parameters)
        for kind in range(3):  # parameters, gradients, moments
            held = [results[case][1][kind] for results in cases]
            assert sum(held) == total and max(held) <= 1.1 * total / world

    table, learner, _ = of_one[0]
    (parameters,) = (part for part in ranks[0] if isinstance(part, list))
    published = torch.zeros(count, dtype=torch.bfloat16)
    assert mailbox.pick_up(published) == 2
    assert torch.equal(published, torch.cat([p.flatten() for p in parameters]).bfloat16())
    assert all(a.shape == b.shape for a, b in zip(parameters, learner.parameters, strict=True))
    one = new_learner(model_dir("qwen3", seed=2), CASES[0][1])
    train(one, table)
    third = one.update(table, ROWS[:7])
    # Saved by several ranks, continued by one.
    alone = new_learner(str(places / f"of_{world}" / "step_2"), CASES[0][1])
    alone.load(places / f"of_{world}" / "step_2")
    assert len(continued) == 1 + (places / "of_2").exists()
    for metrics in (*continued, alone.update(table, ROWS[:7])):
        assert_same_metrics(metrics, third)


# ---- several nodes -------------------------------------------------------------------------------

NODE_UPDATES = (ROWS[:6], ROWS[-6:])  # every node has equally many


def node_main(number, count, world, out, port, paths, tables):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out}/nodes{count}",
        rank=number,
        world_size=count * world,
        timeout=limit,
    )
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    node, rank = divmod(number, world)
    nodes = Nodes(rank, world, node, count)
    results = []
    for (family, config), fields in zip(CASES, tables):
        learner, table = new_learner(paths[family], config, nodes=nodes), SimpleNamespace(**fields)
        for rows in NODE_UPDATES:
            part = learner.accumulate(table, rows[node::count])
            metrics = learner.apply(from_every_rank(part)[::world])
            results.append(
                (metrics, torch.cat([whole(p.detach()).flatten() for p in learner.parameters]))
            )
    torch.save(results, out / f"node_{count}_{number}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("count, world", [(2, 2), (3, 1)])
def test_nodes_that_add_up_their_gradients_train_like_one(count, world, of_one, places, model_dir):
    paths = {family: model_dir(family, seed=2) for family in ("qwen3", "llama")}
    for table, *_ in of_one:
        table.weight_version[5] = -4  # the longest lag, on another node than 0
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (count, world, places, store.port, paths, [vars(table) for table, *_ in of_one])
    mp.start_processes(node_main, arguments, nprocs=count * world, start_method="forkserver")
    found = [torch.load(places / f"node_{count}_{number}") for number in range(count * world)]
    expected = []
    for (family, config), (table, *_) in zip(CASES, of_one):
        learner = new_learner(paths[family], config)
        for rows in NODE_UPDATES:
            metrics = learner.update(table, rows)
            expected.append(
                (metrics, torch.cat([p.detach().flatten() for p in learner.parameters]))
            )
    for results in found:
        for (metrics, weights), (metrics_of_one, weights_of_one) in zip(
            results, expected, strict=True
        ):
            assert_same_metrics(metrics, metrics_of_one)
            # An update moves them by 1e-4 and 2e-4.
            torch.testing.assert_close(weights, weights_of_one, rtol=0, atol=2e-5)
        # The copies stay the same.
        assert all(torch.equal(ours, first) for (_, ours), (_, first) in zip(results, found[0]))
