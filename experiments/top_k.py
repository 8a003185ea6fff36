"""What do the top K of a student tell about all other ids? `python -m experiments.top_k`

Every form of reverse KL over the sampler's top K has the derivatives c_k = p_k (D_k - m) with
D = log p - log q, for student p and teacher q. It is exact at the logits of the top K if m is
`mean_rest`, the mean of D over the rest, weighted by p. docs/topk.md derives that. Here both are
compared, position by position, for several guesses m that need the top K alone.

A position counts by the mass of its rest: its error in the gradient is p_k times that mass times
(mean_rest - m). A line of the CSV for every model, moment, lag, K and guess:

    outside  mean mass of the rest
    truth    mean of mean_rest
    bias     mean of m - mean_rest
    rms      root of the mean of (m - mean_rest)^2, all three in nats, weighted as said

The toy model is that of staleness.py after some updates, SmolLM2 that of real_model.py.
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

from experiments import heal, real_model, staleness, study
from experiments.lagged import CPU, Lagged
from losses import rest
from support.data import read_jsonl
from support.load import load_model, load_tokenizer

SIZES = (8, 16, 32, 64)
COLUMNS = ("model", "moment", "lag", "k", "guess", "outside", "truth", "bias", "rms")
RESULTS = study.RESULTS / "top_k.csv"
MOMENTS = (0, 20, 60)  # updates of the toy model
PROMPTS = 32  # held-out prompts of the toy task that it answers


def guesses(s: Tensor, t: Tensor) -> dict[str, Tensor]:
    """m of each form, from log-probabilities of the top K in descending order: [T,K] each -> [T].

    The last one is that of losses.SparseReverseKL.
    """

    def mean_and_ratio(first: int) -> tuple[Tensor, Tensor]:
        """Of the ids from rank `first` on: the mean of D, and the log-ratio of their masses."""
        p, q = s[:, first:], t[:, first:]
        mean = (p.softmax(-1) * (p - q)).sum(-1)
        return mean, p.logsumexp(-1) - q.logsumexp(-1)

    bucket = (rest(s.exp().sum(-1)) / rest(t.exp().sum(-1))).log()
    mean, ratio = mean_and_ratio(0)
    edge, edge_ratio = mean_and_ratio(s.shape[1] // 4)
    return {
        "-1 (truncated)": torch.full_like(mean, -1.0),
        "0 (score)": torch.zeros_like(mean),
        "mean of the top (centred, renormalised)": mean,
        "mass of the rest (bucket)": bucket,
        "bucket + KL inside the top": bucket + mean - ratio,
        "A: mean of the edge": edge,
        "B: bucket + KL inside the edge": bucket + edge - edge_ratio,
        "the mean of these two": edge + (bucket - edge_ratio) / 2,
        "the larger of these two (edge)": edge + (bucket - edge_ratio).clamp(min=0),
    }


def lines_of(s: Tensor, t: Tensor, b: Tensor, where: dict) -> list[dict]:
    """Lines of the CSV from log-probabilities of all ids at many positions: [T,V] each."""
    lines = []
    p, d = s.exp(), s - t
    for k in SIZES:
        top = b.topk(k, dim=-1).indices
        inside = p.gather(1, top)
        outside = rest(inside.sum(-1))
        mean_rest = ((p * d).sum(-1) - (inside * d.gather(1, top)).sum(-1)) / outside
        weight = outside / outside.sum()
        for name, m in guesses(s.gather(1, top), t.gather(1, top)).items():
            miss = m - mean_rest
            numbers = {
                "outside": outside.mean(),
                "truth": (weight * mean_rest).sum(),
                "bias": (weight * miss).sum(),
                "rms": (weight * miss.square()).sum().sqrt(),
            }
            numbers = {key: float(x) for key, x in numbers.items()}
            lines.append({**where, "k": k, "guess": name, **numbers})
    return lines


def toy() -> list[dict]:
    """The student of the study after some updates without lag, on its own rollouts."""
    prompts, held_out = staleness.task()
    config = staleness.setting("weak", "stratified 16+16", seed=0, steps=max(MOMENTS))
    lagged, lines = Lagged(config, 0, prompts, held_out), []
    for step in range(max(MOMENTS) + 1):
        if step in MOMENTS:
            rows = lagged.fresh_rows(lagged.versions[-1], held_out[:PROMPTS])
            models = (lagged.learner.model, lagged.teachers[0].model)
            with torch.no_grad():
                s, t = (lagged.logits(model, rows).double().log_softmax(-1) for model in models)
            lines += lines_of(s, t, s, {"model": "toy", "moment": step, "lag": 0})
        if step < max(MOMENTS):
            lagged.update()
    return lines


def smollm2(models: Path) -> list[dict]:
    """The damaged model, and the one after 40 updates, on rollouts of its own and of older ones."""
    heal.prepare(models)
    steps = real_model.snapshots(models)
    tokenizer = load_tokenizer("--student", str(steps[0]))
    prompts = read_jsonl(str(models / "held_out.jsonl"), tokenizer, 64)
    teacher = load_model(str(models / "teacher"), torch.float32, CPU)
    first, last = max(steps), min(steps)
    lines = []
    for student_lag, sampler_lag in ((first, first), (last, last), (last, 8), (last, first)):
        student = load_model(str(steps[student_lag]), torch.float32, CPU)
        found = real_model.responses(steps[sampler_lag], student, teacher, prompts)
        tables = (torch.cat([getattr(r, name) for r in found]) for name in "stb")
        lag = sampler_lag - student_lag
        where = {"model": "SmolLM2", "moment": real_model.UPDATES - student_lag, "lag": lag}
        lines += lines_of(*tables, where)
    return lines


def read(path: Path) -> list[dict]:
    kinds = {"model": str, "moment": int, "lag": int, "k": int, "guess": str}
    return study.read(path, COLUMNS, kinds)


def table(lines: list[dict], k: int = 32) -> str:
    """Markdown: root mean square and bias of every guess, a column for every model and moment."""
    lines = [line for line in lines if line["k"] == k]
    places = list(dict.fromkeys((line["model"], line["moment"], line["lag"]) for line in lines))
    words = [f"{m}, {u} updates{f', lag {lag}' * (lag > 0)}" for m, u, lag in places]
    rows = [f"| guess m | {' | '.join(words)} |", "|---|" + "---|" * len(places)]
    for guess in dict.fromkeys(line["guess"] for line in lines):
        found = [line for line in lines if line["guess"] == guess]
        cells = [f"{line['rms']:.2f} ({line['bias']:+.2f})" for line in found]
        rows.append(f"| {guess} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.top_k",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--heal", type=Path, default=study.RUNS / "heal")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = toy() + smollm2(args.heal)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(table(lines))


if __name__ == "__main__":
    main()
