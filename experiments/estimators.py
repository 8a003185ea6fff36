"""Bias and variance of every reverse-KL estimator's gradient, at snapshots of a real run: `python -m experiments.estimators`.

    P  positions of one batch of stale rollouts     V  vocabulary     G  gradient with respect to the parameters

At each snapshot the sampler is the student of `lag` updates ago. The target is the dense reverse-KL gradient on the same
prefixes. The expectation over the candidates is exact: losses.py gives c = dL/ds for every id as the only draw, and

    E dL/dz = u - softmax(z) sum_y u_y,     u_y = b_y c_y  (plus c of the top-K stratum)

is carried through the model once. The variance of G is that of `--draws` independent draws of all candidates. The bias over
all prefixes does not average out, its scatter over prefixes and the variance of the candidates do: for a batch of M
positions the squared error is bias^2 + (scatter + variance) / M.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
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
GROUPS = (*((first, 128) for first in (0, 128, 256, 384)), (512, 32))  # (first training prompt, prompts); the last for draws
BATCHES = (1_000, 10_000, 100_000, 1_000_000)  # tokens
RESULTS = Path("experiments/results/estimators.csv")
COLUMNS = ("seed", "update", "lag", "draws", "drift_kl", "estimator", "candidates", "norm", "bias", "scatter", "cosine", "variance")


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

    Draws do not interact in any of these losses (M2PO: given its threshold), so N of them have the mean of one.
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
            finite = each_alone(tail_b).clamp(min=-1e4)  # the top-K stratum has no density in the tail, and b_y c_y = 0
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
    """Student, teacher and an older sampler on one group of the sampler's rollouts; gradients through the student."""

    def __init__(self, lagged: Lagged, sampler, weights: Tensor, prompts: range):
        """`sampler`: a plain model whose flat parameters are `weights`. `prompts`: which training prompts."""
        self.parameters, parts, size = lagged.learner.parameters, [], lagged.config.batch_size
        for first in prompts[::size]:
            rows = lagged.fresh_rows(weights, task()[0][first : min(first + size, prompts.stop)], ticket=first)
            with torch.no_grad():
                frozen = [lagged.logits(model, rows) for model in (sampler, lagged.teacher.model)]
            parts.append([lagged.logits(lagged.learner.model, rows), *frozen])
        self.logits, self.sampler_logits, teacher_logits = (torch.cat(column) for column in zip(*parts))
        self.s, self.b, self.t = (z.detach().log_softmax(-1) for z in (self.logits, self.sampler_logits, teacher_logits))
        self.exact = self.gradient(dense_logit_gradient(self.s, self.t))

    def gradient(self, logit_gradient: Tensor) -> Tensor:
        """G of the mean over positions, flat, float64."""
        parts = torch.autograd.grad(self.logits, self.parameters, logit_gradient / len(self.logits), retain_graph=True)
        return torch.cat([part.flatten() for part in parts]).double()

    def draw(self, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Candidates as the generator draws them: ids and their behavior_logp, [P,C]."""
        uniforms = torch.rand(len(self.s), draws_per_position(config.loss, config.num_samples), dtype=torch.float64, generator=generator)
        return propose(self.sampler_logits, uniforms, config.loss, config.top_k)

    def threshold(self, config: Config, generator: torch.Generator) -> float | None:
        """M2PO's, of one draw."""
        if config.correction != "m2po":
            return None
        ids, b = self.draw(config, generator)
        return second_moment_threshold(self.s.gather(1, ids) - b)

    def mean(self, config: Config, threshold: float | None) -> Tensor:
        """Expectation of G over the candidates."""
        return self.gradient(expected_logit_gradient(config, self.s, self.t, self.b, threshold))

    def variance(self, config: Config, draws: int, generator: torch.Generator) -> float:
        """Sum over the parameters of G's variance around its mean, times the positions: that of one position."""
        threshold, total = self.threshold(config, generator), 0.0
        mean = self.mean(config, threshold)
        for _ in range(draws):
            ids, b = self.draw(config, generator)
            _, _, g = unfused_loss(make_loss(config, threshold), self.logits.detach().clone(), ids, self.t.gather(1, ids), b, torch.float32)
            total += float((self.gradient(g) - mean).square().sum()) / draws
        return total * len(self.s)


def of_different_groups(a: list[Tensor], b: list[Tensor]) -> float:
    """Product of two mean vectors, each known from several groups of prefixes: the groups' own noise is not in it."""
    return statistics.mean(float(torch.dot(x, y)) for i, x in enumerate(a) for j, y in enumerate(b) if i != j)


def measure(groups: list[Snapshot], small: Snapshot, config: Config, draws: int, seed: int) -> dict[str, float]:
    """Relative to the norm of the exact gradient over all prefixes (variances: to its square): what one estimator does.

    bias: of its mean over all prefixes, and the cosine of that mean with the exact gradient. scatter: variance of one position's
    bias over prefixes. variance: of one position's candidates, by draws on the group `small`; 0 where nothing is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    means, exact = [group.mean(config, group.threshold(config, generator)) for group in groups], [group.exact for group in groups]
    biases = [mean - target for mean, target in zip(means, exact)]
    scale, bias, length = (of_different_groups(vectors, vectors) for vectors in (exact, biases, means))
    scatter = statistics.mean(float(vector.square().sum()) for vector in biases) - bias
    return {
        "norm": scale**0.5, "bias": (max(bias, 0.0) / scale) ** 0.5, "scatter": scatter * len(groups[0].s) / scale,
        "cosine": of_different_groups(means, exact) / (length * scale) ** 0.5 if length > 0 else float("nan"),
        "variance": small.variance(config, draws, generator) / scale if config.loss != "sparse_reverse_kl" else 0.0,
    }  # fmt: skip


def at_snapshots(job: tuple[int, tuple[int, ...], int]) -> list[dict]:
    """Lines of the CSV for one (seed, updates, draws): a run, every estimator at every lag after those updates."""
    seed, updates, draws = job
    torch.set_num_threads(1)
    config = replace(BASE, seed=seed, lr=3e-4, steps=max(updates), **LOSSES[TRAINING])
    lagged = Lagged(config, 0, *task(), keep=max(LAGS))
    sampler = load_model(config.student_path, torch.float32, CPU)
    weights, lines = flatten_parameters(sampler), []
    for update, lag in itertools.product(updates, LAGS):
        while lagged.learner.version < update:
            lagged.update()
        weights.copy_(lagged.versions[-1 - lag])
        *groups, small = (Snapshot(lagged, sampler, weights, range(first, first + size)) for first, size in GROUPS)
        if of_different_groups([g.exact for g in groups], [g.exact for g in groups]) <= 0:
            raise RuntimeError(f"after {update} updates the exact gradient is lost in the noise of its prefixes: take earlier --updates")
        where = {"seed": seed, "update": update, "lag": lag, "draws": draws}
        where["drift_kl"] = statistics.mean(float((g.b.exp() * (g.b - g.s)).sum(-1).mean()) for g in groups)
        for name, fields in LOSSES.items():
            if fields["loss"] != "forward_kl":
                estimator = replace(config, **fields)
                lines.append({**where, "estimator": name, "candidates": candidates(estimator), **measure(groups, small, estimator, draws, seed)})
    return lines


def candidates(config: Config) -> int:
    """Ids a position that the teacher scores for the loss."""
    sizes = {"sampled_reverse_kl": config.num_samples, "sparse_reverse_kl": config.top_k, "stratified_reverse_kl": config.top_k + config.num_samples}
    return sizes[config.loss]


def read(path: Path) -> list[dict]:
    """Lines of a CSV with numbers, `deviation` (standard, of a batch of 1,000 tokens) and `error_M` of a batch of M tokens."""
    with open(path, newline="") as file:
        lines = [{k: v if k == "estimator" else int(v) if k in ("seed", "update", "lag") else float(v) for k, v in line.items()}
                 for line in csv.DictReader(file)]  # fmt: skip
    for line in lines:
        noise = max(line["scatter"], 0.0) + line["variance"]
        line |= {"deviation": (line["variance"] / BATCHES[0]) ** 0.5} | {f"error_{m}": (line["bias"] ** 2 + noise / m) ** 0.5 for m in BATCHES}
    return lines


def jobs_for(cells: list[tuple], seeds: range, updates: tuple[int, ...] = (40,), draws: int = 50) -> list[tuple]:
    """A run has the lines of all (estimator, lag)."""
    return [(seed, updates, draws) for seed in seeds]


def study(path: Path, jobs: list[tuple], workers: int = 0) -> list[dict]:
    """Append the lines of the seeds that the CSV does not hold; all its lines. `workers`: 0 is one per core."""
    done = {line["seed"] for line in read(path)} if path.exists() else set()
    if jobs := [job for job in jobs if job[0] not in done]:
        append(path, COLUMNS, at_snapshots, jobs, workers)
    return read(path)


def summary(lines: list[dict], lag: int) -> str:
    """A line per estimator: means over seeds and snapshots at one lag."""
    chosen = [line for line in lines if line["lag"] == lag]
    drift = statistics.mean(line["drift_kl"] for line in chosen)
    rows = [f"lag {lag}, {drift:.2g} nats".ljust(26) + "  candidates   bias  cosine  st.dev. (1,000)  error of" + "".join(f"{m:>11,}" for m in BATCHES) + " tokens"]
    for name in dict.fromkeys(line["estimator"] for line in chosen):
        mean = {key: statistics.mean(line[key] for line in chosen if line["estimator"] == name) for key in chosen[0] if key != "estimator"}
        errors = "".join(f"{mean[f'error_{m}']:11.3f}" for m in BATCHES)
        rows.append(f"{name:26s}  {mean['candidates']:10.0f}  {mean['bias']:5.3f}  {mean['cosine']:6.3f}  {mean['deviation']:15.3f}          {errors}")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV, continued if it exists")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, nargs="+", default=[40], help="snapshots after these updates")
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 is one per core")
    args = parser.parse_args()
    if min(args.updates) < max(LAGS):
        parser.error(f"--updates {min(args.updates)}: a snapshot needs at least {max(LAGS)} updates, the largest lag")
    lines = study(args.out, jobs_for([], range(args.seeds), tuple(sorted(args.updates)), args.draws), args.workers)
    print("\n\n".join(summary(lines, lag) for lag in LAGS))


if __name__ == "__main__":
    main()
