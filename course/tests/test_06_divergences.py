"""Public tests of exercise 6. With every id among the top K the divergences are exact."""

import torch
from torch.distributions import Categorical, kl_divergence

from claims import check, close, worth

V = 7
T = 5


def log_probabilities(seed: int, positions: int = T, vocab: int = V):
    """Of student, teacher and sampler, float64 [T,V] each."""
    random = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(3, positions, vocab, generator=random, dtype=torch.float64)


def tables(seed: int, top: int, positions: int = T, vocab: int = V):
    """(ids [T,1+top], s, t, b of them, logits of the student [T,V]).

    Column 0 is an emitted token, the others are `top` different ids. s depends on the logits.
    """
    logits, t, b = log_probabilities(seed, positions, vocab)
    logits.requires_grad_()
    random = torch.Generator().manual_seed(seed + 1000)
    ids = torch.stack([torch.randperm(vocab, generator=random)[:top] for _ in range(positions)])
    emitted = torch.randint(vocab, (positions, 1), generator=random)
    ids = torch.cat([emitted, ids], 1)
    s, t, b = (one.log_softmax(-1).gather(1, ids) for one in (logits, t, b))
    return ids, s, t, b, logits


def exact(seed: int, forward: bool):
    """(KL of every position [T], its gradient with respect to the student's logits [T,V])."""
    logits, t, _ = log_probabilities(seed)
    logits.requires_grad_()
    student, teacher = Categorical(logits=logits), Categorical(logits=t)
    value = kl_divergence(teacher, student) if forward else kl_divergence(student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def through_logits(student, loss: str, seed: int):
    """(value [T], gradient with respect to the logits [T,V]) of your loss, with all ids as top."""
    _, s, t, b, logits = tables(seed, V)
    value, c = student.loss_and_gradient(loss, {"top_k": V}, s.detach(), t, b)
    emitted = float(c[:, 0].abs().max())
    check(emitted == 0, f"{loss}: column 0, the emitted token, has no loss; dL/ds {emitted:.3g}")
    (gradient,) = torch.autograd.grad(s, logits, c)
    return value, gradient


def slope(student, loss: str, settings: dict, s, t, b, column: int, step: float = 1e-5):
    """dL/ds of a column, by central differences: how the value moves when s moves."""
    move = torch.zeros_like(s)
    move[:, column] = step
    up, _ = student.loss_and_gradient(loss, settings, s + move, t, b)
    down, _ = student.loss_and_gradient(loss, settings, s - move, t, b)
    return (up - down) / (2 * step)


def check_truncated(student, loss: str):
    """What two supports have together is what each has alone; column 0 has nothing to say."""
    _, s, t, b, _ = tables(2, V)
    s = s.detach()
    whole, _ = student.loss_and_gradient(loss, {"top_k": V}, s, t, b)
    check(tuple(whole.shape) == (T,), f"{T} positions give the shape {tuple(whole.shape)}")
    parts = []
    for columns in ([0, 1, 2, 3], [5, 4, 5, 6, 7]):
        settings = {"top_k": len(columns) - 1}
        value, _ = student.loss_and_gradient(
            loss, settings, s[:, columns], t[:, columns], b[:, columns]
        )
        parts.append(value)
    close(parts[0] + parts[1], whole, f"{loss} of 3 ids plus that of the other 4, all 7 together,")
    pi, q = s.exp(), t.exp()
    weight, ratio = (q, q / pi) if loss == "forward_kl" else (pi, pi / q)
    for column in range(1, V + 1):
        pair = [0, column]
        value, _ = student.loss_and_gradient(loss, {"top_k": 1}, s[:, pair], t[:, pair], b[:, pair])
        right = weight[:, column] * ratio[:, column].log()
        close(value, right, f"the term of one id in {loss}, with K = 1,")


@worth(1)
def test_forward_kl_of_all_ids_is_exact(student):
    """With all ids as the teacher's top, forward KL and its gradient are the divergence's."""
    value, gradient = through_logits(student, "forward_kl", 0)
    right, right_gradient = exact(0, forward=True)
    close(value, right, "KL(teacher || student)")
    close(gradient, right_gradient, "its gradient with respect to the logits")


@worth(1)
def test_sparse_reverse_kl_of_all_ids_is_exact(student):
    """With all ids as the sampler's top, reverse KL and its gradient are the divergence's."""
    value, gradient = through_logits(student, "sparse_reverse_kl", 1)
    right, right_gradient = exact(1, forward=False)
    close(value, right, "KL(student || teacher)")
    close(gradient, right_gradient, "its gradient with respect to the logits")


@worth(1)
def test_forward_kl_of_a_part_of_the_ids_is_a_part_of_the_sum(student):
    """Forward KL: ids outside the top K add nothing, and change no term of those inside."""
    check_truncated(student, "forward_kl")


@worth(1)
def test_sparse_reverse_kl_of_a_part_of_the_ids_is_a_part_of_the_sum(student):
    """Reverse KL: ids outside the top K add nothing, and change no term of those inside."""
    check_truncated(student, "sparse_reverse_kl")


@worth(1)
def test_the_gradient_is_the_slope_of_the_value(student):
    """On a truncated support the derivative says how the value moves when s moves."""
    settings = {"top_k": 3}
    for loss in ("forward_kl", "sparse_reverse_kl"):
        _, s, t, b, _ = tables(3, 3)
        s = s.detach()
        _, c = student.loss_and_gradient(loss, settings, s, t, b)
        check(bool(c[:, 1:].any()), f"{loss}: dL/ds is 0 everywhere")
        for column in range(4):
            right = slope(student, loss, settings, s, t, b, column)
            close(c[:, column], right, f"{loss}: dL/ds of column {column}")
