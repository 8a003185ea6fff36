"""Hidden tests of exercise 9."""

import torch

from claims import check, close, worth
from test_09_head import dense, dense_chunk, problem


@worth(1)
def test_the_backward_pass_can_be_repeated(student):
    """A second backward pass gives the same gradients as the first, and student_logp has none."""
    inputs = problem(10)
    _, _, grad_hidden, grad_weight = dense(*inputs, scale=0.5)
    found = student.head_loss(*inputs, 0.5, 4, factor=-0.25, times=2)
    close(found["grad_hidden"], -0.25 * grad_hidden, "the second gradient of hidden")
    close(found["grad_weight"], -0.25 * grad_weight, "the second gradient of weight")
    check(not found["logp_has_graph"], "student_logp is not detached")


@worth(1)
def test_no_positions(student):
    """Without positions the loss is 0, its graph is connected, and the gradients are zero; with one
    position they are right."""
    hidden, weight, ids, t, b = problem(11)
    found = student.head_loss(hidden[:0], weight, ids[:0], t[:0], b[:0], 0.5, 4)
    close(found["total"], 0.0, "the loss of no positions")
    close(found["grad_hidden"], torch.zeros(0, 12), "the gradient of hidden")
    close(found["grad_weight"], torch.zeros(101, 12), "the gradient of weight")
    check(tuple(found["student_logp"].shape) == (0, 4), "student_logp is not [0,4]")
    one = (hidden[:1], weight, ids[:1], t[:1], b[:1])
    found = student.head_loss(*one, 0.5, 4)
    total, _, _, grad_weight = dense(*one, scale=0.5)
    close(found["total"], total, "the loss of one position")
    close(found["grad_weight"], grad_weight, "the gradient of weight of one position")


@worth(1)
def test_sums_over_chunks_are_not_rounded_to_bfloat16(student):
    """With hidden states in bfloat16 the gradient of weight is still summed in float32, and the
    total in float64."""
    hidden, weight, ids, t, b = problem(12, positions=400, vocab=37, different=37)
    hidden = hidden.bfloat16()
    total, _, grad_hidden, grad_weight = dense(hidden, weight.bfloat16(), ids, t, b)
    found = student.head_loss(hidden, weight, ids, t, b, 1.0, 1)
    kinds = [found[name].dtype for name in ("total", "grad_hidden", "grad_weight")]
    right = [torch.float64, torch.bfloat16, torch.float32]
    check(kinds == right, f"total and gradients of hidden and weight are {kinds}, not {right}")
    close(found["total"], total, "the total of 400 positions, one a chunk", 1e-7)
    close(found["grad_weight"], grad_weight, "the gradient of weight of 400 chunks", 2e-3)
    close(found["grad_hidden"], grad_hidden, "the gradient of hidden", 5e-3)


@worth(1)
def test_one_table_at_a_time(student):
    """A chunk's table is gone before the next chunk's is made, and the gradient is right."""
    inputs = problem(13, positions=50)
    grad_weight = dense(*inputs)[3]
    close(student.head_loss(*inputs, 1.0, 8)["grad_weight"], grad_weight, "the gradient of weight")
    held = student.head_work(*inputs, 8)["held"]
    check(held <= 8, f"8 positions a chunk, and {held} rows of logits and gradient exist at once")


@worth(1)
def test_other_sizes_and_float64(student):
    """One candidate, a vocabulary of two, a chunk of one, equal ids only: exact in float64."""
    cases = [
        ("one candidate", dict(columns=1)),
        ("two ids", dict(vocab=2, different=2, columns=5)),
        ("three times the same id", dict(different=1, columns=3)),
        ("one position of 33 candidates", dict(positions=1, columns=33)),
    ]
    for what, case in cases:
        inputs = [x.double() if x.is_floating_point() else x for x in problem(14, **case)]
        right = dense(*inputs, scale=1.3)
        for chunk in (1, 3, 100):
            found = student.head_loss(*inputs, 1.3, chunk)
            for name, one in zip(("total", "student_logp", "grad_hidden", "grad_weight"), right):
                close(found[name], one, f"{name} of {what}, {chunk} a chunk, in float64", 1e-12)
    hidden, weight, *rest = inputs
    _, _, gradient = dense_chunk(hidden @ weight.t(), *rest)
    found = student.chunk_loss(hidden @ weight.t(), *rest, "float64")
    close(found["gradient"], gradient, "the gradient of the logits in float64", 1e-12)
    check(not found["has_graph"], f"{' and '.join(found['has_graph'])}: it still has a graph")
