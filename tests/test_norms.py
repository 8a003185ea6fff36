"""Claims about RMSNorm in one kernel (model.fuse_norms): which modules, which numbers."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, FAMILIES, load
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated

from model import fuse_norms, last_hidden
from support.load import load_model


def drawn(kind, size=64, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    norm = kind(size, eps=1e-6, **kwargs)
    norm.weight.data = 1 + 0.3 * torch.randn(size)
    return norm.to(dtype)


def is_fused(norm):
    fuse_norms(norm)
    return "forward" in vars(norm)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, Gemma4RMSNorm])
def test_a_plain_norm_is_fused_and_keeps_its_numbers_to_the_last_bit_and_its_gradients(kind):
    norm = drawn(kind)
    x = 3 * torch.randn(5, 7, 64)

    def run():
        norm.zero_grad()
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        (out**3).sum().backward()
        return out, leaf.grad, norm.weight.grad.clone()

    expected = run()
    assert is_fused(norm)
    found = run()
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found[1:], expected[1:]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3, 50.0, 1e4])
@pytest.mark.parametrize("kind", [Gemma3RMSNorm, Qwen3_5RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_that_scales_by_1_plus_weight_keeps_its_own(kind, weight, dtype):
    """With weights of 50 the difference is 2 %, within what bfloat16 models are compared by."""
    norm = drawn(kind, dtype=dtype)
    norm.weight.data.fill_(weight)
    assert not is_fused(norm)


class GatedRMSNorm(nn.Module):
    """Named and equipped like a plain one; scales by a sigmoid of its input's mean."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6) * x.mean().sigmoid()


@pytest.mark.parametrize("kind", [CohereLayerNorm, Qwen3_5RMSNormGated, GatedRMSNorm])
def test_what_only_looks_like_a_plain_norm_keeps_its_own(kind):
    """All have `weight` and `variance_epsilon`."""
    norm = drawn(kind)
    assert hasattr(norm, "variance_epsilon") and not is_fused(norm)


def test_a_norm_that_accelerate_has_placed_keeps_its_hook():
    norm = drawn(LlamaRMSNorm)
    norm._hf_hook = object()
    assert not is_fused(norm)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_kernel_gets_one_dtype_and_no_autocast(kind, autocast, monkeypatch):
    """A float32 weight beside a bfloat16 input falls back to eight kernels (pytorch 167308), and
    autocast casts rms_norm to float32 since torch 2.12 (188955)."""
    seen = []

    def recorded(x, shape, weight, eps):
        seen.append((x.dtype, weight.dtype, torch.is_autocast_enabled("cpu")))
        return plain(x, shape, weight, eps)

    plain = F.rms_norm
    norm = drawn(LlamaRMSNorm)
    assert is_fused(norm)
    monkeypatch.setattr(F, "rms_norm", recorded)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert norm(torch.randn(2, 64, dtype=kind)).dtype == kind
    assert seen == [(kind, kind, False)]


def test_in_bfloat16_it_is_nearer_to_the_exact_value_than_transformers():
    norm = drawn(Qwen3RMSNorm, 1024, torch.bfloat16)
    x = (3 * torch.randn(512, 1024)).bfloat16()
    scale = x.double().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
    exact = x.double() * scale * norm.weight.double()

    @torch.no_grad()
    def error():
        return float((norm(x).double() - exact).norm() / exact.norm())

    before = error()
    assert is_fused(norm)
    assert error() < 0.9 * before < 0.003


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_has_its_numbers_with_fused_norms(family, model_dir):
    model = load(model_dir(family))
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, 1.0, 0.3)
    ids = torch.arange(5, 25)[None]
    expected = last_hidden(model, ids)
    fuse_norms(model)
    torch.testing.assert_close(last_hidden(model, ids), expected, rtol=1e-6, atol=1e-6)
    fused = {type(m).__name__ for m in model.modules() if "forward" in vars(m)}
    known = {"qwen3": {"Qwen3RMSNorm"}, "gemma3": set(), "qwen3_5": set()}
    assert fused == known.get(family, fused) and (fused or family in known)


def test_on_a_cpu_the_norms_stay(model_dir):
    model = load_model(model_dir("qwen3"), torch.float32, CPU)
    assert not any("forward" in vars(m) for m in model.modules())
