"""Hidden tests of exercise 2."""

import torch

from claims import check, worth
from test_02_draw import LAST, check_possible, check_shares, vocabulary


def numbers(values):
    """A row of uniforms."""
    return torch.tensor([values], dtype=torch.float64)


@worth(1)
def test_every_size_of_vocabulary(student):
    """The shares are exact for a vocabulary of any size, from 1 id to 200,000."""
    found = student.drawn(torch.tensor([[0.3]]), numbers([0.0, 0.7, LAST]))
    check(found.tolist() == [[0, 0, 0]], f"of one id the draws are {found.tolist()}")
    for size in (2, 127, 128, 129, 255, 384, 1000):
        random = torch.Generator().manual_seed(size)
        check_shares(student, torch.rand(size, generator=random), range(size))
    for size in (199_999, 200_000, 199_936):
        check_shares(student, vocabulary(size, size), [*range(5, size, 1501), size - 1])


@worth(1)
def test_unlikely_ids_beside_a_likely_one(student):
    """Ids of about 1e-9 have their shares before and behind an id that has nearly everything."""
    for size in (100_000, 99_968):
        for likely in (0, 50_000, size - 1):
            random = torch.Generator().manual_seed(likely)
            probs = 2e-9 * torch.rand(size, generator=random)
            probs[likely] = 1.0
            around = range(max(0, likely - 20), min(size, likely + 20))
            check_shares(student, probs, [*around, *range(0, size, 1997)])


@worth(1)
def test_the_sum_is_any_number(student):
    """Probabilities that add up to 1e-3, 0.9999 or 1000 have the shares that they have."""
    for size in (5_000, 5_120):
        for total in (1e-3, 0.9999, 1e3):
            probs = vocabulary(3, size) * total
            check_shares(student, probs, [*range(0, size, 41), size - 1])


@worth(1)
def test_long_runs_of_zeros(student):
    """With most ids impossible, only possible ones are drawn, each with its share."""
    uniforms = numbers([0.0, 1e-300, 2.0**-53, 0.25, 0.75, 1 - 2.0**-52, LAST])
    for size in (1000, 1024):
        for only in (0, 128, 511, size - 1):
            probs = torch.zeros(1, size)
            probs[0, only] = 1e-5
            found = student.drawn(probs, uniforms)
            check(
                found.tolist() == [[only] * uniforms.numel()],
                f"only id {only} of {size} is possible; drawn are {found[0].tolist()}",
            )
        random = torch.Generator().manual_seed(size)
        probs = (6 * torch.randn(400, size, generator=random)).softmax(-1)
        probs[:, :130] = probs[:, 250:600] = probs[:, -200:] = 0.0
        found = student.drawn(probs, uniforms.expand(400, -1))
        check_possible(probs, uniforms.expand(400, -1), found)
        ids = [*range(130, 250), *range(600, size - 200)]
        check_shares(student, probs[0], ids)


@worth(1)
def test_rows_of_different_sums(student):
    """Each of many rows has its own sum, its own zeros and its own uniforms."""
    random = torch.Generator().manual_seed(7)
    for size in (640, 700):
        probs = torch.rand(9, size, generator=random) * 10.0 ** torch.arange(-4, 5)[:, None]
        probs[torch.rand(9, size, generator=random) < 0.3] = 0.0
        uniforms = torch.rand(9, 50, generator=random, dtype=torch.float64)
        found = student.drawn(probs, uniforms)
        check(tuple(found.shape) == (9, 50), f"9 rows of 50 give the shape {tuple(found.shape)}")
        for row in range(9):
            alone = student.drawn(probs[row : row + 1], uniforms[row : row + 1])[0]
            check(torch.equal(found[row], alone), f"row {row} of 9 comes out different if alone")
            check_shares(student, probs[row], (probs[row] > 0).nonzero().flatten().tolist())
