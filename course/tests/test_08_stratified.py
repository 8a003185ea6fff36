"""Public tests of exercise 8. The vocabulary is small enough to try every draw from the tail."""

import torch

from claims import check, close, worth

LOSS = "stratified_reverse_kl"


def distributions(seed: int = 0, vocab: int = 6):
    """Log-probabilities s, t, b [V] of a student, a teacher and an older student, float64."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(3, vocab, generator=random, dtype=torch.float64).log_softmax(-1)


def exact_gradient(s, t):
    """Of KL(student || teacher) with respect to the student's logits [V], by autograd."""
    logits = s.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad((logp.exp() * (logp - t)).sum(), logits)
    return gradient


def strata(b, top: int):
    """The sampler's top ids, the other ids, and the density of its draws from the others."""
    order = b.argsort(descending=True)
    return order[:top], order[top:], b[order[top:]].log_softmax(-1)


def every_draw(b, top: int, draws: int):
    """Each row is one way in which the draws may come: (ids [T,C], behavior_logp [T,C], how often
    it comes [T]). Column 0 is an emitted token, here the last id."""
    top_ids, rest, density = strata(b, top)
    ways = torch.cartesian_prod(*[torch.arange(len(rest))] * draws).reshape(-1, draws)
    fixed = torch.cat([torch.tensor([len(b) - 1]), top_ids]).expand(len(ways), -1)
    ids = torch.cat([fixed, rest[ways]], 1)
    behavior = torch.cat([b[fixed], density[ways]], 1)
    return ids, behavior, density[ways].sum(-1).exp()


def gradients(student, s, t, b, top: int, draws: int):
    """The loss's gradient with respect to the student's logits for every way in which the draws may
    come [T,V], and how often it comes [T]."""
    ids, behavior, share = every_draw(b, top, draws)
    settings = {"top_k": top, "num_samples": draws}
    value, c = student.loss_and_gradient(LOSS, settings, s[ids], t[ids], behavior)
    check(value.shape == share.shape, f"{len(ids)} positions give the shape {tuple(value.shape)}")
    check(not c[:, 0].any(), "column 0, the emitted token, has a derivative: it carries no loss")
    of_id = torch.zeros(len(ids), len(s), dtype=s.dtype).scatter_add(1, ids, c)
    return of_id - s.exp() * of_id.sum(-1, keepdim=True), share


def mean_gradient(student, *problem, **sizes):
    """The mean of these gradients."""
    found, share = gradients(student, *problem, **sizes)
    return share @ found


@worth(1)
def test_the_tail_is_the_sampler_without_its_top(student):
    """Columns: a draw, the sampler's top, the tail. No tail id is in the top, b of the tail is the
    density of the sampler restricted to the other ids, and a uniform decides one column."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 12, generator=random)
    uniforms = torch.rand(50, 5, generator=random, dtype=torch.float64)
    ids, logp = student.proposed({"draws": 1, "top": 3, "tail": 4}, logits, uniforms)
    check(tuple(ids.shape) == (50, 8), f"50 slots and 8 columns give the shape {tuple(ids.shape)}")
    check(ids.shape == logp.shape, f"ids are {tuple(ids.shape)} and logp is {tuple(logp.shape)}")
    exact = logits.double().log_softmax(-1)
    for row in range(50):
        b = exact[row]
        top, rest, density = strata(b, 3)
        found = ids[row, 1:4].sort().values.tolist()
        right = top.sort().values.tolist()
        check(found == right, f"slot {row} has the top {found}, {right} is right")
        inside = sorted(set(ids[row, 4:].tolist()) & set(right))
        check(not inside, f"slot {row} has the ids {inside} both in its top and in its tail")
        close(logp[row, :4], b[ids[row, :4]], f"logp of the draw and the top of slot {row}")
        places = [rest.tolist().index(one) for one in ids[row, 4:].tolist()]
        close(logp[row, 4:], density[places], f"logp of the tail of slot {row}")
    for uniform, column in enumerate((0, 4, 5, 6, 7)):
        changed = uniforms.clone()
        changed[:, uniform] = uniforms[:, uniform].flip(0)
        other, _ = student.proposed({"draws": 1, "top": 3, "tail": 4}, logits, changed)
        differ = (other != ids).any(0).nonzero().flatten().tolist()
        check(
            differ == [column],
            f"another uniform {uniform} changes the columns {differ}, column {column} is right",
        )


@worth(1)
def test_without_lag_the_mean_gradient_is_exact(student):
    """Without lag (b is the student's own) the mean gradient over all draws from the tail is that
    of the reverse KL."""
    s, t, _ = distributions()
    found = mean_gradient(student, s, t, s, top=2, draws=1)
    close(found, exact_gradient(s, t), "the mean gradient")


@worth(1)
def test_with_lag_the_mean_gradient_is_exact(student):
    """With the top and the draws of an older student the mean gradient is still exact."""
    s, t, b = distributions(1)
    found = mean_gradient(student, s, t, b, top=2, draws=1)
    close(found, exact_gradient(s, t), "the mean gradient at a lag")


@worth(1)
def test_with_baselines_the_mean_gradient_is_exact(student):
    """With 8 draws there are baselines. The mean gradient over all 6561 ways in which 8 draws may
    come is still exact; and where D is the same for all ids of the tail, every way gives it."""
    s, t, b = distributions(2, vocab=5)
    found = mean_gradient(student, s, t, b, top=2, draws=8)
    close(found, exact_gradient(s, t), "the mean gradient with 8 draws")
    top, rest, _ = strata(b, 2)
    t = s - 1.0  # D = 1 in the tail; the top has what is left
    t[top] = s[top] - s[top].logsumexp(-1) + (1 - t[rest].exp().sum()).log()
    found, _ = gradients(student, s, t, b, top=2, draws=8)
    right = exact_gradient(s, t).expand(len(found), -1)
    close(found, right, "the gradient of 8 draws, all with D = 1,")


@worth(1)
def test_the_estimate_of_the_reverse_kl_is_unbiased(student):
    """reverse_kl is KL(student || teacher) on average, also with an older student's candidates."""
    s, t, b = distributions(3)
    ids, behavior, share = every_draw(b, top=3, draws=2)
    settings = {"top_k": 3, "num_samples": 2}
    found = student.reverse_kl_estimate(LOSS, settings, s[ids], t[ids], behavior)
    check(found.shape == share.shape, f"{len(ids)} positions give the shape {tuple(found.shape)}")
    close((share * found).sum(), (s.exp() * (s - t)).sum(), "the mean of reverse_kl")
