"""Hidden tests of exercise 6. What is right is computed position by position in plain Python."""

import math

import torch

import tiny
from claims import check, close, worth
from test_06_divergences import answer, tables

SIZES = [(1, 3, 1), (4, 30, 8), (9, 12, 11), (3, 9, 3), (2, 50, 4), (5, 60, 9), (1, 80, 33)]
SMALLEST = 2.0**-23  # EPSILON of losses.py


def log_sum(logs):
    """log sum e^x of a list."""
    peak = max(logs)
    return peak + math.log(math.fsum(math.exp(one - peak) for one in logs))


def outside(logs):
    """The probability of all other ids, as `rest` of losses.py has it."""
    return max(1 - math.fsum(map(math.exp, logs)), SMALLEST)


def guesses(s, t):
    """Both guesses of m at a position, from the lists of its top K: the larger one is right."""
    edge_s, edge_t = s[len(s) // 4 :], t[len(s) // 4 :]
    shares = [math.exp(one - log_sum(edge_s)) for one in edge_s]
    mean = math.fsum(w * (one - other) for w, one, other in zip(shares, edge_s, edge_t))
    edge_ratio = log_sum(edge_s) - log_sum(edge_t)
    return mean, mean + math.log(outside(s) / outside(t)) - edge_ratio


def both_occur(s, t):
    """True if either guess is the larger one somewhere, by more than rounding."""
    found = [guesses(*rows) for rows in zip(s[:, 1:].tolist(), t[:, 1:].tolist())]
    return any(a > b + 0.1 for a, b in found) and any(b > a + 0.1 for a, b in found)


def by_hand(loss: str, s, t):
    """(value [T], dL/ds [T,C]); column 0 carries none. The value of sparse KL is not looked at."""
    values, slopes = [], []
    for s_row, t_row in zip(s[:, 1:].tolist(), t[:, 1:].tolist()):
        pairs = list(zip(s_row, t_row))
        if loss == "forward_kl":
            values.append(math.fsum(math.exp(other) * (other - one) for one, other in pairs))
            slopes.append([0.0, *(-math.exp(other) for other in t_row)])
        else:
            m = max(guesses(s_row, t_row))
            values.append(0.0)
            slopes.append([0.0, *(math.exp(one) * (one - other - m) for one, other in pairs)])
    return torch.tensor(values).double(), torch.tensor(slopes).double()


def check_loss(student, loss: str, s, t, b, what: str = ""):
    value, c = answer(student, loss, s, t, b)
    right, right_c = by_hand(loss, s, t)
    if loss == "forward_kl":
        close(value, right, f"forward_kl of each position{what}")
    close(c, right_c, f"dL/ds of {loss}{what}")


def check_sizes(student, loss: str):
    for seed, (positions, vocab, top) in enumerate(SIZES):
        _, s, t, b, _ = tables(seed, top, positions, vocab)
        check_loss(student, loss, s.detach(), t, b, f", K = {top}")


@worth(1)
def test_forward_kl_of_a_truncated_support(student):
    """Forward KL and its derivative at other sizes; each position has its own, also below 0."""
    check_sizes(student, "forward_kl")
    low = torch.tensor([[0.5, 0.1, 0.05]], dtype=torch.float64).log()
    high = torch.tensor([[0.5, 0.6, 0.30]], dtype=torch.float64).log()
    check(float(by_hand("forward_kl", high, low)[0]) < 0, "a mistake of the test")
    check_loss(student, "forward_kl", high, low, low)


@worth(1)
def test_sparse_reverse_kl_of_a_truncated_support(student):
    """The gradient of sparse reverse KL at other K; each position has an m of its own."""
    positions, vocab, top = SIZES[5]
    _, s, t, _, _ = tables(5, top, positions, vocab)
    check(both_occur(s, t), "a mistake of the test")
    check_sizes(student, "sparse_reverse_kl")


@worth(1)
def test_neither_the_emitted_token_nor_the_sampler_counts(student):
    """Column 0 and the sampler's table b have no effect on the loss or on its derivative."""
    _, s, t, b, _ = tables(7, 5, 6, 20)
    s = s.detach()
    for loss in ("forward_kl", "sparse_reverse_kl"):
        check_loss(student, loss, s, t, b)
        value, c = answer(student, loss, s, t, b)
        changed = [table.clone() for table in (s, t)]
        for table in changed:
            table[:, 0] -= 3.0
        again, c_again = answer(student, loss, *changed, b - 1.0)
        close(c_again, c, f"dL/ds of {loss} with another emitted token and another sampler")
        if loss == "forward_kl":
            close(again, value, f"{loss} with another emitted token and another sampler")


@worth(1)
def test_probabilities_of_zero_and_a_top_that_has_all_of_the_mass(student):
    """Where e^s or e^t is 0 in float32, or nothing is left outside, all numbers are finite."""
    near = [math.log(x) for x in (0.4, 0.2, 0.1, 0.1, 0.05)]
    tails = [
        [-0.7, -0.8, -80.0, -120.0, -300.0],
        [-0.2, -110.0, -150.0, -150.0, -180.0],
        [-900.0, -1200.0, -850.0, -1000.0, -800.0],
        [math.log(0.6) + 1e-6, math.log(0.3), math.log(0.1), -90.0, -95.0],  # a sum above 1
    ]
    for dtype in (torch.float32, torch.float64):
        for tail in tails:
            s = torch.tensor([[-0.5, *tail], [-0.5, *near]], dtype=dtype)
            t = torch.tensor([[-0.6, *near], [-0.6, *tail]], dtype=dtype)
            for pair in ((s, t), (s, s), (s, s.flip(0) - 1.0)):
                for loss in ("forward_kl", "sparse_reverse_kl"):
                    check_loss(student, loss, *pair, s, f", {dtype}, logs down to {min(tail):.0f}")


@worth(1)
def test_the_frozen_rollouts(student):
    """Both losses on the frozen rollouts, float32: the built-in teacher and an old student."""
    table = tiny.frozen_table()
    for row in range(len(table.length)):
        count = int(table.length[row] - table.prompt_len[row])
        # Column 0 the emitted token, then the top 4; the tail's draws are not of these losses.
        old, t = table.behavior_logp[row, :count, :5], table.teacher_logp[row, :count, :5]
        s = old - 0.1 * t.sin().square()
        check_loss(student, "forward_kl", s, t, old)
        _, c = answer(student, "sparse_reverse_kl", s, t, old)
        _, right = by_hand("sparse_reverse_kl", s, t)
        # A sum of float32 is off by some EPSILON. That is much of a rest that is small itself.
        left = [(1 - x[:, 1:].double().exp().sum(-1)).clamp(min=SMALLEST) for x in (s, t)]
        slack = 4 * SMALLEST * (1 / left[0] + 1 / left[1])[:, None] * s.double().exp()
        error = (c - right).abs() - slack - 1e-5 * right.abs().max()
        position, column = divmod(int(error.argmax()), error.shape[1])
        check(
            float(error.max()) <= 0,
            f"dL/ds of sparse_reverse_kl, rollout {row}: entry [{position}, {column}] is "
            f"{float(c[position, column]):.6g}, {float(right[position, column]):.6g} is right",
        )
