"""Claims about the Triton kernels, in Triton's interpreter or, where there is one, on a GPU."""

import json
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy
import pytest
import torch
import triton.language as tl
from conftest import CORRECTED, LOSS_CONFIGS, ROOT, SHIPPED, corrected, label
from frozen import ROWS
from test_learner import new_learner, stale_table
from triton.runtime import interpreter

import losses
from kernels import fused_loss, head
from kernels.head import candidate_loss, gather
from kernels.terms import TERMS, given
from losses import make_loss
from support.config import builtin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, D, V = 19, 13, 1271


@pytest.fixture
def triton_path(monkeypatch):
    """Switch to the kernels; float64 stays plain torch, as on a GPU."""

    def switch(on: bool = True):
        monkeypatch.setattr(head, "uses_triton", lambda x: on and x.dtype != torch.float64)

    switch()
    return switch


@pytest.fixture(autouse=True)
def round_like_hardware(monkeypatch):
    """Triton 3.7's interpreter cuts float32 to bfloat16; compiled kernels round to nearest even."""
    if DEVICE == "cuda":
        return
    original = interpreter._convert_float

    def convert(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            bits = data.view(numpy.uint32)
            # Rounded here, then cut by `original`.
            bits = bits + numpy.uint32(0x7FFF) + ((bits >> 16) & numpy.uint32(1))
            data = bits.view(numpy.float32)
        return original(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def problem(config, positions=N, vocab=V, seed=0, different_ids=9):
    """float64 hidden, weight, ids, t, b. Few different ids, so that they repeat within a row."""
    generator = torch.Generator().manual_seed(seed)
    columns = make_loss(config).num_columns
    hidden = torch.randn(positions, D, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab, D, dtype=torch.float64, generator=generator) * 0.5
    ids = torch.randint(0, different_ids, (positions, columns), generator=generator) * (
        (vocab - 1) // max(1, different_ids - 1)
    )
    t = torch.randn(positions, columns, dtype=torch.float64, generator=generator) - 3
    b = (hidden @ weight.t()).log_softmax(-1).gather(1, ids) + 0.2 * torch.randn(
        positions, columns, dtype=torch.float64, generator=generator
    )
    return [x.to(DEVICE) for x in (hidden, weight, ids, t, b)]


def new_loss(config):
    loss = make_loss(config)
    loss.m2_bound = 0.02
    return loss


def run(config, hidden, weight, ids, t, b, scale=1.0, chunk=8, upstream=1.0):
    """Loss, gradients of hidden and weight, student_logp; weight is a float32 master."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    total, student_logp = candidate_loss(hidden, weight, ids, t, b, new_loss(config), scale, chunk)
    return total.detach(), *torch.autograd.grad(upstream * total, (hidden, weight)), student_logp


def single(problem, hidden_dtype=torch.float32):
    hidden, weight, ids, t, b = problem
    return [hidden.to(hidden_dtype), weight.float(), ids, t.float(), b.float()]


def assert_no_worse_than_torch(config, inputs, triton_path, **options):
    """No larger error than plain torch's at the same precision, against float64."""
    reference = run(
        config, *[x.double() if x.is_floating_point() else x for x in inputs], **options
    )
    triton_path(False)
    plain = run(config, *inputs, **options)
    triton_path(True)
    ours = run(config, *inputs, **options)
    s = reference[3].detach().requires_grad_()
    new_loss(config).value(s, *(x.double() for x in inputs[3:])).sum().backward()
    c = s.grad.abs()  # terms of both signs: loss and gradients may be smaller than these
    hidden, weight = (x.double().norm(dim=-1).max() for x in inputs[:2])
    terms = {
        "loss": (c * s.abs()).sum(),
        "grad_hidden": c.sum() * weight,
        "grad_weight": c.sum() * hidden,
        "student_logp": 0.0,
    }
    for name, e, p, o in zip(
        ("loss", "grad_hidden", "grad_weight", "student_logp"), reference, plain, ours
    ):
        assert o.dtype == p.dtype, name
        scale = max(e.norm(), terms[name])
        # 1e-6: a log-probability of -8 in float32.
        assert (o - e).norm() <= 1.5 * (p - e).norm() + 1e-6 * scale, name


GIVEN = [corrected(f"sampled_{name}", num_samples=4) for name in ("current_m2po", "rollout_ppo")]


@pytest.mark.parametrize("config", SHIPPED + GIVEN, ids=label)
def test_loss_and_gradients_are_as_exact_as_plain_torch(config, triton_path):
    assert_no_worse_than_torch(
        config, single(problem(config)), triton_path, scale=0.8, upstream=3.0
    )


@pytest.mark.parametrize("config", [LOSS_CONFIGS[0], LOSS_CONFIGS[1], LOSS_CONFIGS[-1]], ids=label)
def test_bfloat16_hidden_states_are_no_worse_and_their_gradient_fills_half_the_rows(
    config, triton_path
):
    assert_no_worse_than_torch(
        config, single(problem(config), torch.bfloat16), triton_path, scale=1.0, upstream=0.5
    )


@pytest.mark.parametrize("vocab", [2, 37, 256, 5000, 20011])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_vocabularies_that_divide_by_nothing(vocab, hidden_dtype, triton_path):
    """From below one block to several, the last one partly filled."""
    config = LOSS_CONFIGS[-1]
    assert_no_worse_than_torch(
        config,
        single(
            problem(config, positions=3, vocab=vocab, different_ids=min(vocab, 9)), hidden_dtype
        ),
        triton_path,
    )


@pytest.mark.parametrize("candidates", [1, 2, 31, 33, 100, 256])
@pytest.mark.parametrize(
    "loss", ["forward_kl", "sparse_reverse_kl", "sampled_reverse_kl", "stratified_reverse_kl"]
)
def test_from_1_to_256_candidates_repeated_ids_add_up(loss, candidates, triton_path):
    config = builtin(loss=loss, top_k=candidates, num_samples=candidates)
    for different_ids in (1, 50):
        assert_no_worse_than_torch(
            config, single(problem(config, positions=3, different_ids=different_ids)), triton_path
        )


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_exact_one_of_the_logits_as_rounded(
    logits_dtype, triton_path, monkeypatch
):
    """Whatever the logits were rounded to, the gradient's own rounding is the only error since."""
    monkeypatch.setattr(head, "LOGITS_DTYPE", logits_dtype)
    config = LOSS_CONFIGS[-1]
    hidden, weight, ids, t, b = single(problem(config), torch.bfloat16)
    logits = head.head_logits(hidden, weight.bfloat16(), 1.0)
    assert logits.dtype == logits_dtype
    z = logits.double().requires_grad_()
    s = z.log_softmax(-1).gather(1, ids)
    (expected,) = torch.autograd.grad(make_loss(config).value(s, t.double(), b.double()).sum(), z)
    _, student_logp, gradient = head.loss_and_gradient(
        make_loss(config), logits, ids, t, b, torch.bfloat16
    )
    assert gradient.dtype == torch.bfloat16 and gradient.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(student_logp.double(), s.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-8, atol=1e-6)


def test_log_probabilities_of_the_kernel_and_of_the_gather_are_no_worse_than_torch(triton_path):
    """The teacher uses the gather, the loss the kernel."""
    hidden, weight, ids, t, b = problem(LOSS_CONFIGS[0])
    exact, _ = gather(hidden @ weight.t(), ids)
    logits = head.head_logits(hidden.float(), weight.float())
    ours, _ = gather(logits, ids)
    plain = (hidden.float() @ weight.float().t()).log_softmax(-1).gather(1, ids)
    _, fused, _ = head.loss_and_gradient(
        new_loss(LOSS_CONFIGS[0]), logits, ids, t.float(), b.float(), torch.float32
    )
    for found in (ours, fused):
        assert (found - exact).norm() <= 1.5 * (plain - exact).norm() + 2e-7 * exact.norm()


def test_logits_of_any_size_neither_overflow_nor_vanish():
    """A running maximum in every lane: rows that rise, fall, or hold one huge logit."""
    z = torch.linspace(-300, 300, 40_000, device=DEVICE)
    logits = torch.stack([z, z.flip(0), torch.full_like(z, -1e4), torch.full_like(z, -1e30)])
    logits[3, 39_999] = 50.0
    ids = torch.tensor([[0, 39_999]], device=DEVICE).expand(4, 2).contiguous()
    expected = logits.double().log_softmax(-1).gather(1, ids)
    x = torch.zeros(4, 2, device=DEVICE)
    _, student_logp, _ = fused_loss.fused_loss(given, logits, ids, x, x, torch.float32, 0, 0)
    torch.testing.assert_close(student_logp.double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.skipif(
    DEVICE == "cuda", reason="tiny models on the CPU; tests/test_gpu.py trains on the GPU"
)
def test_the_learner_reaches_the_kernels_by_itself(triton_path, model_dir, monkeypatch):
    """An update through them equals the one in plain torch, for every loss that is shipped."""
    m2po = corrected("sampled_current_m2po", num_samples=4)
    for config in (LOSS_CONFIGS[0], LOSS_CONFIGS[1], LOSS_CONFIGS[2], LOSS_CONFIGS[-1], m2po):
        triton_path(False)
        table = stale_table(model_dir, config)
        plain = new_learner(model_dir(seed=2), config).update(table, ROWS[:3])
        triton_path(True)
        calls, original = [], head.fused_loss
        with monkeypatch.context() as patch:
            patch.setattr(
                head, "fused_loss", lambda *args: calls.append(args[0]) or original(*args)
            )
            ours = new_learner(model_dir(seed=2), config).update(table, ROWS[:3])
        assert set(calls) == {TERMS.get(type(make_loss(config)), given)}
        for key in plain:
            assert ours[key] == pytest.approx(plain[key], rel=1e-4, abs=1e-6), (label(config), key)


def test_the_kernel_knows_the_four_losses_of_the_core_and_no_others():
    """Each by its very class."""
    assert set(TERMS) == {
        losses.ForwardKL,
        losses.SparseReverseKL,
        losses.SampledReverseKL,
        losses.StratifiedReverseKL,
    }
    assert not any(type(make_loss(corrected(name))) in TERMS for name in CORRECTED)


def test_a_loss_that_inherits_from_one_with_a_kernel_trains_its_own_value(triton_path, monkeypatch):
    """On a GPU its parent's terms would be trained, if a subclass counted as its parent."""

    class Twice(losses.StratifiedReverseKL):
        def value(self, s, t, b):
            return 2 * super().value(s, t, b)

    monkeypatch.setitem(losses.LOSSES, "twice", Twice)
    calls, original = [], head.fused_loss
    monkeypatch.setattr(head, "fused_loss", lambda *args: calls.append(args[0]) or original(*args))
    parent = LOSS_CONFIGS[-1]
    inputs = single(problem(parent))
    expected = run(parent, *inputs)
    found = run(builtin(loss="twice", top_k=5, num_samples=3), *inputs)
    assert set(calls[:3]) == {TERMS[losses.StratifiedReverseKL]} and set(calls[3:]) == {given}
    for ours, of_parent in zip(found[:3], expected):
        torch.testing.assert_close(ours, 2 * of_parent, rtol=1e-4, atol=1e-5)


def test_a_loss_may_have_any_derivative(triton_path):
    """Autograd hands out an expanded tensor here, whose rows are no memory of their own."""
    logits = torch.randn(5, 30, device=DEVICE)
    ids = torch.tensor([[3, 7]], device=DEVICE).expand(5, 2).contiguous()
    x = torch.zeros(5, 2, device=DEVICE)
    loss = SimpleNamespace(value=lambda s, t, b: (s - t).sum(-1))
    gradients = []
    for on in (True, False):
        triton_path(on)
        gradients.append(head.unfused_loss(loss, logits.clone(), ids, x, x, torch.float32)[2])
    expected = -2 * logits.softmax(-1)
    expected[:, [3, 7]] += 1
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


# The interpreter computes what tl.where then discards.
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_column_without_loss_may_be_impossible(triton_path):
    """-inf logits of the emitted token do not reach the loss: 0 * inf would be NaN."""
    for config in (LOSS_CONFIGS[1], LOSS_CONFIGS[-1]):
        hidden, weight, ids, t, b = single(problem(config, different_ids=50))
        ids = torch.arange(ids.shape[1], device=DEVICE).expand_as(ids).contiguous()
        logits = head.head_logits(hidden, weight, 1.0)
        logits[:, 0] = float("-inf")
        loss, _, gradient = head.loss_and_gradient(
            make_loss(config), logits, ids, t, b, torch.float32
        )
        assert loss.isfinite().all() and gradient.isfinite().all() and (gradient[:, 0] == 0).all()


def test_one_chunk_of_logits_at_a_time(triton_path, monkeypatch):
    """When a chunk's logits are made, the last chunk's are gone."""
    made, original = [], head.head_logits

    def watch(*args):
        assert not [ref for ref in made if ref() is not None]
        logits = original(*args)
        made.append(weakref.ref(logits.untyped_storage()))
        return logits

    monkeypatch.setattr(head, "head_logits", watch)
    config = LOSS_CONFIGS[-1]
    hidden, weight, ids, t, b = single(problem(config))
    # The interpreter keeps a reference to its last arguments.
    modes = (True, False) if DEVICE == "cuda" else (False,)
    for on in modes:
        triton_path(on)
        run(config, hidden, weight, ids, t, b, chunk=8)
    assert len(made) == len(modes) * 3


def test_what_a_kernel_cannot_take_is_refused(triton_path):
    """Its rows lie one after the other, and a gradient fits into the memory of its logits."""
    logits, ids = torch.zeros(4, 4, device=DEVICE), torch.zeros(4, 2, device=DEVICE).long()
    x = torch.zeros(4, 2, device=DEVICE)
    for bad in (logits.t(), logits.bfloat16()):
        with pytest.raises(AssertionError):
            fused_loss.fused_loss(given, bad, ids, x, x, torch.float32, 0, 0)


def test_candidates_that_are_no_memory_of_their_own_are_copied(triton_path):
    logits = torch.randn(4, 8, device=DEVICE)
    ids, t = (
        torch.tensor([[3, 7]], device=DEVICE).expand(4, 2),
        torch.randn(2, 4, device=DEVICE).t(),
    )
    found = fused_loss.fused_loss(given, logits.clone(), ids, t, t, torch.float32, 0, 0)
    expected = fused_loss.fused_loss(
        given,
        logits.clone(),
        ids.contiguous(),
        t.contiguous(),
        t.contiguous(),
        torch.float32,
        0,
        0,
    )
    assert all(map(torch.equal, found, expected))


ARCHITECTURES = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_ahead_of_time_and_spills_nothing(arch, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "compile_kernels.py", str(arch)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("forward_kl", "sparse_reverse_kl", "sampled_reverse_kl", "given"):
        assert any(
            line.startswith(f"loss_kernel {name}") and f"sm_{arch}" in line
            for line in result.stdout.splitlines()
        )
    assert f"decode_kernel 2 128 128 sm_{arch} *bf16" in result.stdout


def test_triton_launches_every_kernel_on_an_h100_that_is_not_there(tmp_path):
    """Its own binder, specialisation, compiler and assembler (launch_kernels.py)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "launch_kernels.py"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    launched = {found.pop("name"): found for found in map(json.loads, result.stdout.splitlines())}
    # Terms; C, first, first_draw. An integer that is 1 becomes a constant.
    losses = {
        "forward_kl": ("forward_kl", [17, 1, 17], {"first"}),
        "sparse_reverse_kl": ("sparse_reverse_kl", [17, 1, 17], {"first"}),
        "sampled_reverse_kl": ("sampled_reverse_kl", [16, 0, 0], set()),
        "one sample": ("sampled_reverse_kl", [1, 0, 0], {"C"}),
        "stratified_reverse_kl": ("sampled_reverse_kl", [33, 1, 17], {"first"}),
        "given": ("given", [4, 0, 0], set()),
    }
    for name, (terms, columns, ones) in losses.items():
        found = launched[name]
        constants = {"TERMS", "LANES", "CANDIDATES"} | ones
        numbers = [found["numbers"][key] for key in ("C", "first", "first_draw")]
        assert (found["kernel"], found["terms"], numbers) == ("loss_kernel", terms, columns), name
        assert set(found["constants"]) == constants, name
        assert found["grid"] == [3, 1, 1] and found["warps"] == 32
    # L, window, and what is padded: G to 16 rows, E and D to a power of two; keys of a block.
    steps = {
        "bfloat16": [2560, 2560, 16, 128, 128, 64],
        "float32": [2560, 2560, 16, 128, 128, 32],
        "odd sizes": [2561, 100, 16, 128, 128, 64],
        "window of 16s": [2560, 1024, 16, 256, 256, 32],
        "window of 1": [2560, 1, 16, 256, 256, 32],
        "narrow values": [2560, 2560, 16, 256, 128, 32],
    }
    for name, expected in steps.items():
        found = launched[name]
        padded = {"ROWS", "KEY_WIDTH", "VALUE_WIDTH", "BLOCK"}
        numbers = found["numbers"]
        keys = ("L", "window", "ROWS", "KEY_WIDTH", "VALUE_WIDTH", "BLOCK")
        assert [numbers[key] for key in keys] == expected, name
        one = {"window"} if name == "window of 1" else set()
        assert set(found["constants"]) == {"G", "E", "D", "PRECISION"} | padded | one, name
        assert found["kernel"] == "decode_kernel" and found["grid"] == [3, 8, 1]
    assert launched.keys() == losses.keys() | steps.keys()
    for name, found in launched.items():
        assert bytes.fromhex(found["binary"]) == b"\x7fELF" and found["compiled_again"] == 0
        assert found["same_memory"] == [True] * 3 and found["target"] == 90, name


def test_peak_memory_grows_with_the_chunk_not_with_the_positions():
    """Highest resident size of a process of its own (ru_maxrss would begin with its parent's).

    Full logits of 8,192 positions would take 256 MiB, a chunk's take 8 and 64.
    """
    code = r"""
import re, torch
from kernels.head import candidate_loss
from losses import make_loss
from support.config import builtin
torch.set_num_threads(1)
def peak(positions, chunk):
    hidden = torch.randn(positions, 8, requires_grad=True)
    weight = torch.randn(8192, 8, requires_grad=True)
    ids, x = torch.randint(0, 8192, (positions, 4)), torch.full((positions, 4), -5.0)
    loss = make_loss(builtin(loss="sampled_reverse_kl"))
    candidate_loss(hidden, weight, ids, x, x, loss, 1.0, chunk)[0].backward()
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
print(peak(1024, 256), peak(8192, 256), peak(8192, 2048))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    few, many, large_chunk = map(float, result.stdout.split())
    assert many - few < 32, result.stdout
    assert large_chunk - many > 40, result.stdout
