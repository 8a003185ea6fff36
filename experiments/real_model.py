"""Estimators of reverse KL on a real model: bias and variance of the gradient with respect to the logits.

    python -m experiments.heal && python -m experiments.real_model

It takes the healed student of experiments/heal.py as the current weights, and as sampler the student of `lag` updates ago, from the
checkpoints of that run. The sampler writes one response to each held-out prompt. At every position the exact gradient is known
(V = 49,152). Each estimator draws its candidates `--draws` times there, through the project's own `propose` and `value`.

    bias      |mean over the draws - exact|^2     for the sparse loss, which draws nothing; 0 by theory for the others
    variance  |one gradient - exact|^2, mean over the draws, less the bias

Both are sums over positions, divided by the sum of |exact|^2. In a batch of M positions the variance counts 1/M, the bias in full. The
standard error is over prompts (jackknife). Under lag single weights may be so large that they decide the sum: then read the median over
prompts. The first table says how much of the sampler's mass its top K hold.
"""

import argparse
import csv
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from channel import Rollout
from checks import load_model, load_tokenizer
from config import Config
from data import read_jsonl
from experiments.heal import CPU, NEW_TOKENS
from experiments.study import RESULTS, RUNS, at_least
from generate import Generator
from kernels.head import gather, head_logits
from losses import Proposal, make_loss
from model import head_weight, last_hidden, predicting_positions, stop_ids

ESTIMATORS = {
    "32 draws, no baseline": {"loss": "plain_sampled", "num_samples": 32},
    "32 draws": {"loss": "sampled_reverse_kl", "num_samples": 32},
    "stratified 28+4": {"loss": "stratified_reverse_kl", "top_k": 28, "num_samples": 4},
    "stratified 24+8": {"loss": "stratified_reverse_kl", "top_k": 24, "num_samples": 8},
    "stratified 16+16, no baseline": {"loss": "plain_stratified", "top_k": 16, "num_samples": 16},
    "stratified 16+16": {"loss": "stratified_reverse_kl", "top_k": 16, "num_samples": 16},
    "stratified 8+24": {"loss": "stratified_reverse_kl", "top_k": 8, "num_samples": 24},
    "top 31 + emitted (EMA-PG)": {"loss": "top_k_and_emitted", "top_k": 31},
    "sparse K=32": {"loss": "sparse_reverse_kl", "top_k": 32},
}
COLUMNS = ("lag", "drift_kl", "estimator", "bias", "bias_error", "variance", "variance_error", "variance_median")
MASSES = (1, 4, 16, 28, 32, 64)


@dataclass
class Positions:
    """Of one prompt: logits of the current student, and what student, teacher and sampler say of every id, [P,V] each."""

    z: torch.Tensor
    s: torch.Tensor
    t: torch.Tensor
    b: torch.Tensor


@torch.no_grad()
def positions(sampler_dir: Path, student, teacher, prompts) -> list[Positions]:
    tokenizer = load_tokenizer("--student", str(sampler_dir))
    sampler = load_model(str(sampler_dir), torch.float32, CPU, attention="kv_slots")
    config = Config(max_prompt_tokens=64, max_new_tokens=NEW_TOKENS)
    generator = Generator(sampler, Proposal(), config, stop_ids(str(sampler_dir), tokenizer), len(head_weight(sampler)), slots=12)
    rollouts = generator.generate([Rollout(prompt.ids, ticket) for ticket, prompt in enumerate(prompts)])
    behavior, found = load_model(str(sampler_dir), torch.float32, CPU), []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        span = predicting_positions(len(rollout.prompt_ids), ids.shape[1])
        z, *others = (head_logits(last_hidden(model, ids)[0, span], head_weight(model)) for model in (student, teacher, behavior))
        found.append(Positions(z, z.log_softmax(-1), *(x.log_softmax(-1) for x in others)))
    return found


def logit_gradient(loss, p: Positions, uniforms):
    """The gradient of one draw of the candidates: [P,V]."""
    ids, behavior = loss.propose(p.b.clone(), uniforms)
    s, _ = gather(p.z, ids)
    s.requires_grad_()
    (c,) = torch.autograd.grad(loss.value(s, p.t.gather(1, ids), behavior).sum(), s)
    return (-c.sum(-1, keepdim=True) * p.s.exp()).scatter_add_(1, ids, c)


def squares(config, p: Positions, draws: int, generator) -> tuple[float, float, float]:
    """(bias, variance, |exact|^2), each summed over the positions of one prompt."""
    loss, d = make_loss(config), p.s - p.t
    exact = p.s.exp() * (d - (p.s.exp() * d).sum(-1, keepdim=True))
    total = float(exact.square().sum())
    shape = (len(p.s), loss.num_uniforms)
    if config.loss == "sparse_reverse_kl":
        return float((logit_gradient(loss, p, torch.rand(shape, dtype=torch.float64)) - exact).square().sum()), 0.0, total
    errors = (logit_gradient(loss, p, torch.rand(shape, dtype=torch.float64, generator=generator)) - exact for _ in range(draws))
    return 0.0, sum(float(error.square().sum()) for error in errors) / draws, total


def ratio(parts, wholes):
    """(sum of parts / sum of wholes, its standard error over prompts by the jackknife)."""
    n, a, b = len(parts), sum(parts), sum(wholes)
    left_out = [(a - x) / (b - y) for x, y in zip(parts, wholes)]
    mean = sum(left_out) / n
    return a / b, ((n - 1) / n * sum((x - mean) ** 2 for x in left_out)) ** 0.5


def print_masses(found: list[Positions]):
    top = torch.cat([p.b.exp().topk(max(MASSES)).values for p in found]).cumsum(-1)
    print("mass of the sampler's top K: mean, and quantiles over positions of 5, 50, 95 %")
    for k in MASSES:
        mass = top[:, k - 1]
        print(f"  K = {k:2d}: {mass.mean():.3f}; " + ", ".join(f"{mass.quantile(q):.3f}" for q in (0.05, 0.5, 0.95)))


def main():
    parser = argparse.ArgumentParser("python -m experiments.real_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heal", type=Path, default=RUNS / "heal", help="the --out of experiments.heal")
    parser.add_argument("--draws", type=at_least(1), default=4, help="times that every estimator draws at a position")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_model.csv")
    args = parser.parse_args()
    steps = {int(path.name[5:]): path for path in (args.heal / "run").glob("step_*")} | {0: args.heal / "student"}
    if len(steps) < 2:
        sys.exit(f"real_model: error: no checkpoints in {args.heal}/run: run python -m experiments.heal first")
    newest = max(steps)
    prompts = read_jsonl(str(args.heal / "held_out.jsonl"), load_tokenizer("--student", str(steps[newest])), 64)
    student, teacher = (load_model(str(path), torch.float32, CPU) for path in (steps[newest], args.heal / "teacher"))
    lines = []
    for step in sorted(steps, reverse=True):
        found = positions(steps[step], student, teacher, prompts)
        drift = torch.cat([(p.b.exp() * (p.b - p.s)).sum(-1) for p in found]).mean()
        print(f"lag {newest - step} updates, {drift:.2g} nats; {sum(len(p.s) for p in found)} positions of {len(found)} prompts")
        if step == newest:
            print_masses(found)
        for name, fields in ESTIMATORS.items():
            generator = torch.Generator().manual_seed(0)
            columns = list(zip(*(squares(Config(**fields), p, args.draws, generator) for p in found)))
            bias, variance = (ratio(column, columns[2]) for column in columns[:2])
            median = statistics.median(part / whole for _, part, whole in zip(*columns))
            lines.append(dict(zip(COLUMNS, (newest - step, float(drift), name, *bias, *variance, median))))
            text = f"bias {bias[0]:.3f} +- {bias[1]:.3f}   variance {variance[0]:.3g} +- {variance[1]:.2g}, median {median:.3g}"
            print(f"  {name:30s} {text}", flush=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
