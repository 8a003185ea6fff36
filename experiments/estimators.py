"""Bias and variance of every reverse-KL estimator's gradient, at snapshots of a real run.

    python -m experiments.estimators

Letters of shapes: serial.py. T are the response tokens of one batch of stale rollouts.

At each snapshot the sampler is the student of `lag` updates ago. The target is the dense reverse-KL
gradient on the same prefixes. The expectation over the candidates is exact: losses.py gives
c = dL/ds for every id as the only draw, and

    E dL/dz = u - softmax(z) sum_y u_y,     u_y = b_y c_y  (plus c of the top-K stratum)

is carried through the model once. The variance over the candidates is that of one draw, divided by
their number; it comes from `--draws` random vectors through the model (`Spread`). The bias over all
prefixes does not average out, its scatter over prefixes and the variance of the candidates do: for
a batch of n positions the squared error is bias^2 + (scatter + variance) / n.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from experiments import study
from experiments.corrections import Corrected, second_moment_bound
from experiments.lagged import CPU, Lagged
from experiments.staleness import BASE, LAGS, METHODS, is_corrected, is_top_k, task
from losses import BASELINE_DRAWS, LOSSES, Loss, SampledReverseKL, make_loss
from model import flatten_parameters
from support.config import Config
from support.load import load_model

TRAINING = "stratified 28+4"  # the loss of the run whose snapshots are looked at
GROUPS = [range(first, first + 128) for first in (0, 128, 256, 384)]  # training prompts
BATCHES = (1_000, 10_000, 100_000, 1_000_000)  # tokens
RESULTS = study.RESULTS / "estimators.csv"
# What one draw does tells what N of them do, where they have no baseline in common.
ESTIMATORS = [
    name
    for name, fields in METHODS.items()
    if is_corrected(fields)
    or is_top_k(fields)
    or fields["loss"] == "stratified_reverse_kl"
    and fields["num_samples"] < BASELINE_DRAWS
]
KINDS = {"estimator": str, "seed": int, "update": int, "lag": int, "draws": int}
COLUMNS = (
    "seed",
    "update",
    "lag",
    "draws",
    "drift_kl",
    "estimator",
    "candidates",
    "norm",
    "bias",
    "scatter",
    "cosine",
    "variance",
)


def derivative(loss: Loss, s: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """c = dL/ds of a loss of candidates, [n,C] each."""
    s = s.detach().requires_grad_()
    (c,) = torch.autograd.grad(loss.value(s, t, b).sum(), s)
    return c


def each_alone(x: Tensor) -> Tensor:
    """[T,V] -> [T V, 1]: every id as the only candidate of a position of its own."""
    return x.reshape(-1, 1)


def in_columns(loss: Loss, columns: slice, x: Tensor) -> Tensor:
    """A table [n,C] with x in some columns. The others' s = t = b = 0 make exact zeros of terms."""
    table = x.new_zeros(len(x), loss.num_columns)
    table[:, columns] = x
    return table


def derivatives(
    config: Config, s: Tensor, t: Tensor, b: Tensor, m2_bound: float = float("inf")
) -> tuple[Tensor, Tensor, Tensor]:
    """What a loss does to the log-probability of every id, from [T,V]: three tables [T,V].

    c = dL/ds of what is summed exactly (0 outside the top-K); c of every id as the only draw; the
    density it is drawn from.
    """
    nothing = torch.zeros_like(s)
    if issubclass(LOSSES[config.loss], SampledReverseKL):
        loss = make_loss(replace(config, num_samples=1))
        loss.m2_bound = m2_bound
        c = derivative(loss, each_alone(s), each_alone(t), each_alone(b))
        return nothing, c.view_as(s), b.exp()
    if not is_top_k(vars(config)) and config.loss != "stratified_reverse_kl":
        raise ValueError(f"no expectation is known for the loss {config.loss!r}")
    loss = make_loss(replace(config, num_samples=1))
    ids = b.topk(config.top_k, dim=-1).indices
    top_s, top_t = (in_columns(loss, loss.top, x.gather(1, ids)) for x in (s, t))
    c = derivative(loss, top_s, top_t, torch.zeros_like(top_s))[:, loss.top]
    exact = nothing.scatter(1, ids, c)
    if is_top_k(vars(config)):
        return exact, nothing, nothing
    loss = make_loss(replace(config, top_k=1, num_samples=1))
    tail_b = b.scatter(1, ids, float("-inf")).log_softmax(-1)
    finite = tail_b.clamp(min=-1e4)  # the top-K has no density in the tail
    tail = (in_columns(loss, loss.tail, each_alone(x)) for x in (s, t, finite))
    c = derivative(loss, *tail)[:, loss.tail].reshape(s.shape)
    return exact, torch.where(tail_b.isfinite(), c, 0.0), tail_b.exp()


def through_softmax(u: Tensor, s: Tensor) -> Tensor:
    """Logit gradient of sum_y u_y s_y: [T,V] -> [T,V]."""
    return u - s.exp() * u.sum(-1, keepdim=True)


def expected_logit_gradient(
    config: Config, s: Tensor, t: Tensor, b: Tensor, m2_bound: float = float("inf")
) -> Tensor:
    """Mean of the loss's logit gradient over the candidates that the sampler draws, exactly:
    log-probabilities [T,V] -> [T,V].

    Draws do not interact in any of these losses (M2PO: given its threshold), so N of them have the
    mean of one.
    """
    exact, c, density = derivatives(config, s, t, b, m2_bound)
    return through_softmax(exact + density * c, s)


class Spread:
    """Covariance of the logit gradient of one draw,
    as random vectors that have it and nothing heavy in their tails.

    One draw of y gives v_y = c_y (e_y - softmax) - mean. Its covariance sum_y density_y v_y v_y^T
    is dominated by rare y with a large v_y. So y is drawn with a probability q_y in proportion to
    density_y |v_y|^2 instead, and sqrt(density_y / q_y) v_y, which has one length for all y, gets a
    random sign: positions, whose signs are independent, then do not mix on average.
    """

    def __init__(self, s: Tensor, c: Tensor, density: Tensor):
        """[T,V] each, as from `derivatives`."""
        self.s, self.c = s.double(), c.double()
        self.mean = through_softmax(density.double() * self.c, self.s)
        p = self.s.exp()
        squares = self.c**2 * (1 - 2 * p + (p * p).sum(-1, keepdim=True)) - 2 * self.c * (
            self.mean - (p * self.mean).sum(-1, keepdim=True)
        )
        self.mass = density.double() * (
            squares + (self.mean * self.mean).sum(-1, keepdim=True)
        ).clamp(min=0)
        self.total = self.mass.sum(-1)  # [T] trace of the covariance

    def sample(self, generator: torch.Generator) -> Tensor:
        """A random table [T,V] with this covariance; rows are independent."""
        y = torch.multinomial(self.mass + self.mass.new_full((), 1e-300), 1, generator=generator)
        v = torch.zeros_like(self.s).scatter(1, y, self.c.gather(1, y))
        v = through_softmax(v, self.s) - self.mean
        sign = torch.randint(0, 2, (len(v), 1), generator=generator) * 2 - 1
        return (
            sign * v * (self.total[:, None].sqrt() / v.norm(dim=-1, keepdim=True).clamp(min=1e-300))
        )


def dense_logit_gradient(s: Tensor, t: Tensor) -> Tensor:
    """Of the reverse KL itself, [T,V]."""
    return through_softmax(s.exp() * (s - t), s)


class Snapshot:
    """Student, teacher and an older sampler on one group of the sampler's rollouts;
    gradients through the student."""

    def __init__(self, lagged: Lagged, sampler, weights: Tensor, prompts: range):
        """`sampler`: a plain model whose flat parameters are `weights`.
        `prompts`: which training prompts."""
        self.parameters, parts, size = lagged.learner.parameters, [], lagged.config.batch_size
        for first in prompts[::size]:
            rows = lagged.fresh_rows(
                weights, task()[0][first : min(first + size, prompts.stop)], ticket=first
            )
            with torch.no_grad():
                frozen = [
                    lagged.logits(model, rows) for model in (sampler, lagged.teachers[0].model)
                ]
            parts.append([lagged.logits(lagged.learner.model, rows), *frozen])
        self.logits, *frozen = (torch.cat(column) for column in zip(*parts))
        self.s, self.b, self.t = (z.detach().log_softmax(-1) for z in (self.logits, *frozen))
        self.exact = self.gradient(dense_logit_gradient(self.s, self.t))

    def gradient(self, logit_gradient: Tensor) -> Tensor:
        """Of the mean over positions: [P], float64."""
        parts = torch.autograd.grad(
            self.logits, self.parameters, logit_gradient / len(self.logits), retain_graph=True
        )
        return torch.cat([part.flatten() for part in parts]).double()

    def threshold(self, config: Config, generator: torch.Generator) -> float:
        """M2PO's, of one draw of the sampler at each position."""
        loss = make_loss(config)
        if not isinstance(loss, Corrected) or not loss.correction.startswith("m2po"):
            return float("inf")
        ids = torch.multinomial(self.b.exp(), 1, generator=generator)
        squares = loss.squares(*(x.gather(1, ids) for x in (self.s, self.t, self.b)))
        return second_moment_bound(squares, is_capped=loss.correction == "m2po")

    def mean(self, config: Config, threshold: float) -> Tensor:
        """Expectation of the gradient over the candidates: [P]."""
        return self.gradient(expected_logit_gradient(config, self.s, self.t, self.b, threshold))

    def variance(self, config: Config, draws: int, generator: torch.Generator) -> float:
        """Sum over the parameters of the variance that one draw gives a position's gradient,
        mean over the positions."""
        _, c, density = derivatives(
            config, self.s, self.t, self.b, self.threshold(config, generator)
        )
        spread = Spread(self.s, c, density)
        squares = [
            float(self.gradient(spread.sample(generator).float()).square().sum())
            for _ in range(draws)
        ]
        return statistics.mean(squares) * len(self.s)


def of_different_groups(a: list[Tensor], b: list[Tensor]) -> float:
    """Product of two mean vectors, each known from several groups of prefixes:
    the groups' own noise is not in it."""
    return statistics.mean(
        float(torch.dot(x, y)) for i, x in enumerate(a) for j, y in enumerate(b) if i != j
    )


def variance_of_one_draw(groups: list[Snapshot], config: Config, draws: int, seed: int) -> float:
    """Mean over the positions of all groups, from `draws` random vectors in all;
    0 where nothing is drawn."""
    if is_top_k(vars(config)):
        return 0.0
    generator, each = torch.Generator().manual_seed(seed), -(-draws // len(groups))
    return sum(group.variance(config, each, generator) * len(group.s) for group in groups) / sum(
        len(group.s) for group in groups
    )


def measure(groups: list[Snapshot], config: Config, one_draw: float, seed: int) -> dict[str, float]:
    """Relative to the norm of the exact gradient over all prefixes (variances: to its square):
    what one estimator does.

    bias: of its mean over all prefixes, and the cosine of that mean with the exact gradient.
    scatter: variance of one position's bias over prefixes. variance: of one position over its
    candidates, `one_draw` divided by their number.
    """
    generator = torch.Generator().manual_seed(seed)
    means, exact = (
        [group.mean(config, group.threshold(config, generator)) for group in groups],
        [group.exact for group in groups],
    )
    biases = [mean - target for mean, target in zip(means, exact)]
    scale, bias, length = (
        of_different_groups(vectors, vectors) for vectors in (exact, biases, means)
    )
    scatter = statistics.mean(float(vector.square().sum()) for vector in biases) - bias
    cosine = float("nan")
    if length > 0:
        cosine = of_different_groups(means, exact) / (length * scale) ** 0.5
    return {
        "norm": scale**0.5,
        "bias": (max(bias, 0.0) / scale) ** 0.5,
        "scatter": scatter * len(groups[0].s) / scale,
        "cosine": cosine,
        "variance": one_draw / config.num_samples / scale,
    }


def at_snapshots(job: tuple[int, tuple[int, ...], int]) -> list[dict]:
    """Lines of the CSV for one (seed, updates, draws):
    a run, every estimator at every lag after those updates."""
    seed, updates, draws = job
    torch.set_num_threads(1)
    config = replace(BASE, seed=seed, lr=3e-4, steps=max(updates), **METHODS[TRAINING])
    lagged = Lagged(config, 0, *task(), keep=max(LAGS))
    sampler = load_model(config.path("student"), torch.float32, CPU)
    weights, lines = flatten_parameters(sampler), []
    for update, lag in itertools.product(updates, LAGS):
        while lagged.learner.version < update:
            lagged.update()
        weights.copy_(lagged.versions[-1 - lag])
        groups = [Snapshot(lagged, sampler, weights, prompts) for prompts in GROUPS]
        if of_different_groups([g.exact for g in groups], [g.exact for g in groups]) <= 0:
            raise RuntimeError(
                f"after {update} updates the exact gradient is lost in the noise of its prefixes: "
                "take earlier --updates"
            )
        where = {"seed": seed, "update": update, "lag": lag, "draws": draws}
        where["drift_kl"] = statistics.mean(
            float((g.b.exp() * (g.b - g.s)).sum(-1).mean()) for g in groups
        )
        one_draw: dict[Config, float] = {}
        for name in ESTIMATORS:
            estimator = replace(config, **METHODS[name])
            alone = replace(estimator, num_samples=1)  # shared by all N
            if alone not in one_draw:
                one_draw[alone] = variance_of_one_draw(groups, alone, draws, seed)
            lines.append(
                {
                    **where,
                    "estimator": name,
                    "candidates": candidates(estimator),
                    **measure(groups, estimator, one_draw[alone], seed),
                }
            )
    return lines


def candidates(config: Config) -> int:
    """Ids a position that the teacher scores for the loss."""
    loss = make_loss(config)
    has_top = loss.top.start < loss.top.stop  # then the emitted token has no part in it
    return loss.num_columns - has_top


def read(path: Path) -> list[dict]:
    """Lines of a CSV with numbers.

    Added are `deviation` (standard, of a batch of 1,000 tokens) and `error_n` of a batch of n
    tokens.
    """
    lines = study.read(path, COLUMNS, KINDS)
    for line in lines:
        noise = max(line["scatter"], 0.0) + line["variance"]
        line |= {"deviation": (line["variance"] / BATCHES[0]) ** 0.5} | {
            f"error_{n}": (line["bias"] ** 2 + noise / n) ** 0.5 for n in BATCHES
        }
    return lines


def jobs_for(
    cells: list[tuple], seeds: range, updates: tuple[int, ...] = (40,), draws: int = 24
) -> list[tuple]:
    """A run has the lines of all (estimator, lag)."""
    return [(seed, updates, draws) for seed in seeds]


def make(path: Path, jobs: list[tuple], workers: int = 0) -> list[dict]:
    """Append the lines of the seeds that the CSV does not hold; all its lines.
    `workers`: 0 is one per core."""
    _, updates, draws = jobs[0]

    def missing(lines: list[dict]) -> list[tuple]:
        if others := {(line["update"], line["draws"]) for line in lines} - {
            (update, draws) for update in updates
        }:
            sys.exit(
                f"{path} holds (update, draws) {sorted(others)}, "
                f"not {[(update, draws) for update in updates]}: give another --out"
            )
        held = {
            tuple(line[key] for key in ("seed", "update", "lag", "estimator")) for line in lines
        }
        return [
            job
            for job in jobs
            if not set(itertools.product(job[:1], updates, LAGS, ESTIMATORS)) <= held
        ]

    return study.complete(path, COLUMNS, KINDS, read, missing, at_snapshots, workers)


def summary(lines: list[dict], lag: int) -> str:
    """A line per estimator: means over seeds and snapshots at one lag."""
    chosen = [line for line in lines if line["lag"] == lag]
    drift = statistics.mean(line["drift_kl"] for line in chosen)
    rows = [
        f"lag {lag}, {drift:.2g} nats".ljust(26)
        + "  candidates   bias  cosine  st.dev. (1,000)  error of"
        + "".join(f"{n:>11,}" for n in BATCHES)
        + " tokens"
    ]
    for name in dict.fromkeys(line["estimator"] for line in chosen):
        mean = {
            key: statistics.mean(line[key] for line in chosen if line["estimator"] == name)
            for key in chosen[0]
            if key != "estimator"
        }
        errors = "".join(f"{mean[f'error_{n}']:11.3f}" for n in BATCHES)
        rows.append(
            f"{name:26s}  {mean['candidates']:10.0f}  {mean['bias']:5.3f}  {mean['cosine']:6.3f}  "
            f"{mean['deviation']:15.3f}          {errors}"
        )
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV, continued if it exists")
    parser.add_argument("--seeds", type=study.at_least(1), default=5)
    parser.add_argument(
        "--updates",
        type=study.at_least(max(LAGS)),
        nargs="+",
        default=[40],
        help=f"snapshots after these updates, at least {max(LAGS)}, the largest lag",
    )
    parser.add_argument(
        "--draws",
        type=study.at_least(1),
        default=24,
        help="random vectors that a variance comes from",
    )
    parser.add_argument(
        "--workers", type=study.at_least(0), default=0, help="processes; 0 is one per core"
    )
    args = parser.parse_args()
    lines = make(
        args.out,
        jobs_for([], range(args.seeds), tuple(sorted(args.updates)), args.draws),
        args.workers,
    )
    print(
        "\n\n".join(
            summary([line for line in lines if line["seed"] < args.seeds], lag) for lag in LAGS
        )
    )


if __name__ == "__main__":
    main()
