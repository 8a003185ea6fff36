"""Public tests of exercise 9. Expected values: all logits at once, by autograd in float64."""

import torch

from claims import check, close, worth


def problem(seed=0, positions=13, width=12, vocab=101, columns=4, different=101):
    """hidden, weight, ids, t, b, float32. Only `different` ids occur."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=random)
    weight = torch.randn(vocab, width, generator=random) * 0.5
    order = torch.rand(positions, different, generator=random).argsort(-1)
    ids = order[:, torch.arange(columns) % different] * ((vocab - 1) // max(1, different - 1))
    t = torch.randn(positions, columns, generator=random) - 3
    b = torch.randn(positions, columns, generator=random) - 2
    return hidden, weight, ids, t, b


def values(logits, ids, t, b):
    """The loss of each position and the log-probabilities of its candidates."""
    s = logits.log_softmax(-1).gather(1, ids)
    return ((s - t.double()).square() * b.double().exp()).sum(-1), s


def dense(hidden, weight, ids, t, b, scale=1.0):
    """(total, log-probabilities, gradient of hidden, gradient of weight)."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    value, s = values(scale * hidden @ weight.t(), ids, t, b)
    both = torch.autograd.grad(value.sum(), (hidden, weight))
    return value.sum().detach(), s.detach(), *both


def dense_chunk(logits, ids, t, b):
    """(values, log-probabilities, gradient of the logits)."""
    logits = logits.detach().double().requires_grad_()
    value, s = values(logits, ids, t, b)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), s.detach(), gradient


@worth(1)
def test_one_chunk(student):
    """unfused_loss gives the value of each position, its log-probabilities and, in place of the
    logits, the gradient with respect to them. None of the three has a graph."""
    hidden, weight, *rest = problem()
    logits = hidden @ weight.t()
    value, s, gradient = dense_chunk(logits, *rest)
    found = student.chunk_loss(logits, *rest, "float32")
    close(found["value"], value, "the value of each position")
    close(found["s"], s, "the log-probabilities of the candidates")
    ids = rest[0]
    elsewhere = torch.ones_like(logits).scatter(1, ids, 0.0)
    close(found["gradient"] * elsewhere, gradient * elsewhere, "the gradient at all other ids")
    close(found["gradient"].gather(1, ids), gradient.gather(1, ids), "the gradient at candidates")
    check(found["in_place"], "the gradient has memory of its own beside the logits")
    check(not found["has_graph"], f"{' and '.join(found['has_graph'])}: it still has a graph")


@worth(1)
def test_repeated_ids_add_up(student):
    """An id that stands in several columns of a row gets the sum of their derivatives."""
    hidden, weight, *rest = problem(1, columns=6, different=3)
    logits = hidden @ weight.t()
    _, _, gradient = dense_chunk(logits, *rest)
    found = student.chunk_loss(logits, *rest, "float32")
    close(found["gradient"], gradient, "the gradient with 3 ids in 6 columns")


@worth(1)
def test_the_total_is_a_sum_over_all_positions(student):
    """However the positions are cut into chunks, the total is the sum over all of them, and
    student_logp has a row for each."""
    inputs = problem(2)
    total, s, _, _ = dense(*inputs, scale=0.7)
    for chunk in (13, 64, 5, 1):
        found = student.head_loss(*inputs, 0.7, chunk)
        where = f"of 13 positions, {chunk} a chunk"
        close(found["total"], total, f"the total {where}")
        close(found["student_logp"], s, f"student_logp {where}")


@worth(1)
def test_both_gradients(student):
    """The gradients of hidden and weight are exact: at a temperature, at chunk sizes that do not
    divide 13, and when the loss is multiplied by something before the backward pass."""
    inputs = problem(3)
    for scale, chunk, factor in ((1.0, 13, 1.0), (0.7, 13, 1.0), (1.0, 5, 1.0), (1.0, 13, 3.0)):
        _, _, grad_hidden, grad_weight = dense(*inputs, scale=scale)
        found = student.head_loss(*inputs, scale, chunk, factor)
        where = f"of {factor:.0f} times the loss, with scale {scale}, {chunk} positions a chunk"
        close(found["grad_hidden"], factor * grad_hidden, f"the gradient of hidden {where}")
        close(found["grad_weight"], factor * grad_weight, f"the gradient of weight {where}")


@worth(1)
def test_three_products_a_chunk(student):
    """No table of logits has more rows than a chunk, and there are three matrix products in all."""
    inputs = problem(4, positions=50)
    found = student.head_work(*inputs, 8)
    check(found["largest"] <= 8, f"8 positions a chunk, and a table has {found['largest']} rows")
    products = found["multiplications"] / (50 * 101 * 12)
    check(products == 3, f"there are {products:g} products of T V F multiplications, not 3")
