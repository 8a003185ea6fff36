"""Hidden tests of exercise 10."""

import torch

from claims import check, close, worth
from test_10_kernel import check_compiled, check_gradient, check_races, problem, right_answer

KINDS = [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]


def check_kernel(student, inputs, dtype, what, tolerance=None):
    """Values of the whole kernel, and what it changed around them."""
    found = student.whole_kernel(*inputs, dtype)
    s, gradient = right_answer(*inputs)
    check(found["outside"] == 0, f"{what}: {found['outside']} entries around the rows change")
    close(found["student_logp"], s, f"student_logp, {what}", tolerance or 1e-6)
    what = f"the gradient, {what}"
    check_gradient(found["gradient"], gradient, inputs[1], dtype, what, tolerance)


@worth(1)
def test_extreme_logits(student):
    """Logits of 1e4 and -1e4, rows that rise or fall, and -inf neither overflow nor become NaN."""
    steps = torch.linspace(-300, 300, 3000)
    last = torch.tensor([7, 2990, 2999])
    alone = torch.full((3000,), -1e30).scatter(0, last[1:2], 50.0)
    possible = torch.full((3000,), -torch.inf).scatter(0, last, torch.tensor([1.0, 2.0, -3.0]))
    large = 1e-3  # float32 keeps the number 1e4, and so every log-probability, to 0.0005
    rows = [
        ("logits that rise from -300 to 300", steps, None),
        ("logits that fall from 300 to -300", steps.flip(0), None),
        ("logits near 1e4", 1e4 + torch.arange(3000) % 7, large),
        ("logits near -1e4", -1e4 - torch.arange(3000) % 7, large),
        ("one logit of 50 among -1e30", alone, None),
        ("three possible ids among -inf", possible, None),
    ]
    c = torch.tensor([[0.5, -1.0, 0.25]])
    for what, row, tolerance in rows:
        found = student.logsumexp_of(row)
        close(found, row.double().logsumexp(-1), f"logsumexp of {what}", 1e-6)
        check_kernel(student, (row[None], last[None], c), "float32", what, tolerance)


@worth(1)
def test_any_candidates_dtypes_and_vocabularies(student):
    """1 to 100 candidates with ids that repeat in a row and in the next one; logits in float32 and
    bfloat16, gradients no wider; vocabularies from 2 to 5000."""
    for columns in (1, 2, 33, 40, 100):
        for different in (1, 3, 50):
            inputs = problem(columns, 2, 173, columns, different)
            check_kernel(student, inputs, "float32", f"{columns} candidates with {different} ids")
    for kind, dtype in KINDS:
        for vocab in (2, 173, 512, 1300, 5000):
            inputs = problem(vocab, 3, vocab, 7, 5, getattr(torch, kind))
            check_kernel(student, inputs, dtype, f"{dtype} of {kind} logits, V = {vocab}")


@worth(1)
def test_no_race_no_atomics_and_no_third_reading(student):
    """The whole kernel has no race and no atomic. A program loads its row once for the logsumexp
    and once for the gradient; beside that only the candidates' logits."""
    for kind, dtype in KINDS:
        for vocab in (173, 1800):
            inputs = problem(20, 2, vocab, 6, 3, getattr(torch, kind))
            found = student.whole_kernel(*inputs, dtype)
            check_races(found, f"{dtype} of {kind} logits, V = {vocab}")
    for vocab in (173, 1800):
        inputs = problem(30, 1, vocab, 4)
        check_kernel(student, inputs, "float32", f"V = {vocab}")
        found = student.whole_kernel(*inputs, "float32")
        loads = [event for event in found["events"] if event["kind"] == "load"]
        addresses = torch.cat([event["addresses"] for event in loads])
        count = int(((addresses >= 0) & (addresses < 4 * vocab)).sum())
        right = 2 * vocab + 4
        check(count <= right, f"{count} loads of {vocab} logits with 4 candidates, not {right}")


@worth(1, compiled=True)
def test_the_compiler_takes_every_size(student):
    """The compiler accepts the kernel for all dtypes, many candidates and large vocabularies."""
    for logits, gradient in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        for vocab, columns in ((2, 1), (5000, 100), (151_936, 256)):
            check_compiled(student, vocab, columns, logits, gradient)
