"""Can 32 candidates do better than the default? `python -m experiments.other_estimators`

The default sums the sampler's top 16 exactly and draws 16 more ids from the rest, each less the
mean of the others. Here are estimators of the reverse KL's gradient that could replace it, among
them two that no program can have, because they know all ids. Each makes the gradient with respect
to the logits of every position several times. The table has its squared error (mean over the draws,
sum over positions), divided by that of the default. The model is that of real_model.py: SmolLM2
without six layers, after 40 updates, on rollouts of `lag` updates ago.

    d = s - t, w = e^(s - b);  a `half` is half of the candidates, drawn for themselves

A draw that depends on the other draws must not be less a mean that they are part of: E[w (d - m)]
then is another. So halves use each other's means.
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

from experiments import heal, real_model, study
from experiments.estimators import through_softmax
from experiments.lagged import CPU
from experiments.real_model import Response, logit_gradient
from experiments.staleness import TOP_K
from losses import draw, find, less_others, make_loss
from support.config import builtin
from support.data import read_jsonl
from support.load import load_model, load_tokenizer

TOP, DRAWS = 16, 16
CUT = 2.0
COLUMNS = ("lag", "estimator", "error", "relative")
RESULTS = study.RESULTS / "other_estimators.csv"
LAGS = (0, 8)
DEFAULT = "16 + 16 (the default)"
LOSSES = {  # those that losses.py can make
    DEFAULT: {"loss": "stratified_reverse_kl", "top_k": 16, "num_samples": 16},
    "32 draws": {"loss": "sampled_reverse_kl", "num_samples": 32},
    "28 + 4": {"loss": "stratified_reverse_kl", "top_k": 28, "num_samples": 4},
    "8 + 24": {"loss": "stratified_reverse_kl", "top_k": 8, "num_samples": 24},
    **{f"top 32, {form}": {"loss": loss, "top_k": 32} for form, loss in TOP_K.items()},
}


def split(r: Response):
    """(is_top bool [T,V], log-density of the sampler outside its top [T,V])."""
    is_top = torch.zeros_like(r.b, dtype=torch.bool)
    is_top.scatter_(1, r.b.topk(TOP, dim=-1).indices, True)
    return is_top, r.b.masked_fill(is_top, float("-inf")).log_softmax(-1)


def counted(ids: Tensor, values: Tensor, size: int) -> Tensor:
    """[T,V] with `values` [T,N] added up at `ids` [T,N]."""
    return values.new_zeros(len(ids), size).scatter_add_(1, ids, values)


def of_tail(r: Response, ids: Tensor, density: Tensor, m: Tensor, top_m: Tensor, cut=None):
    """Gradient from the exact top and from tail ids [T,N], each less its m ([T,N]; top: [T,1])."""
    d = r.s - r.t
    is_top, _ = split(r)
    w = (r.s.gather(1, ids) - density.gather(1, ids)).exp()
    if cut:  # of the ratio of student and sampler; w has the mass of the tail, too
        w = w.minimum(cut * (r.b.gather(1, ids) - density.gather(1, ids)).exp())
    drawn = counted(ids, w * (d.gather(1, ids) - m) / ids.shape[1], r.s.shape[1])
    exact = torch.where(is_top, r.s.exp() * (d - top_m), 0.0)
    return through_softmax(drawn + exact, r.s)


def points(shape: tuple, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def systematic(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Ids [T,count] at equal distances on the cumulated weights, from one random number a row."""
    comb = (points((len(weights), 1), generator) + torch.arange(count)) / count
    return find(weights, comb * weights.sum(-1, keepdim=True, dtype=torch.float64))


def systematic_tail(r: Response, generator) -> Tensor:
    """Two combs of 8 tail ids, each less the mean of the other."""
    _, tail = split(r)
    d = r.s - r.t
    halves = [systematic(tail.exp(), DRAWS // 2, generator) for _ in range(2)]
    means = [d.gather(1, ids).mean(-1, keepdim=True) for ids in halves]
    m = torch.cat([x.expand(-1, DRAWS // 2) for x in reversed(means)], 1)
    return of_tail(r, torch.cat(halves, 1), tail, m, m.mean(-1, keepdim=True))


def inclusion(b: Tensor, count: int) -> Tensor:
    """Probabilities min(1, x b) [T,V] that add up to `count`."""
    probs = b.double().exp()
    pi = probs * count
    for _ in range(50):  # every round fixes some at 1 and gives what they leave to the others
        is_full = pi >= 1
        left = count - is_full.sum(-1, keepdim=True)
        rest = probs.masked_fill(is_full, 0.0)
        pi = torch.where(is_full, 1.0, rest * left / rest.sum(-1, keepdim=True))
        if not (pi > 1).any():
            break
    return pi


def different_ids(r: Response, generator) -> Tensor:
    """Two sets of 16 different ids, taken with probability min(1, x b), less each other's mean."""
    d = r.s - r.t
    pi = inclusion(r.b, DRAWS)
    weights, means = [], []
    for _ in range(2):
        ids = systematic(pi, DRAWS, generator)
        w = counted(ids, (r.s.double().exp() / pi).gather(1, ids), d.shape[1])  # ids once each
        weights.append(w)
        means.append((w * d).sum(-1, keepdim=True) / w.sum(-1, keepdim=True))
    c = sum(w * (d - m) for w, m in zip(weights, reversed(means))) / 2
    return through_softmax(c.float(), r.s)


def gumbel_top(r: Response, generator) -> Tensor:
    """32 ids without replacement by Gumbel noise, with the baseline of Kool et al. (2019)."""
    count = TOP + DRAWS
    d = (r.s - r.t).double()
    noisy = r.b.double() - (-points(r.b.shape, generator).log()).log()
    best = noisy.topk(count + 1, dim=-1)
    limit = best.values[:, -1:]  # the first that is not taken
    ids = best.indices[:, :-1]
    p = r.s.double().exp().gather(1, ids)
    taken = -(-(r.b.double().gather(1, ids) - limit).exp()).expm1()  # probability, given the limit
    w, f = p / taken, d.gather(1, ids)
    others = (w * f).sum(-1, keepdim=True) - w * f + p * f
    return through_softmax(counted(ids, w * (f - others), d.shape[1]).float(), r.s)


def best_constant(r: Response, generator) -> Tensor:
    """The default with the constant m that makes the variance of a draw smallest."""
    _, tail = split(r)
    d, p = r.s - r.t, r.s.exp()
    square = 1 - 2 * p + p.square().sum(-1, keepdim=True)  # of e_y - p
    weight = tail.exp() * (2 * (r.s - tail.clamp(min=-1e4))).exp() * square
    weight = weight.masked_fill(tail.isinf(), 0.0)
    m = (weight * d).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
    ids = draw(tail.exp(), points((len(d), DRAWS), generator))
    return of_tail(r, ids, tail, m.expand(-1, DRAWS), m)


def best_proposal(r: Response, generator) -> Tensor:
    """16 tail draws from the density that is best for them: it knows student and teacher."""
    is_top, _ = split(r)
    d, p = r.s - r.t, r.s.exp()
    outside = p.masked_fill(is_top, 0.0)
    m = (outside * d).sum(-1, keepdim=True) / outside.sum(-1, keepdim=True)
    length = (1 - 2 * p + p.square().sum(-1, keepdim=True)).sqrt()  # of e_y - p
    best = outside * (d - m).abs() * length
    best = best / best.sum(-1, keepdim=True)
    ids = draw(best, points((len(d), DRAWS), generator))
    return of_tail(r, ids, best.log(), m.expand(-1, DRAWS), m)


def cut_weights(r: Response, generator) -> Tensor:
    """The default with ratios e^(s - b) of at most 2: biased."""
    _, tail = split(r)
    d = r.s - r.t
    ids = draw(tail.exp(), points((len(d), DRAWS), generator))
    drawn = d.gather(1, ids)
    others = drawn - less_others(drawn)
    return of_tail(r, ids, tail, others, others.mean(-1, keepdim=True), cut=CUT)


OTHERS = {
    "systematic tail, two halves": systematic_tail,
    "32 different ids, two halves": different_ids,
    "Gumbel top 32, Kool's baseline": gumbel_top,
    "best constant baseline (knows all ids)": best_constant,
    "best proposal (knows all ids)": best_proposal,
    f"ratios cut at {CUT:g} (biased)": cut_weights,
}


def squared_error(found: list[Response], gradient, draws: int) -> float:
    """Mean over `draws` of the squared error, sum over positions. `gradient`: (r, generator)."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for r in found:
        exact = r.exact()
        for _ in range(draws):
            total += real_model.square(gradient(r, generator) - exact)
    return total / draws


def estimators() -> dict:
    """Name -> (response, generator) -> one gradient [T,V]."""

    def of_loss(fields):
        loss = make_loss(builtin(**fields))
        return lambda r, generator: logit_gradient(loss, r, generator)

    return {name: of_loss(fields) for name, fields in LOSSES.items()} | OTHERS


def read(path: Path) -> list[dict]:
    return study.read(path, COLUMNS, {"lag": int, "estimator": str})


def table(lines: list[dict]) -> str:
    """Markdown: the squared error of every estimator, divided by that of the default."""
    rows = [f"| estimator | {' | '.join(f'lag {lag}' for lag in LAGS)} |", "|---|---|---|"]
    for name in dict.fromkeys(line["estimator"] for line in lines):
        cells = [f"{line['relative']:.2f}" for line in lines if line["estimator"] == name]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.other_estimators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--heal", type=Path, default=study.RUNS / "heal")
    parser.add_argument("--draws", type=study.at_least(1), default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    heal.prepare(args.heal)
    steps = real_model.snapshots(args.heal)
    tokenizer = load_tokenizer("--student", str(steps[0]))
    prompts = read_jsonl(str(args.heal / "held_out.jsonl"), tokenizer, 64)
    student, teacher = (
        load_model(str(path), torch.float32, CPU) for path in (steps[0], args.heal / "teacher")
    )
    lines = []
    for lag in LAGS:
        found = real_model.responses(steps[lag], student, teacher, prompts)
        whole = sum(real_model.square(r.exact()) for r in found)
        errors = {
            name: squared_error(found, gradient, args.draws) / whole
            for name, gradient in estimators().items()
        }
        for name, error in errors.items():
            lines.append(dict(zip(COLUMNS, (lag, name, error, error / errors[DEFAULT]))))
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(table(lines))


if __name__ == "__main__":
    main()
