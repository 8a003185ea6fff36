"""Public tests of exercise 2. What is right is computed with whole numbers, without rounding."""

import math
from bisect import bisect_right
from itertools import accumulate

import torch

from claims import check, worth

LAST = 1 - 2.0**-53  # the largest uniform
HALVINGS = 46


def exact_ends(probs):
    """Where the share of each id ends, in (0, 1]; probs float32 [V].

    A float32 is a whole number of 2^-149, and Python adds whole numbers of any size.
    """
    whole = [int(math.ldexp(value, 149)) for value in probs.tolist()]
    ends = list(accumulate(whole))
    return [end / ends[-1] for end in ends]


def vocabulary(seed: int, size: int):
    """Probabilities float32 [V] like those of a model: a few ids are likely, most are not."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, generator=random)
    return logits.softmax(-1)


def first_uniforms(student, probs, ids):
    """The least uniform that gives an id of at least `ids` [N], by bisection."""
    low, high = torch.zeros(len(ids)).double(), torch.ones(len(ids)).double()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_below = student.drawn(probs[None], middle[None])[0] < ids
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return high


def check_possible(probs, uniforms, found):
    """No draw of `found` [A,N] has the probability 0."""
    size = probs.shape[1]
    check(found.shape == uniforms.shape, f"the ids have the shape {tuple(found.shape)}")
    check(bool((found >= 0).all() and (found < size).all()), f"an id is not in [0, {size})")
    for row, column in (probs.gather(1, found) == 0).nonzero().tolist():
        raise AssertionError(
            f"the uniform {float(uniforms[row, column]):.17g} gives id {found[row, column]} "
            f"of {size}, whose probability is 0"
        )


def check_shares(student, probs, ids):
    """Each of `ids` is drawn for its share of the uniforms, and in its place, to 1e-6.

    A share is right to 1e-12, or to 3e-7 of itself: float32 rounded the probability, too.
    """
    ids = torch.tensor(list(ids))
    ends = torch.tensor([0.0, *exact_ends(probs)], dtype=torch.float64)
    begin, end = first_uniforms(student, probs, torch.cat([ids, ids + 1])).view(2, -1)
    for k, share, right in zip(ids.tolist(), end - begin, ends[ids + 1] - ends[ids]):
        check(
            abs(share - right) < max(1e-12, 3e-7 * right),
            f"id {k} of {len(probs):,} has the probability {right:.10g}, and {share:.10g} "
            f"of the uniforms give it: off by {abs(share - right):.1e}; 1e-12, or 3e-7 of the "
            f"probability, is allowed",
        )
    for k, first, right in zip(ids.tolist(), begin, ends[ids]):
        check(
            abs(first - right) < 1e-6,
            f"the uniforms that give id {k} of {len(probs):,} or a later one "
            f"begin at {first:.12f}, {right:.12f} is right",
        )


@worth(1)
def test_a_uniform_gives_the_id_whose_share_it_lies_in(student):
    """The ids divide [0, 1) in their order, each with its share; their sum need not be 1."""
    grid = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    for probs in ([0.5, 0.25, 0.125, 0.125], [1.5, 0.75, 0.375, 0.375], [0.25, 0.125, 0.5]):
        ends = exact_ends(torch.tensor(probs))
        right = [bisect_right(ends, uniform) for uniform in grid.tolist()]
        found = student.drawn(torch.tensor([probs]), grid[None])
        check(found.dtype == torch.int64, f"the ids are {found.dtype}, not torch.int64")
        check(tuple(found.shape) == (1, 40), f"40 uniforms give the shape {tuple(found.shape)}")
        for uniform, one, expected in zip(grid.tolist(), found[0].tolist(), right, strict=True):
            check(one == expected, f"of {probs}, {uniform} gives id {one}; {expected} is right")


@worth(1)
def test_every_uniform_has_its_own_draw(student):
    """Draw n of a row depends on that row's probabilities and its uniform n, on nothing else."""
    random = torch.Generator().manual_seed(1)
    probs = torch.rand(4, 300, generator=random)
    uniforms = torch.rand(4, 6, generator=random, dtype=torch.float64)
    uniforms[:, 4] = uniforms[:, 1]
    found = student.drawn(probs, uniforms)
    different = found.unique().numel()
    check(different > 12, f"24 uniforms give {different} different ids of 300")
    for row in range(4):
        for column in range(6):
            one = slice(row, row + 1), slice(column, column + 1)
            alone = int(student.drawn(probs[row : row + 1], uniforms[one]))
            check(
                int(found[row, column]) == alone,
                f"draw {column} of row {row} is {found[row, column]}, and {alone} if it is alone",
            )


@worth(2)
def test_the_shares_of_a_large_vocabulary_are_exact(student):
    """Of 150,000 ids each has its share, the last and the least likely as well."""
    for size in (150_000, 151_936):  # the second is 1187 * 128
        probs = vocabulary(0, size)
        by_probability = probs.argsort().tolist()
        unlikely, likely = by_probability[:: size // 100], by_probability[-50:]
        check_shares(student, probs, [*unlikely, *range(size - 40, size), *likely])


@worth(1)
def test_an_id_of_probability_zero_is_never_drawn(student):
    """Ids of probability zero are not drawn, not at the uniform 0 and not at the largest one; the
    uniform 0 gives the first of the others."""
    random = torch.Generator().manual_seed(0)
    for size in (1000, 1024):
        probs = (6 * torch.randn(400, size, generator=random)).softmax(-1)
        probs[torch.rand(400, size, generator=random) < 0.5] = 0.0
        probs[:, :3] = probs[:, -3:] = 0.0
        uniforms = torch.tensor([[0.0, 0.5, LAST]], dtype=torch.float64).expand(400, -1)
        found = student.drawn(probs, uniforms)
        check_possible(probs, uniforms, found)
        first = (probs > 0).int().argmax(-1)
        wrong = (found[:, 0] != first).nonzero().flatten().tolist()
        check(
            not wrong, f"the uniform 0 does not give the first possible id in the rows {wrong[:3]}"
        )
