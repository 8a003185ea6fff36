"""Claims about experiments/count.py: kernels and bytes, counted on fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments import count, splits
from experiments.count import counted, counting
from support.config import builtin


def test_an_operator_is_one_kernel_and_a_view_is_none():
    with FakeTensorMode(), counting() as found:
        x = torch.empty(4, 8)
        y = x.t().reshape(8, 4)[:2].unsqueeze(0)
        (y * 2.0).sum()  # reads and writes 2 * 4 floats, then reads them and writes one
        torch.empty(100, 8)[torch.zeros(3, dtype=torch.int64)]  # three rows of the table
    assert found.names == {"mul": 1, "sum": 1, "zeros": 1, "index": 1}
    assert found.bytes == 4 * (8 + 8 + 8 + 1) + 3 * 8 + (3 * 8 + 2 * 3 * 8 * 4)


def test_layers_of_one_kind_cost_the_same(tmp_path, monkeypatch):
    """So nothing grows with what came before, and a norm, attention, a loss are one kernel."""
    launches = {}
    for layers in (1, 2, 5):
        shape = (64, layers, 128, 4, 2, 16, True)
        monkeypatch.setitem(splits.SHAPES, "tiny", shape)
        path = splits.write_config(tmp_path / str(layers), "tiny")
        found = counted(path, builtin())
        launches[layers] = [x.launches for x in (found.step, found.scoring, found.training)]
    one = [b - a for a, b in zip(launches[1], launches[2])]
    assert [b - a for a, b in zip(launches[2], launches[5])] == [3 * x for x in one]
    # A decode step: 7 products, 4 norms, 1 attention, 2 index_put and their arange, rotary
    # embeddings (14), residuals (2), activation (2).
    assert one[0] < 35


def test_a_norm_that_is_not_fused_is_eight_kernels(tmp_path, monkeypatch):
    monkeypatch.setitem(splits.SHAPES, "tiny", (64, 2, 128, 4, 2, 16, True))
    path = splits.write_config(tmp_path, "tiny")
    fused = counted(path, builtin())
    counted.cache_clear()
    monkeypatch.setattr(count, "plain_norms", lambda settings: set())
    plain = counted(path, builtin())
    counted.cache_clear()
    norms = 2 * 4 + 1
    assert plain.step.launches - fused.step.launches == pytest.approx(7 * norms, abs=2 * norms)
    assert plain.training.bytes > fused.training.bytes


def test_a_mixture_of_experts_counts_as_the_dense_model_that_a_token_sees(tmp_path):
    settings = count.settings_of(splits.write_config(tmp_path, "30B-A3B"))
    assert settings.intermediate_size == 8 * 768
    assert settings.mlp_only_layers == list(range(48))
