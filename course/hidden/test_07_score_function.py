"""Hidden tests of exercise 7."""

import torch

from claims import check, close, worth
from test_07_score_function import LOSS, distributions


def table(seed: int, positions: int, draws: int, scale: float = 1.0):
    random = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(3, positions, draws, generator=random, dtype=torch.float64) - 0.1


@worth(1)
def test_every_draw_has_its_weight(student):
    """The derivative at a draw is its weight times its advantage, over the number of draws."""
    s, t, b = table(0, 5, 4, 3.0)
    _, c = student.loss_and_gradient(LOSS, {"num_samples": 4}, s, t, b)
    close(c, (s - b).exp() * (s - t) / 4, "dL/ds with 4 draws")


@worth(1)
def test_many_draws_have_a_baseline(student):
    """With 16 draws each advantage has the mean of the others taken away, before it is weighted."""
    s, t, b = table(1, 5, 16)
    _, c = student.loss_and_gradient(LOSS, {"num_samples": 16}, s, t, b)
    d = s - t
    others = (d.sum(-1, keepdim=True) - d) / 15
    close(c, (s - b).exp() * (d - others) / 16, "dL/ds with 16 draws")


@worth(1)
def test_positions_do_not_mix(student):
    """Each position has a value and a gradient of its own, as if it were alone."""
    s, t, b = table(2, 7, 16)
    value, c = student.loss_and_gradient(LOSS, {"num_samples": 16}, s, t, b)
    check(tuple(value.shape) == (7,), f"7 positions give the shape {tuple(value.shape)}")
    check(bool(c.any(-1).all()), "dL/ds is 0 at a position")
    alone, own = student.loss_and_gradient(LOSS, {"num_samples": 16}, s[3:4], t[3:4], b[3:4])
    close(value[3:4], alone, "the value of position 3")
    close(c[3:4], own, "dL/ds at position 3")


@worth(1)
def test_large_weights_are_not_cut(student):
    """A draw that the student likes a hundred times better than the sampler keeps its weight."""
    s, t, _ = distributions(3)
    b = s.clone() - torch.tensor([4.6, 0, 0, 0, 0, -3.0], dtype=torch.float64)
    _, c = student.loss_and_gradient(LOSS, {"num_samples": 1}, s[:, None], t[:, None], b[:, None])
    close(c[:, 0], (s - b).exp() * (s - t), "dL/ds where the ratio is 100 and 0.05")


@worth(1)
def test_reverse_kl_uses_all_draws_and_no_other_columns(student):
    """reverse_kl is the weighted mean over the draws; the columns beside them do not count."""
    s, t, b = table(4, 5, 8)
    found = student.reverse_kl_estimate(LOSS, {"num_samples": 8}, s, t, b)
    close(found, ((s - b).exp() * (s - t)).mean(-1), "reverse_kl of 8 draws")
    s, t, b = table(5, 5, 5)
    found = student.reverse_kl_estimate("forward_kl", {"top_k": 4}, s, t, b)
    right = ((s - b).exp() * (s - t))[:, 0]
    close(found, right, "reverse_kl under forward_kl, whose only draw is column 0")
