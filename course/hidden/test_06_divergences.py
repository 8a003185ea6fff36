"""Hidden tests of exercise 6."""

import math

import torch

import tiny
from claims import check, close, worth
from test_06_divergences import tables

LOSSES = ("forward_kl", "sparse_reverse_kl")


def by_hand(loss: str, s, t):
    """(value [T], dL/ds [T,C]) in plain Python; column 0 carries none."""
    values, slopes = [], []
    for s_row, t_row in zip(s.tolist(), t.tolist()):
        value, c = 0.0, [0.0]
        for one, other in zip(s_row[1:], t_row[1:]):
            if loss == "forward_kl":
                value += math.exp(other) * (other - one)
                c.append(-math.exp(other))
            else:
                value += math.exp(one) * (one - other)
                c.append(math.exp(one) * (one - other + 1))
        values.append(value)
        slopes.append(c)
    return torch.tensor(values, dtype=s.dtype), torch.tensor(slopes, dtype=s.dtype)


def check_loss(student, loss: str, s, t, b, tolerance: float = 1e-5):
    value, c = student.loss_and_gradient(loss, {"top_k": s.shape[1] - 1}, s, t, b)
    right, right_c = by_hand(loss, s, t)
    close(value, right, f"{loss} of each position", tolerance)
    close(c, right_c, f"dL/ds of {loss}", tolerance)


@worth(1)
def test_forward_kl_of_a_truncated_support(student):
    """Forward KL and its derivative at other sizes; each position has a value of its own."""
    for seed, (positions, vocab, top) in enumerate([(1, 3, 1), (4, 30, 8), (9, 12, 11)]):
        _, s, t, b, _ = tables(seed, top, positions, vocab)
        check_loss(student, "forward_kl", s.detach(), t, b)


@worth(1)
def test_sparse_reverse_kl_of_a_truncated_support(student):
    """Sparse reverse KL and its derivative at other sizes; each position has its own value."""
    for seed, (positions, vocab, top) in enumerate([(1, 3, 1), (4, 30, 8), (9, 12, 11)]):
        _, s, t, b, _ = tables(seed, top, positions, vocab)
        check_loss(student, "sparse_reverse_kl", s.detach(), t, b)


@worth(1)
def test_neither_the_emitted_token_nor_the_sampler_counts(student):
    """Column 0 and the sampler's table b have no effect on the value or on the derivative."""
    _, s, t, b, _ = tables(7, 4, 6, 20)
    s = s.detach()
    for loss in LOSSES:
        check_loss(student, loss, s, t, b)
        settings = {"top_k": 4}
        value, c = student.loss_and_gradient(loss, settings, s, t, b)
        close(c[:, 0], torch.zeros(6), f"{loss}: dL/ds of column 0")
        changed = [table.clone() for table in (s, t)]
        for table in changed:
            table[:, 0] -= 3.0
        again, c_again = student.loss_and_gradient(loss, settings, *changed, b - 1.0)
        close(again, value, f"{loss} with another emitted token and another sampler")
        close(c_again, c, f"dL/ds of {loss} with another emitted token and another sampler")


@worth(1)
def test_a_truncated_sum_may_be_negative(student):
    """Where one model has less mass on the support than the other, the sum is below 0, uncut."""
    low = torch.tensor([[0.5, 0.1, 0.05]], dtype=torch.float64).log()
    high = torch.tensor([[0.5, 0.6, 0.30]], dtype=torch.float64).log()
    for loss, s, t in (("forward_kl", high, low), ("sparse_reverse_kl", low, high)):
        right, _ = by_hand(loss, s, t)
        check(float(right) < 0, "a mistake of the test")
        check_loss(student, loss, s, t, low)
    far = torch.tensor([[-1.0, -60.0, -80.0]], dtype=torch.float64)
    for loss in LOSSES:
        check_loss(student, loss, far, high, low)
        check_loss(student, loss, high, far, low)


@worth(1)
def test_the_frozen_rollouts(student):
    """Both losses on the frozen rollouts, float32: the built-in teacher and an old student."""
    table = tiny.frozen_table()
    for row in range(len(table.length)):
        count = int(table.length[row] - table.prompt_len[row])
        # Column 0 the emitted token, then the top 4; the tail's draws are not of these losses.
        old, t = table.behavior_logp[row, :count, :5], table.teacher_logp[row, :count, :5]
        for loss in LOSSES:
            check_loss(student, loss, old + 0.1 * torch.sin(t), t, old)
