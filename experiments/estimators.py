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

from config import Config
from experiments.lagged import CPU, Lagged
from experiments.staleness import BASE, LAGS, LOSSES, append, task
from generate import draws_per_position, propose
from kernels.head import unfused_loss
from losses import make_loss, second_moment_threshold, sparse_reverse_kl, stratified_reverse_kl
from model import flatten_parameters, load_model

TRAINING = "stratified 28+4"  # the loss of the run whose snapshots are looked at
BATCHES = (1_000, 10_000, 100_000, 1_000_000)  # tokens
RESULTS = Path("experiments/results/estimators.csv")
COLUMNS = ("seed", "update", "lag", "estimator", "candidates", "positions", "drift_kl", "norm", "bias", "cosine", "repulsion", "variance")


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


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


class Snapshot:
    """Student, teacher and an older sampler on one batch of the sampler's rollouts; gradients through the student."""

    def __init__(self, lagged: Lagged, sampler, weights: Tensor):
        """`sampler`: a plain model whose flat parameters are set to `weights`."""
        rows = lagged.fresh_rows(weights, lagged.held[: lagged.config.batch_size], ticket=lagged.learner.version * 1000)
        self.parameters = lagged.learner.parameters
        self.logits = lagged.logits(lagged.learner.model, rows)
        with torch.no_grad():
            self.sampler_logits, teacher_logits = (lagged.logits(model, rows) for model in (sampler, lagged.teacher.model))
            self.s, self.b, self.t = (z.detach().log_softmax(-1) for z in (self.logits, self.sampler_logits, teacher_logits))
        self.exact = self.gradient(dense_logit_gradient(self.s, self.t))
        kl = (self.s.exp() * (self.s - self.t)).sum(-1, keepdim=True)
        self.repulsion = self.gradient(kl * (self.b.exp() - self.s.exp())).double()

    def gradient(self, logit_gradient: Tensor) -> Tensor:
        """G of the mean over positions, flat."""
        parts = torch.autograd.grad(self.logits, self.parameters, logit_gradient / len(self.logits), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def draw(self, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Candidates as the generator draws them: ids and their behavior_logp, [P,C]."""
        uniforms = torch.rand(len(self.s), draws_per_position(config.loss, config.num_samples), dtype=torch.float64, generator=generator)
        return propose(self.sampler_logits, uniforms, config.loss, config.top_k)

    def measure(self, config: Config, draws: int, seed: int) -> dict[str, float]:
        """Relative to the exact gradient's norm: bias, cosine of the mean with it, variance (a squared norm).

        `repulsion` is the cosine of the bias with the gradient of KL(s || t) (b - p): what a signal of mean KL > 0 does to the
        samples of a stale sampler when nothing weights them, push the student away from where the sampler is.
        """
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
            "cosine": cosine(mean, exact), "repulsion": cosine(mean - exact, self.repulsion),
        }  # fmt: skip


def at_snapshot(job: tuple[int, int, int]) -> list[dict]:
    """Lines of the CSV for one (seed, update, draws): the run up to `update`, then every estimator at every lag there."""
    seed, update, draws = job
    torch.set_num_threads(1)
    config = replace(BASE, seed=seed, lr=3e-4, steps=80, **LOSSES[TRAINING])
    lagged = Lagged(config, 0, *task(), keep=max(LAGS))
    for _ in range(update):
        lagged.update()
    sampler = load_model(config.student_path, torch.float32, CPU)
    weights, lines = flatten_parameters(sampler), []
    for lag in LAGS:
        weights.copy_(lagged.versions[-1 - lag])
        snapshot = Snapshot(lagged, sampler, weights)
        where = {"seed": seed, "update": update, "lag": lag, "positions": len(snapshot.s)}
        drift = float((snapshot.b.exp() * (snapshot.b - snapshot.s)).sum(-1).mean())
        for name, fields in LOSSES.items():
            if fields["loss"] != "forward_kl":
                estimator = replace(config, **fields)
                columns = estimator.columns["total"].stop
                lines.append({**where, "estimator": name, "candidates": columns, "drift_kl": drift, **snapshot.measure(estimator, draws, seed)})
    return lines


def read(path: Path) -> list[dict]:
    """Lines of a CSV with numbers, and `error_M`: the relative squared error bias^2 + variance P / M of a batch of M tokens."""
    with open(path, newline="") as file:
        lines = [{k: v if k == "estimator" else float(v) for k, v in line.items()} for line in csv.DictReader(file)]
    for line in lines:
        line |= {f"error_{m}": line["bias"] ** 2 + line["variance"] * line["positions"] / m for m in BATCHES}
    return lines


def jobs_for(cells: set[tuple], seeds: range, updates=(40, 80), draws: int = 50) -> list[tuple[int, int, int]]:
    """Every snapshot has all cells."""
    return [(seed, update, draws) for seed in seeds for update in updates]


def study(path: Path, jobs: list[tuple[int, int, int]], workers: int = 0) -> list[dict]:
    """Append the lines of those `jobs` that the CSV does not hold; all its lines. `workers`: 0 is one per core."""
    done = {(line["seed"], line["update"]) for line in read(path)} if path.exists() else set()
    if jobs := [job for job in jobs if job[:2] not in done]:
        append(path, COLUMNS, at_snapshot, jobs, workers)
    return read(path)


def summary(lines: list[dict], lag: int) -> str:
    """A line per estimator: means over seeds and snapshots at one lag."""
    rows = [f"lag {lag:2d}                     candidates    bias  st.dev.   error of {'  '.join(f'{m:>9,}' for m in BATCHES)} tokens"]
    for name in dict.fromkeys(line["estimator"] for line in lines):
        chosen = [line for line in lines if line["estimator"] == name and line["lag"] == lag]
        mean = {key: sum(line[key] for line in chosen) / len(chosen) for key in chosen[0] if key != "estimator"}
        errors = "  ".join(f"{mean[f'error_{m}'] ** 0.5:9.3f}" for m in BATCHES)
        rows.append(f"{name:26s} {mean['candidates']:10.0f}  {mean['bias']:6.3f}  {mean['variance'] ** 0.5:7.3f}            {errors}")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV, continued if it exists")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, nargs="+", default=[40, 80], help="snapshots after these updates")
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 is one per core")
    args = parser.parse_args()
    if min(args.updates) < max(LAGS):
        parser.error(f"--updates {min(args.updates)}: a snapshot needs at least {max(LAGS)} updates, the largest lag")
    lines = study(args.out, jobs_for(set(), range(args.seeds), args.updates, args.draws), args.workers)
    print("\n\n".join(summary(lines, lag) for lag in LAGS))


if __name__ == "__main__":
    main()
