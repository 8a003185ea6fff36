"""Public tests of exercise 6. Forward KL: value and gradient. Sparse reverse KL: its gradient."""

import torch
from torch.distributions import Categorical, kl_divergence

from claims import check, close, worth

V = 7
T = 5


def log_probabilities(seed: int, positions: int = T, vocab: int = V):
    """Logits of student, teacher and sampler, float64 [T,V] each."""
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


def exact(logits, t, forward: bool):
    """(KL of every position [T], its gradient with respect to the student's logits [T,V])."""
    logits = logits.detach().clone().requires_grad_()
    student, teacher = Categorical(logits=logits), Categorical(logits=t)
    value = kl_divergence(teacher, student) if forward else kl_divergence(student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def answer(student, loss: str, s, t, b):
    """(value [T], dL/ds [T,C]) of your loss, all columns but the first being the top."""
    value, c = student.loss_and_gradient(loss, {"top_k": s.shape[1] - 1}, s.detach(), t, b)
    shape = tuple(value.shape)
    check(shape == (len(s),), f"{loss}: {len(s)} positions give a value of the shape {shape}")
    check(bool(c.isfinite().all()), f"{loss}: dL/ds has entries that are not finite numbers")
    emitted = float(c[:, 0].abs().max())
    check(emitted == 0, f"{loss}: column 0, the emitted token, has no loss; dL/ds {emitted:.3g}")
    return value, c


def through_logits(student, loss: str, seed: int):
    """Yours and the exact one, with all ids as the top: (value, gradient of the logits) of each."""
    _, s, t, b, logits = tables(seed, V)
    value, c = answer(student, loss, s, t, b)
    (gradient,) = torch.autograd.grad(s, logits, c)
    teacher = log_probabilities(seed)[1]
    return (value, gradient), exact(logits, teacher, loss == "forward_kl")


@worth(1)
def test_forward_kl_of_all_ids_is_exact(student):
    """With all ids as the teacher's top, forward KL and its gradient are the divergence's."""
    (value, gradient), (right, right_gradient) = through_logits(student, "forward_kl", 0)
    close(value, right, "KL(teacher || student)")
    close(gradient, right_gradient, "its gradient with respect to the logits")


@worth(1)
def test_forward_kl_of_a_part_of_the_ids_is_a_part_of_the_sum(student):
    """Ids outside the top K add nothing, and change neither a term inside nor its slope."""
    _, s, t, b, _ = tables(2, V)
    s = s.detach()
    whole, _ = answer(student, "forward_kl", s, t, b)
    parts = []
    for columns in ([0, 1, 2, 3], [5, 4, 5, 6, 7]):
        value, _ = answer(student, "forward_kl", s[:, columns], t[:, columns], b[:, columns])
        parts.append(value)
    close(parts[0] + parts[1], whole, "the part of 3 ids plus that of the other 4, all 7 together,")
    for column in range(1, V + 1):
        pair = [0, column]
        value, c = answer(student, "forward_kl", s[:, pair], t[:, pair], b[:, pair])
        q = t[:, column].exp()
        close(value, q * (q / s[:, column].exp()).log(), "the term of one id, with K = 1,")
        close(c[:, 1], -q, "its slope dL/ds")


@worth(1)
def test_sparse_reverse_kl_of_all_ids_has_the_exact_gradient(student):
    """With all ids as the sampler's top, the gradient of sparse reverse KL is the divergence's."""
    (_, gradient), (_, right) = through_logits(student, "sparse_reverse_kl", 1)
    close(gradient, right, "the gradient of KL(student || teacher) with respect to the logits")


def like_the_edge(seed: int, top: int, vocab: int):
    """(s, t, b, logits, t of all ids): D is one number outside of the top's first quarter."""
    ids, s, _, b, logits = tables(seed, top, T, vocab)
    all_t = logits.detach().log_softmax(-1)
    for position, first in enumerate(ids[:, 1 : 1 + top // 4]):
        all_t[position, first] += torch.linspace(-0.5, -0.1 * position, len(first)).double()
    all_t = all_t.log_softmax(-1)
    return s, all_t.gather(1, ids), b, logits, all_t


@worth(1)
def test_sparse_reverse_kl_is_exact_where_the_rest_is_like_the_edge(student):
    """With one D for the edge and the rest the gradient is exact; of equal models it is 0."""
    for seed, top, vocab in ((2, 4, 9), (3, 16, 40)):
        s, t, b, logits, all_t = like_the_edge(seed, top, vocab)
        _, c = answer(student, "sparse_reverse_kl", s, t, b)
        (gradient,) = torch.autograd.grad(s, logits, c, retain_graph=True)
        _, right = exact(logits, all_t, forward=False)
        close(gradient, right, f"the gradient with respect to {vocab} logits, K = {top},")
        _, c = answer(student, "sparse_reverse_kl", s, s.detach(), b)
        (gradient,) = torch.autograd.grad(s, logits, c)
        largest = float(gradient.abs().max())
        check(
            largest < 1e-9,
            f"a student that equals its teacher, K = {top}: the gradient is {largest:.3g}, not 0",
        )


@worth(1)
def test_sparse_reverse_kl_of_the_example(student):
    """Two positions: the handout's example, where the second guess is larger, and its variant.

    With 0.05 for the teacher's last probability, not 0.17, the first guess is the larger one. Then
    the first and the last id of both positions alone.
    """
    student_p = [0.5, 0.5, 0.2, 0.1, 0.1]  # column 0 is the emitted token, here the first id
    teacher_p = [[0.55, 0.55, 0.1, 0.1, 0.17], [0.55, 0.55, 0.1, 0.1, 0.05]]
    s, t = (torch.tensor(x, dtype=torch.float64).log() for x in ([student_p] * 2, teacher_p))
    whole = [
        [-0.2272044, 0.0668097, -0.0359099, -0.0889727],
        [-0.3075853, 0.0346574, -0.0519860, 0.0173287],
    ]
    for columns, right in (
        ([0, 1, 2, 3, 4], whole),
        ([0, 1], [[-0.1003353], [-0.1003353]]),
        ([0, 4], [[-0.0611597], [0.0]]),
    ):
        s_part, t_part = s[:, columns], t[:, columns]
        _, c = answer(student, "sparse_reverse_kl", s_part, t_part, s_part - 1.0)
        close(c[:, 1:], torch.tensor(right), f"dL/ds of the top {len(columns) - 1}")
