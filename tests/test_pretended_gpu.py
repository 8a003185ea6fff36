"""Claims about the GPU path, on a GPU that is not there: results, waits, captures, faults."""

import inspect
import sys
import textwrap

import pytest
import torch
from conftest import CPU, FAMILIES, corrected
from pretended_gpu import CUDA, host_of, pretended_gpu

from channel import Channel, read_rollout, write_prompt, write_rollout
from experiments.memory import shapes_of_steps
from generate import Generator
from kernels.head import CandidateLoss
from kv_cache import switch_to_slots
from learner import Learner, Student
from losses import make_loss
from model import flatten_parameters
from support.config import builtin
from support.load import load_model
from teacher import Teacher

VOCAB = 173
SIZES = dict(
    batch_size=5, max_prompt_tokens=12, max_new_tokens=8, micro_batch_tokens=40, head_chunk=7
)
LOSSES = {
    "forward_kl": builtin(loss="forward_kl", top_k=5, **SIZES),
    "sparse_reverse_kl": builtin(loss="sparse_reverse_kl", top_k=5, **SIZES),
    "sampled_reverse_kl": builtin(loss="sampled_reverse_kl", num_samples=3, **SIZES),
    "m2po": corrected("sampled_current_m2po", num_samples=3, temperature=0.7, **SIZES),
    "stratified_reverse_kl": builtin(top_k=5, **SIZES),
}
# Where the host may wait for the device: between steps, once a rollout, once a batch.
# Never in `decode` or a layer.
WAITS = {
    "generate.py:add to device",  # random numbers and counters of a new rollout
    "generate.py:prefill to device",
    "generate.py:step to host",  # the tokens of a step
    "generate.py:release to host",  # a finished rollout
    "generate.py:release to device",
    "model.py:response_hidden to device",
    "model.py:last_hidden _local_scalar_dense",  # transformers looks whether positions are packed
    "teacher.py:look_up to device",
    "teacher.py:look_up to host",
    "learner.py:<genexpr> to device",  # the candidates of a micro-batch
    "learner.py:forward to device",
    "learner.py:backward to device",  # whose teacher each position is
    "corrections.py:<listcomp> to host",  # M2PO
    "learner.py:update to host",  # the metrics of an update
    "learner.py:step to host",  # the gradient norm: for the check in clip_grad_norm_, and for us
    "learner.py:step _local_scalar_dense",
    "channel.py:publish to host",
    "channel.py:pick_up to device",
}


LOADING = ("load.py:", "kv_cache.py:", "config.py:require ")  # these look at their own results


def prompts():
    return [
        torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in (3, 9, 1, 7, 12)
    ]


def roles(config, paths, device, dtype):
    """Every role once, on one table; what they wrote, and the learner's metrics."""
    sampler = load_model(paths[0], dtype, device)
    switch_to_slots(sampler, config.max_sequence)
    teacher = Teacher(load_model(paths[1], dtype, device), config, VOCAB)
    learner = Learner(load_model(paths[0], torch.float32, device), config, VOCAB, dtype)
    flat = flatten_parameters(sampler)
    table = Channel.create(config, flat.numel(), dtype)
    for row, ids in enumerate(prompts()):
        write_prompt(table, row, ids, ids)
        table.ticket[row] = row
    rows = list(range(5))
    generator = Generator(sampler, make_loss(config), config, {1}, VOCAB, 3)
    for rollout in generator.generate([read_rollout(table, row) for row in rows]):
        write_rollout(table, rollout)
    teacher.score(table, rows)
    metrics = learner.update(table, rows)
    learner.publish(table)
    assert table.pick_up(flat) == 1
    assert device == CPU or set() < set(generator.graphs) <= set(shapes_of_steps(3))
    found = {
        name: getattr(table, name).clone()
        for name in ("tokens", "length", "candidate_ids", "behavior_logp", "teacher_logp")
    }
    return (
        found
        | {"weights": host_of(flat)}
        | {name: torch.tensor(float(value)) for name, value in metrics.items()}
    )


def on_gpu(config, paths, dtype=torch.float32):
    with pretended_gpu() as gpu:
        found = roles(config, paths, CUDA, dtype)
    return found, {wait for wait in gpu.waits if not wait.startswith(LOADING)}


@pytest.fixture(scope="module")
def paths(model_dir):
    return {family: (model_dir(family), model_dir(family, seed=1)) for family in FAMILIES}


@pytest.mark.parametrize(
    "family, loss",
    [("qwen3", name) for name in LOSSES]
    + [(family, "stratified_reverse_kl") for family in FAMILIES[1:]],
)
def test_every_role_gives_what_it_gives_on_the_cpu_and_waits_only_where_it_may(family, loss, paths):
    config = LOSSES[loss]
    expected = roles(config, paths[family], CPU, torch.float32)
    found, waits = on_gpu(config, paths[family])
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert waits <= WAITS, waits - WAITS


@pytest.mark.parametrize("loss", ["forward_kl", "stratified_reverse_kl"])
def test_bfloat16_differs_by_its_rounding(loss, paths):
    config = LOSSES[loss]
    found, waits = on_gpu(config, paths["qwen3"], torch.bfloat16)
    assert abs(float(found["drift_kl"])) < 0.1  # sampler and learner, without lag
    assert all(value.isfinite().all() for value in found.values() if value.is_floating_point())
    assert waits <= WAITS, waits - WAITS


# ---- planted faults: each must be seen -----------------------------------------------------------


def plant(monkeypatch, owner, name, old, new):
    """Change the source of one function."""
    function = inspect.getattr_static(owner, name)
    is_static = isinstance(function, staticmethod)
    source = (
        textwrap.dedent(inspect.getsource(function.__func__ if is_static else function))
        .replace("@staticmethod\n", "")
        .replace("@torch.no_grad()\n", "")
    )
    assert source.count(old) == 1, f"{old!r} is not in {name}"
    namespace = dict(vars(sys.modules[owner.__module__]))
    exec(source.replace(old, new), namespace)
    monkeypatch.setattr(
        owner, name, staticmethod(namespace[name]) if is_static else namespace[name]
    )


FAULTS = {
    "an index on the host": (
        Generator,
        "decode",
        "torch.arange(active, device=self.device)",
        "torch.arange(active)",
        "index on the host while a graph is captured",
    ),
    "an item in the step": (
        Generator,
        "decode",
        "position.add_(1)",
        "position.add_(1 + 0 * int(slots[0]))",
        "_local_scalar_dense while a graph is captured",
    ),
    "a tensor of a capture used after it": (
        Generator,
        "decode",
        "self.last_token[:active] = ids[:, 0]",
        "self.last_token = torch.cat([ids[:, 0], self.last_token[active:]])",
        None,
    ),
    "a missing cast": (
        CandidateLoss,
        "forward",
        "compute_weight = weight.to(hidden.dtype)",
        "compute_weight = weight",
        "dtypes of a product|same dtype",
    ),
    "a tensor on the host for a kernel": (
        Student,
        "forward",
        "ids.long()",
        "ids.long().cpu()",
        "on both devices|index on the host",
    ),
    "float64 left over": (Student, "forward", ".to(self.dtype)", ".double()", "in float64"),
    "a state that a capture changes": (
        Generator,
        "replay",
        "graph = torch.cuda.CUDAGraph()",
        "graph = torch.cuda.CUDAGraph(); self.r.add_(1)",
        None,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, paths, monkeypatch):
    owner, name, old, new, message = FAULTS[fault]
    config = LOSSES["stratified_reverse_kl"]
    if message:  # it is refused
        plant(monkeypatch, owner, name, old, new)
        dtype = torch.bfloat16 if fault == "a missing cast" else torch.float32
        with pytest.raises((AssertionError, RuntimeError, ValueError), match=message):
            on_gpu(config, paths["qwen3"], dtype)
        return
    expected = roles(config, paths["qwen3"], CPU, torch.float32)
    plant(monkeypatch, owner, name, old, new)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        found, _ = on_gpu(config, paths["qwen3"])
        torch.testing.assert_close(found["tokens"], expected["tokens"])
