"""Bias and variance of every reverse-KL estimator's gradient, at snapshots of a real run: `python -m experiments.estimators`.

    P  positions of one batch of stale rollouts     V  vocabulary     G  gradient with respect to the parameters

At each snapshot the sampler is the student of `lag` updates ago. Everything is conditioned on the batch's prefixes: the
target is the dense reverse-KL gradient on the same prefixes. The expectation over the candidates is exact: losses.py gives
c = dL/ds for every id as the only draw, and

    E dL/dz = u - softmax(z) sum_y u_y,     u_y = b_y c_y  (plus the exact columns' c)

is carried through the model once. The variance of G is that of `--draws` independent draws of all candidates. Bias does not
average out over positions and variance does: for a batch of M positions the squared error is bias^2 + variance * P / M.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from experiments.lagged import CPU, Lagged
from experiments.staleness import BASE, LAGS, LOSSES, task
from generate import Rollout, draws_per_position, propose, write_rollout
from kernels.head import head_logits, unfused_loss
from losses import make_loss, second_moment_threshold, sparse_reverse_kl, stratified_reverse_kl
from model import flatten_parameters, head_weight, load_model
from teacher import response_hidden

TRAINING = "stratified 28+4"  # the loss of the run whose snapshots are looked at
COLUMNS = ("update", "lag", "estimator", "candidates", "positions", "drift_kl", "norm", "bias", "cosine", "variance")


def derivative(loss, s: Tensor) -> Tensor:
    """c = dL/ds of a loss [n] of log-probabilities s [n,k]."""
    s = s.detach().requires_grad_()
    (c,) = torch.autograd.grad(loss(s).sum(), s)
    return c


def each_alone(x: Tensor) -> Tensor:
    """[P,V] -> [P V, 1]: every id as the only candidate of a position of its own."""
    return x.reshape(-1, 1)


def expected_logit_gradient(config: Config, s: Tensor, t: Tensor, b: Tensor, m2_threshold: float | None = None) -> Tensor:
    """Mean of the loss's logit gradient over the candidates that the sampler draws, exactly: log-probabilities [P,V] -> [P,V].

    Draws do not interact in any of these losses, so N of them have the mean of one.
    """
    if config.loss == "sampled_reverse_kl":
        loss = make_loss(replace(config, num_samples=1), m2_threshold)
        u = b.exp() * derivative(lambda x: loss(x, each_alone(t), each_alone(b)), each_alone(s)).view_as(s)
    else:
        ids = b.topk(config.top_k, dim=-1).indices
        top_s, top_t = s.gather(1, ids), t.gather(1, ids)
        if config.loss == "sparse_reverse_kl":
            u = torch.zeros_like(s).scatter(1, ids, derivative(lambda x: sparse_reverse_kl(x, top_t), top_s))
        else:
            nothing = s.new_zeros(len(s), 1)
            tail_b = b.scatter(1, ids, float("-inf")).log_softmax(-1)
            finite = each_alone(tail_b).clamp(min=-1e4)  # the exact columns have no density in the tail, and b_y c_y = 0
            none = s.new_zeros(s.numel(), 0)
            c = derivative(lambda x: stratified_reverse_kl(none, none, x, each_alone(t), finite), each_alone(s)).view_as(s)
            u = torch.where(tail_b.isfinite(), tail_b.exp() * c, 0.0)
            u = u.scatter(1, ids, derivative(lambda x: stratified_reverse_kl(x, top_t, nothing, nothing, nothing), top_s))
    return u - s.exp() * u.sum(-1, keepdim=True)


def dense_logit_gradient(s: Tensor, t: Tensor) -> Tensor:
    """Of the reverse KL itself, [P,V]."""
    u = s.exp() * (s - t)
    return u - s.exp() * u.sum(-1, keepdim=True)


class Snapshot:
    """Student, teacher and an older sampler on one batch of the sampler's rollouts; gradients through the student."""

    def __init__(self, lagged: Lagged, sampler, weights: Tensor):
        """`sampler`: a plain model whose flat parameters are set to `weights`."""
        rows = range(lagged.config.batch_size)
        lagged.weights.copy_(weights)
        rollouts = [Rollout(prompt.ids, ticket=lagged.learner.version * 1000 + row, row=row) for row, prompt in zip(rows, lagged.held)]
        for rollout in rollouts:
            lagged.channel.tokens[rollout.row, : len(rollout.prompt_ids)] = torch.tensor(rollout.prompt_ids, dtype=torch.int32)
            lagged.channel.prompt_len[rollout.row] = len(rollout.prompt_ids)
        for rollout in lagged.plain.generate(rollouts):
            write_rollout(lagged.channel, rollout)
        self.parameters = lagged.learner.parameters

        def logits(model) -> Tensor:
            hidden = response_hidden(model, lagged.channel, [r.row for r in rollouts])
            return head_logits(hidden, head_weight(model)[: lagged.vocab], 1.0 / lagged.config.temperature)

        self.logits = logits(lagged.learner.model)
        with torch.no_grad():
            self.sampler_logits = logits(sampler)
            self.s, self.b, self.t = (z.detach().log_softmax(-1) for z in (self.logits, self.sampler_logits, logits(lagged.teacher.model)))
        self.exact = self.gradient(dense_logit_gradient(self.s, self.t))

    def gradient(self, logit_gradient: Tensor) -> Tensor:
        """G of the mean over positions, flat."""
        parts = torch.autograd.grad(self.logits, self.parameters, logit_gradient / len(self.logits), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def draw(self, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Candidates as the generator draws them: ids and their behavior_logp, [P,C]."""
        uniforms = torch.rand(len(self.s), draws_per_position(config.loss, config.num_samples), dtype=torch.float64, generator=generator)
        return propose(self.sampler_logits, uniforms, config.loss, config.top_k)

    def measure(self, config: Config, draws: int, seed: int) -> dict[str, float]:
        """Relative to the exact gradient's norm: bias, cosine of the mean with it, variance (a squared norm)."""
        generator, threshold = torch.Generator().manual_seed(seed), None
        if config.correction == "m2po":
            ids, b = self.draw(config, generator)
            threshold = second_moment_threshold(self.s.gather(1, ids) - b)
        mean, exact = self.gradient(expected_logit_gradient(config, self.s, self.t, self.b, threshold)).double(), self.exact.double()
        scale, variance = exact.norm(), 0.0
        for _ in range(draws if config.loss != "sparse_reverse_kl" else 0):  # sparse: nothing is random
            ids, b = self.draw(config, generator)
            _, _, g = unfused_loss(make_loss(config, threshold), self.logits.detach().clone(), ids, self.t.gather(1, ids), b, torch.float32)
            variance += float((self.gradient(g) - mean).square().sum()) / draws
        return {
            "norm": float(scale), "bias": float((mean - exact).norm() / scale), "variance": variance / float(scale) ** 2,
            "cosine": float(torch.dot(mean, exact) / (mean.norm() * scale)),
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/estimators.csv"))
    parser.add_argument("--updates", type=int, nargs="+", default=[40, 80, 120], help="snapshots after these updates")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: fields for name, fields in LOSSES.items() if fields["loss"] != "forward_kl"}
    config = replace(BASE, seed=args.seed, lr=args.lr, steps=max(args.updates), **LOSSES[TRAINING])
    lagged = Lagged(config, 0, *task(), keep=max(LAGS))
    sampler = load_model(config.student_path, torch.float32, CPU)
    weights = flatten_parameters(sampler)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        bar = tqdm(total=len(args.updates) * len(LAGS) * len(settings), unit="estimator")
        for update in args.updates:
            while lagged.learner.version < update:
                lagged.update()
            for lag in LAGS:
                weights.copy_(lagged.versions[-1 - lag])
                snapshot = Snapshot(lagged, sampler, weights)
                drift = float((snapshot.b.exp() * (snapshot.b - snapshot.s)).sum(-1).mean())
                for name, fields in settings.items():
                    estimator = replace(config, **fields)
                    line = snapshot.measure(estimator, args.draws, args.seed)
                    writer.writerow({"update": update, "lag": lag, "estimator": name, "candidates": estimator.columns["total"].stop,
                                     "positions": len(snapshot.s), "drift_kl": drift, **line})  # fmt: skip
                    file.flush()
                    bar.update()


if __name__ == "__main__":
    main()
