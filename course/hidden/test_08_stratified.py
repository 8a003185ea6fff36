"""Hidden tests of exercise 8."""

import torch

from claims import check, close, worth
from test_08_stratified import LOSS, strata

COLUMNS = {"draws": 2, "top": 3, "tail": 4}


def table(seed: int, positions: int, columns: int):
    random = torch.Generator().manual_seed(seed)
    return -3.0 * torch.rand(3, positions, columns, generator=random, dtype=torch.float64) - 0.1


def uniforms_for(rows: int, count: int, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(rows, count, generator=random, dtype=torch.float64)


@worth(1)
def test_every_random_column_has_a_uniform_of_its_own(student):
    """The first uniforms decide the draws, the others the tail, each one column; and every id
    comes as often as its density says."""
    rows, vocab = 4000, 9
    b = torch.tensor([0.5, 2.0, -1.0, 0.0, 1.0, -0.5, 3.0, 0.2, -2.0]).double().log_softmax(-1)
    logits = b.float().expand(rows, -1)
    uniforms = uniforms_for(rows, 6)
    ids, _ = student.proposed(COLUMNS, logits, uniforms)
    top, rest, density = strata(b, 3)
    of_tail = torch.zeros(vocab, dtype=torch.float64)
    of_tail[rest] = density.exp()
    shares = {0: b.exp(), 1: b.exp()} | dict.fromkeys(range(5, 9), of_tail)
    for column, share in shares.items():
        counts = torch.bincount(ids[:, column], minlength=vocab)
        error = (counts - rows * share).abs()
        allowed = 5 * (rows * share * (1 - share)).sqrt()
        worst = int((error - allowed).argmax())
        check(
            bool((error <= allowed).all()),
            f"column {column} has id {worst} {int(counts[worst])} times in {rows} slots, "
            f"about {float(rows * share[worst]):.0f} times is right",
        )
    for uniform, column in enumerate(shares):
        changed = uniforms[:200].clone()
        changed[:, uniform] = uniforms_for(200, 1, seed=1)[:, 0]
        other, _ = student.proposed(COLUMNS, logits[:200], changed)
        differ = (other != ids[:200]).any(0).nonzero().flatten().tolist()
        check(
            differ == [column],
            f"uniform {uniform} decides the columns {differ}, column {column} alone is right",
        )


@worth(1)
def test_a_very_peaked_sampler_has_a_tail(student):
    """Where the top has all but 1e-9 or e^-200 of the mass, the tail still has its density."""
    far = torch.tensor([[-22.0], [-200.0], [-22.0]])
    shape = torch.tensor([0.0, -1.0, -0.5, -3.0, -0.2])
    logits = torch.cat([torch.tensor([0.0, -1.0, -2.0]).expand(3, -1), far + shape], 1)
    logits[2] = logits[2].flip(0) + 50.0
    ids, logp = student.proposed(COLUMNS, logits.float(), uniforms_for(3, 6, seed=2))
    for row in range(3):
        top, rest, density = strata(logits[row].double(), 3)
        inside = sorted(set(ids[row, 5:].tolist()) & set(top.tolist()))
        check(not inside, f"slot {row} has the ids {inside} both in its top and in its tail")
        places = [rest.tolist().index(one) for one in ids[row, 5:].tolist()]
        what = f"logp of the tail where the other ids have {['1e-9', 'e^-200', '1e-9'][row]}"
        close(logp[row, 5:], density[places], what)


@worth(1)
def test_other_losses_get_their_columns(student):
    """Without a tail, without a top, or with the teacher's top the other columns stay as they are,
    and equal probabilities are no obstacle."""
    logits = 2 * torch.randn(40, 10, generator=torch.Generator().manual_seed(3))
    logits[:20] = 0.0
    exact = logits.double().log_softmax(-1)
    uniforms = uniforms_for(40, 7, seed=4)
    layouts = [
        ({"draws": 3}, 3),
        ({"draws": 3, "top": 4}, 7),
        ({"draws": 3, "top": 4, "teacher_top": True}, 3),
        ({"draws": 3, "top": 4, "tail": 4}, 11),
    ]
    for columns, width in layouts:
        count = 3 + columns.get("tail", 0)
        ids, logp = student.proposed(columns, logits, uniforms[:, :count])
        check(tuple(ids.shape) == (40, width), f"{columns} gives the shape {tuple(ids.shape)}")
        check(ids.dtype == torch.int64, f"{columns} gives ids of {ids.dtype}")
        known = min(width, 7)
        close(logp[:, :known], exact.gather(1, ids[:, :known]), f"logp under {columns}")
        for row in range(40):
            top, tail = ids[row, 3:7].tolist(), ids[row, 7:].tolist()
            where = f"{columns}: slot {row}"
            check(len(set(top)) == len(top), f"{where} has an id twice in its top")
            check(not set(top) & set(tail), f"{where} has an id of its top in its tail")


@worth(1)
def test_sixteen_draws_have_baselines(student):
    """With 16 draws the advantage of each draw has the mean of the other draws taken away before
    it is weighted, that of the top the mean of all draws."""
    s, t, b = table(5, 7, 20)
    value, c = student.loss_and_gradient(LOSS, {"top_k": 3, "num_samples": 16}, s, t, b)
    check(tuple(value.shape) == (7,), f"7 positions give the shape {tuple(value.shape)}")
    d = s - t
    drawn = d[:, 4:]
    others = (drawn.sum(-1, keepdim=True) - drawn) / 15
    close(c[:, 0], torch.zeros(7), "dL/ds of the emitted token")
    top = s.exp() * (d - drawn.mean(-1, keepdim=True))
    close(c[:, 1:4], top[:, 1:4], "dL/ds of the top with 16 draws")
    tail = (s - b)[:, 4:].exp() * (drawn - others) / 16
    close(c[:, 4:], tail, "dL/ds of the tail with 16 draws")


@worth(1)
def test_the_estimate_has_no_baseline(student):
    """reverse_kl with 16 draws is the sum over the top and the weighted mean over the tail."""
    s, t, b = table(6, 7, 20)
    found = student.reverse_kl_estimate(LOSS, {"top_k": 3, "num_samples": 16}, s, t, b)
    top = (s.exp() * (s - t))[:, 1:4].sum(-1)
    tail = ((s - b).exp() * (s - t))[:, 4:].mean(-1)
    close(found, top + tail, "reverse_kl with 16 draws")
