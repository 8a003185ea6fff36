"""Claims about the chunked LM head: exact gradients of every loss, [N,V] logits never held."""

import pytest
import torch
from conftest import LOSS_CONFIGS, label

from kernels.head import candidate_loss, gather, logit_chunks
from losses import make_loss

N, D, V = 41, 13, 127


def problem(config, dtype, rows=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = make_loss(config).num_columns
    hidden = torch.randn(rows, D, dtype=dtype, generator=generator)
    weight = torch.randn(V, D, dtype=dtype, generator=generator) * 0.5
    # Few ids: they repeat within a row.
    ids = torch.randint(0, 9, (rows, columns), generator=generator)
    t = torch.randn(rows, columns, dtype=dtype, generator=generator) - 3
    b = (hidden @ weight.t()).log_softmax(-1).gather(1, ids) + 0.2 * torch.randn(
        rows, columns, dtype=dtype, generator=generator
    )
    return hidden.requires_grad_(), weight.requires_grad_(), ids, t, b


def new_loss(config):
    loss = make_loss(config)
    loss.m2_bound = 0.02
    return loss


def dense(config, hidden, weight, ids, t, b, scale):
    """The definition, on full logits, by autograd."""
    s = (scale * hidden @ weight.t()).log_softmax(-1).gather(1, ids)
    return new_loss(config).value(s, t, b).sum()


def chunked(config, hidden, weight, ids, t, b, scale, chunk):
    return candidate_loss(hidden, weight, ids, t, b, new_loss(config), scale, chunk)[0]


@pytest.mark.parametrize("config", LOSS_CONFIGS, ids=label)
def test_loss_and_gradients_equal_float64_autograd_on_dense_logits(config):
    hidden, weight, *rest = problem(config, torch.float64)
    expected = torch.autograd.grad(
        3.0 * dense(config, hidden, weight, *rest, 0.8), (hidden, weight)
    )
    for chunk in (1, 16, 1000):
        total = chunked(config, hidden, weight, *rest, 0.8, chunk)
        torch.testing.assert_close(
            total, dense(config, hidden, weight, *rest, 0.8), rtol=1e-12, atol=1e-12
        )
        actual = torch.autograd.grad(3.0 * total, (hidden, weight))
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", LOSS_CONFIGS[:3] + LOSS_CONFIGS[-1:], ids=label)
def test_float32_error_is_no_larger_than_plain_torchs_own(config):
    exact = problem(config, torch.float64)
    reference = torch.autograd.grad(dense(config, *exact, 1.0), exact[:2])
    single = [
        x.detach().float().requires_grad_() if i < 2 else x if i == 2 else x.float()
        for i, x in enumerate(exact)
    ]
    plain = torch.autograd.grad(dense(config, *single, 1.0), single[:2])
    ours = torch.autograd.grad(chunked(config, *single, 1.0, 16), single[:2])
    for e, p, o in zip(reference, plain, ours):
        assert (o - e).norm() <= 1.5 * (p - e).norm() + 1e-7 * e.norm()


def test_gradcheck_in_float64():
    config = LOSS_CONFIGS[0]
    hidden, weight, ids, t, b = problem(config, torch.float64, rows=5)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked(config, h, w, ids, t, b, 1.3, 2),
        (hidden, weight[:20].detach().requires_grad_()),
    )


def test_no_positions_give_zero_loss_and_zero_gradients_with_a_connected_graph():
    hidden, weight, *rest = problem(LOSS_CONFIGS[0], torch.float32, rows=0)
    total = chunked(LOSS_CONFIGS[0], hidden, weight, *rest, 1.0, 8)
    total.backward()
    assert total == 0 and hidden.grad.shape == (0, D) and (weight.grad == 0).all()


def test_half_precision_hidden_states_give_float32_log_probabilities():
    hidden, weight, *_ = problem(LOSS_CONFIGS[0], torch.float32)
    for _, logits in logit_chunks(hidden.detach().bfloat16(), weight.detach().bfloat16(), 1.0, 16):
        assert logits.dtype == torch.float32
        logp, _ = gather(logits, torch.arange(V).expand(len(logits), V))
        assert logp.dtype == torch.float32 and (logp.exp().sum(-1) - 1).abs().max() < 1e-5


def test_no_tensor_of_positions_by_vocabulary_is_ever_made():
    """Every tensor an operator returns is watched; the largest logits are one chunk's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == V:
                self.largest = max(self.largest, out.numel())
            return out

    config = LOSS_CONFIGS[-1]
    hidden, weight, *rest = problem(config, torch.float32, rows=200)
    with Watch() as watch:
        chunked(config, hidden, weight, *rest, 1.0, 16).backward()
    assert watch.largest == 16 * V
