"""Claims about learner ranks, on one node or several: they train, publish and save like one.

The ranks are processes on gloo. A rank trains its node's part of the rows of a frozen table.
"""

import os
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from math import inf
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import CPU, corrected
from frozen import MAX_NEW, ROWS, frozen_table
from kill import alive
from torch.distributed.fsdp import FSDPModule
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from channel import Channel
from learner import Learner, whole
from model import layers_of
from support.config import builtin
from support.load import load_model
from support.ranks import Ranks

# 28 padded tokens hold one or two rollouts: the ranks have different numbers of micro-batches.
SIZES = dict(max_prompt_tokens=16, max_new_tokens=MAX_NEW, micro_batch_tokens=28, max_grad_norm=1e9)
STRATIFIED = builtin(loss="stratified_reverse_kl", top_k=4, num_samples=2, **SIZES)
CASES = [  # (family, config): every kind of loss; llama has a head of its own
    ("qwen3", builtin(loss="forward_kl", top_k=6, **SIZES)),
    ("llama", builtin(loss="sparse_reverse_kl", top_k=4, temperature=0.7, **SIZES)),
    ("qwen3", builtin(loss="sampled_reverse_kl", num_samples=8, **SIZES)),
    ("qwen3", corrected("sampled_rollout_m2po", num_samples=3, **SIZES)),
    ("llama", corrected("sampled_current_m2po_areal", num_samples=3, **SIZES)),
    ("llama", STRATIFIED),
    ("qwen3", replace(STRATIFIED, checkpoint_activations=True)),
    ("moe", STRATIFIED),
]
# Of 2 nodes with 2 ranks each the second has one row in the second update: a rank has none.
UPDATES = (ROWS[:7], ROWS[:3])
NEXT = ROWS[:6]  # after the checkpoint
STEPS = len(UPDATES)


@pytest.fixture(scope="module")
def paths(model_dir, tmp_path_factory):
    """family -> directory of the student. moe: 16 experts, of which a token asks one."""
    made = {family: model_dir(family, seed=2) for family in ("qwen3", "llama")}
    made["moe"] = str(tmp_path_factory.mktemp("moe"))
    torch.manual_seed(2)
    sizes = dict(vocab_size=173, hidden_size=32, intermediate_size=48, moe_intermediate_size=16)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    experts = dict(num_experts=16, num_experts_per_tok=1, initializer_range=0.3)
    config = Qwen3MoeConfig(**sizes, **heads, **experts, tie_word_embeddings=False)
    Qwen3MoeForCausalLM(config).save_pretrained(made["moe"])
    return made


def new_learner(path, config, ranks=None, dtype=torch.float32):
    return Learner(load_model(path, torch.float32, CPU), config, 173, dtype, ranks or Ranks())


def update(learner, table, rows):
    """One update on `rows`, of which every node has its share."""
    ranks = learner.ranks
    shares = [rows[node :: ranks.nodes] for node in range(ranks.nodes)]
    parts = [learner.describe(table, share) for share in shares]
    return learner.update(table, shares[ranks.node], parts)


def train(learner, table):
    """(metrics, whole gradient, bound of M2PO or 0) of each update."""
    found = []
    for rows in UPDATES:
        metrics = update(learner, table, rows)
        gradient = torch.cat([whole(p.grad).flatten() for p in learner.parameters])
        found.append((metrics, gradient, getattr(learner.student.loss, "m2_bound", 0.0)))
    return found


# ---- one rank ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(model_dir):
    """The table of each case. Its student has seed 0, those who train have seed 2."""
    made = []
    for _, config in CASES:
        made.append(frozen_table(model_dir(seed=0), model_dir(seed=1), config))
        made[-1].weight_version[5] = -4  # the longest lag
    return made


@pytest.fixture(scope="module")
def of_one(paths, tables):
    """(learner after its updates, what they gave) of every case, by one rank."""
    made = []
    for (family, config), table in zip(CASES, tables):
        learner = new_learner(paths[family], config)
        made.append((learner, train(learner, table)))
    return made


@pytest.fixture(scope="module")
def next_of_one(paths, tables):
    """The metrics of one more update of the first case."""
    learner = new_learner(paths["qwen3"], CASES[0][1])
    train(learner, tables[0])
    return update(learner, tables[0], NEXT)


# ---- several -----------------------------------------------------------------------------------


def rank_main(rank, nodes, local, place, paths, tables, mailbox, checkpoint):
    """One of nodes * local ranks: every case, then an update from a checkpoint, then a save."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}/rendezvous",
        rank=rank,
        world_size=nodes * local,
        timeout=timedelta(seconds=60),  # ranks that are out of step fail, and do not hang
    )
    ranks = Ranks(rank, nodes * local, local)
    tables = [SimpleNamespace(**fields) for fields in tables]
    results = {"cases": [], "held": [], "parameters": []}
    for (family, config), table in zip(CASES, tables):
        learner = new_learner(paths[family], config, ranks)
        # Each is gathered for itself.
        assert all(isinstance(layer, FSDPModule) for layer in layers_of(learner.model))
        results["cases"].append(train(learner, table))
        results["held"].append(held(learner))
        results["parameters"].append([whole(p.detach()) for p in learner.parameters])
        if family == "qwen3" and "first" not in locals():
            first = learner
    if checkpoint:
        again = new_learner(str(checkpoint), CASES[0][1], ranks)
        again.load(checkpoint)
        results["next"] = update(again, tables[0], NEXT)
    if local > 1:
        check_bfloat16(paths, tables[-2], ranks, results["cases"][-2][0][0]["grad_norm"])
    if ranks.node == 0:
        first.publish(mailbox)
    torch.save(results, place / f"rank_{rank}")
    (place / f"pid_{rank}").write_text(str(os.getpid()))
    if ranks.node == 0:  # it saves alone, and the others are gone by then
        wait_until_gone(place, range(local, nodes * local))
        first.save(place, SimpleNamespace(save_pretrained=lambda path: None), [7])
        if rank > 0:  # its sockets are needed until the first has them all
            wait_until(lambda: (place / f"step_{STEPS}").exists())
    os._exit(0)  # without a word to the others


def held(learner):
    """Numbers that this rank has of parameters, gradients, first moments."""
    moments = [state["exp_avg"] for state in learner.optimizer.state.values()]
    kinds = (learner.parameters, [p.grad for p in learner.parameters], moments)
    return [sum(x.to_local().numel() for x in kind) for kind in kinds]


def check_bfloat16(paths, table, ranks, norm_in_float32):
    """Forward and backward pass in bfloat16, parameters and gradients in float32."""
    learner = new_learner(paths["qwen3"], CASES[-2][1], ranks, torch.bfloat16)
    dtypes = set()

    def spy(module, inputs, output):
        dtypes.add((inputs[0].dtype, output.dtype, module.gate_proj.weight.dtype))

    layers_of(learner.model)[0].mlp.register_forward_hook(spy)
    metrics = update(learner, table, UPDATES[0])
    assert dtypes == {(torch.bfloat16, torch.bfloat16, torch.bfloat16)}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in learner.parameters)
    assert abs(metrics["grad_norm"] / norm_in_float32 - 1) < 0.1


def wait_until(condition):
    deadline = time.monotonic() + 60.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def wait_until_gone(place, others):
    def are_gone():
        with suppress(FileNotFoundError, ValueError):  # not there yet, or empty
            return not any(alive(int((place / f"pid_{rank}").read_text())) for rank in others)

    wait_until(are_gone)


CONTINUED = {(2, 2): (1, 2), (3, 1): (2, 2)}  # (nodes, ranks) -> whose checkpoint they load


@pytest.fixture(scope="module")
def of_several(paths, tables, of_one, tmp_path_factory):
    """of_several(nodes, ranks) -> (results of every rank, mailbox, directory of the checkpoint)."""
    made = {}
    count = sum(p.numel() for p in of_one[0][0].parameters)
    small = builtin(batch_size=1, max_prompt_tokens=4, max_new_tokens=4)

    def get(nodes, local):
        if (nodes, local) not in made:
            before = CONTINUED.get((nodes, local))
            checkpoint = get(*before)[2] if before else None
            place = tmp_path_factory.mktemp(f"ranks_{nodes}_{local}")
            mailbox = Channel.create(small, count, torch.bfloat16)
            fields = [vars(table) for table in tables]
            arguments = (nodes, local, place, paths, fields, mailbox, checkpoint)
            mp.set_forkserver_preload(PRELOAD)
            world = nodes * local
            mp.start_processes(rank_main, arguments, nprocs=world, start_method="forkserver")
            results = [torch.load(place / f"rank_{rank}") for rank in range(world)]
            made[nodes, local] = results, mailbox, place / f"step_{STEPS}"
        return made[nodes, local]

    return get


def assert_same_metrics(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


FAMILIES = ("qwen3", "llama", "gemma3", "qwen3_moe")
PRELOAD = [  # what takes long to import: once for all ranks
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "transformers.models.auto.tokenization_auto",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
]
several = pytest.mark.parametrize(
    "nodes, local",
    [(2, 2)] + [pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((1, 2), (2, 1), (3, 1))],
)


@several
def test_ranks_and_nodes_make_the_updates_of_one_rank_for_every_loss(
    nodes, local, of_several, of_one
):
    """Also of experts that get no token on a rank, and of ranks that have no rows."""
    for results in of_several(nodes, local)[0]:
        for (family, config), found, (_, expected) in zip(CASES, results["cases"], of_one):
            for (metrics, gradient, bound), (metrics_of_one, gradient_of_one, bound_of_one) in zip(
                found, expected, strict=True
            ):
                assert_same_metrics(metrics, metrics_of_one)
                assert bound == pytest.approx(bound_of_one, rel=1e-4)
                assert ("m2po" in config.loss) == (0 < bound < inf)  # it cuts some samples
                scale = float(gradient_of_one.abs().max())
                what = f"{family} {config.loss}"
                close = dict(rtol=1e-3, atol=1e-5 * scale, msg=what)
                torch.testing.assert_close(gradient, gradient_of_one, **close)


@several
def test_the_copies_of_the_parameters_are_equal_to_the_last_bit(nodes, local, of_several):
    first, *others = (results["parameters"] for results in of_several(nodes, local)[0])
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert all(map(torch.equal, ours, theirs))


@several
def test_the_ranks_of_a_node_share_parameters_gradients_and_moments(
    nodes, local, of_several, of_one
):
    ranks = of_several(nodes, local)[0]
    for case, (learner, _) in enumerate(of_one):
        total = sum(p.numel() for p in learner.parameters)
        for node in range(nodes):
            own = [results["held"][case] for results in ranks[node * local :][:local]]
            for numbers in zip(*own):
                assert sum(numbers) == total and max(numbers) <= 1.1 * total / local


@several
def test_a_node_publishes_whole_parameters_in_order(nodes, local, of_several, of_one):
    (results, *_), mailbox, _ = of_several(nodes, local)
    parameters = results["parameters"][0]
    published = torch.zeros(mailbox.weights.shape[1], dtype=torch.bfloat16)
    assert mailbox.pick_up(published) == STEPS
    assert torch.equal(published, torch.cat([p.flatten() for p in parameters]).bfloat16())
    shapes = [p.shape for p in of_one[0][0].parameters]
    assert [p.shape for p in parameters] == shapes


@several
def test_node_0_saves_alone_and_any_number_of_nodes_and_ranks_continues(
    nodes, local, of_several, paths, tables, next_of_one
):
    """The ranks of the other nodes are gone when it saves."""
    ranks, _, checkpoint = of_several(nodes, local)
    alone = new_learner(str(checkpoint), CASES[0][1])
    alone.load(checkpoint)
    assert alone.version == STEPS
    assert_same_metrics(update(alone, tables[0], NEXT), next_of_one)
    continued = [results["next"] for results in ranks if "next" in results]
    assert len(continued) == ((nodes, local) in CONTINUED) * nodes * local
    for metrics in continued:
        assert_same_metrics(metrics, next_of_one)
