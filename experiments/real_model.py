"""Estimators of reverse KL on a real model: bias and variance of the gradient, and the mass that
the top ids hold.

    python -m experiments.real_model

The task is that of experiments/heal.py: SmolLM2 without six of its layers learns from the whole
model. After 40 updates of synchronous training the student of `lag` updates ago is the sampler; at
lag 40 that is the damaged model. It writes one response to each held-out prompt. There the exact
gradient is known, and each estimator draws candidates through the project's own `propose` and
`value`. The gradient is looked at in three spaces:

    logits      [V] at a position
    hidden      [F], the last hidden state at a position
    parameters  all of them, summed over a response: J^T g, carried through the model and folded by
                random signs (`Pullback`)

For each space and estimator, in units of the exact gradient's square:

    variance  over the candidates: mean |one gradient - exact|^2, summed over positions, or over
              responses in `parameters`
    bias      of a top K alone, which draws nothing: |its gradient - exact|^2 position by position;
              in `parameters` of the mean over responses, in units of the mean exact gradient's
              square

The line "prompts and prefixes" is what responses scatter around their mean, per token: the noise
that no estimator removes. Standard errors are over prompts (jackknife; that line's with its mean
held fixed). Under lag single weights may be so large that they decide the sum: then read the median
over prompts.
"""

import argparse
import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

import experiments.corrections  # noqa: F401  it adds to losses.LOSSES
from channel import Rollout
from experiments import heal, study
from experiments.heal import CPU, NEW_TOKENS, respond, response_logits
from experiments.lagged import Lagged
from experiments.staleness import TOP_K, is_top_k
from experiments.study import RESULTS, RUNS, at_least
from kernels.head import gather
from losses import Loss, make_loss
from model import head_weight
from support.config import builtin
from support.data import read_jsonl
from support.load import load_model, load_tokenizer

ESTIMATORS = {
    "32 draws, no baseline": {"loss": "sampled_current_is", "num_samples": 32},
    "32 draws": {"loss": "sampled_reverse_kl", "num_samples": 32},
    "stratified 28+4": {"loss": "stratified_reverse_kl", "top_k": 28, "num_samples": 4},
    "stratified 24+8": {"loss": "stratified_reverse_kl", "top_k": 24, "num_samples": 8},
    "stratified 16+16, no baseline": {"loss": "plain_stratified", "top_k": 16, "num_samples": 16},
    "stratified 16+16": {"loss": "stratified_reverse_kl", "top_k": 16, "num_samples": 16},
    "stratified 8+24": {"loss": "stratified_reverse_kl", "top_k": 8, "num_samples": 24},
    "top 31 + emitted (EMA-PG)": {"loss": "top_k_and_emitted", "top_k": 31},
    **{f"{form} K=32": {"loss": loss, "top_k": 32} for form, loss in TOP_K.items()},
}
PREFIXES = "prompts and prefixes"
COLUMNS = (
    "lag",
    "drift_kl",
    "space",
    "estimator",
    "bias",
    "bias_error",
    "variance",
    "variance_error",
    "variance_median",
)
MASSES = (1, 4, 16, 28, 32, 64)
UPDATES, LAGS = 40, (0, 1, 8, 40)
FOLDED = 65536  # numbers that a gradient of all parameters is folded into


def snapshots(models: Path) -> dict[int, Path]:
    """The student of each of LAGS updates before the last, by lag; trained once."""
    directories = {lag: models / "snapshots" / f"step_{UPDATES - lag}" for lag in LAGS}
    if not all((path / "config.json").exists() for path in directories.values()):
        student, teacher = str(models / "student"), str(models / "teacher")
        config = builtin(
            student=student,
            teacher=teacher,
            batch_size=16,
            slots=16,
            lr=2e-4,
            max_prompt_tokens=64,
            max_new_tokens=NEW_TOKENS,
            micro_batch_tokens=1024,
            head_chunk=256,
        )
        tokenizer = load_tokenizer("--student", student)
        lagged = Lagged(config, 0, read_jsonl(str(models / "prompts.jsonl"), tokenizer, 64), [])
        for step in range(UPDATES + 1):
            if UPDATES - step in LAGS:
                lagged.save(directories[UPDATES - step])
            if step < UPDATES:
                reverse_kl = lagged.update()["reverse_kl"]
                print(f"update {step + 1} of {UPDATES}: reverse KL {reverse_kl:.3f}", flush=True)
    return directories


@dataclass
class Response:
    """One response, and what current student, teacher and sampler say of every id at its positions,
    [T,V] each.
    """

    rollout: Rollout
    z: Tensor  # logits of the current student
    s: Tensor
    t: Tensor
    b: Tensor

    def exact(self) -> Tensor:
        """dKL(student || teacher)/dz."""
        p, d = self.s.exp(), self.s - self.t
        return p * (d - (p * d).sum(-1, keepdim=True))


@torch.no_grad()
def responses(sampler_dir: Path, student, teacher, prompts) -> list[Response]:
    sampler = load_model(str(sampler_dir), torch.float32, CPU)
    found = []
    for rollout in respond(sampler_dir, [prompt.ids for prompt in prompts]):
        z, t, b = (response_logits(model, rollout) for model in (student, teacher, sampler))
        found.append(Response(rollout, z, *(x.log_softmax(-1) for x in (z, t, b))))
    return found


def logit_gradient(loss: Loss, r: Response, generator: torch.Generator) -> Tensor:
    """The gradient of one draw of the candidates: [T,V]."""
    uniforms = torch.rand(len(r.s), loss.num_uniforms, dtype=torch.float64, generator=generator)
    ids, behavior = loss.propose(r.b.clone(), uniforms)
    s, _ = gather(r.z, ids)
    s.requires_grad_()
    (c,) = torch.autograd.grad(loss.value(s, r.t.gather(1, ids), behavior).sum(), s)
    return (-c.sum(-1, keepdim=True) * r.s.exp()).scatter_add_(1, ids, c)


class Pullback:
    """J^T g of logit gradients g [T,V] of one response: the gradient with respect to all
    parameters, folded to [FOLDED].

    Entries get random signs, always the same, and those that are FOLDED apart are added. The inner
    product of two folded gradients is then, on average over the signs, that of the gradients. The
    error of a square is about sqrt(2 / FOLDED), 0.6 % of it.
    """

    def __init__(self, model):
        self.model = model
        self.parameters = list(model.parameters())
        count = sum(p.numel() for p in self.parameters)
        self.signs = (
            torch.randint(
                0, 2, (count,), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
            )
            * 2
            - 1
        )

    def of(self, rollout: Rollout):
        """The function g -> J^T g of one response."""
        z = response_logits(self.model, rollout)

        def pull(g: Tensor) -> Tensor:
            parts = torch.autograd.grad(z, self.parameters, g, retain_graph=True)
            return self.fold(torch.cat([part.flatten() for part in parts]))

        return pull

    def fold(self, flat: Tensor) -> Tensor:
        signed = flat * self.signs
        return pad(signed, (0, -len(signed) % FOLDED)).view(-1, FOLDED).sum(0)


def read(path: Path) -> list[dict]:
    return study.read(path, COLUMNS, {"lag": int, "space": str, "estimator": str})


def table(lines: list[dict], space: str) -> str:
    """Markdown: the variance of every estimator at every lag, of a top K alone the bias."""

    def cell(value: float, error: float) -> str:
        digits = sum(value < limit for limit in (0.1, 1, 10))
        return f"{value:.{digits}f} ± {error:.{digits}f}"

    rows = []
    for name in dict.fromkeys(line["estimator"] for line in lines if line["space"] == space):
        here = [line for line in lines if (line["space"], line["estimator"]) == (space, name)]
        is_biased = any(line["bias"] for line in here)
        key = "bias" if is_biased else "variance"
        cells = [name + ": bias" * is_biased, *(cell(x[key], x[f"{key}_error"]) for x in here)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def square(x: Tensor) -> float:
    return float(x.square().sum())


def ratio(parts, wholes):
    """(sum of parts / sum of wholes, its standard error over prompts by the jackknife)."""
    part = sum(parts)
    whole = sum(wholes)
    return part / whole, jackknife([(part - x) / (whole - y) for x, y in zip(parts, wholes)])


def median_ratio(parts, wholes) -> float:
    return statistics.median(part / whole for part, whole in zip(parts, wholes))


def jackknife(left_out) -> float:
    """Standard error of a statistic from its values without one prompt each."""
    return (statistics.pvariance(left_out) * (len(left_out) - 1)) ** 0.5


def bias_of_mean(errors: Tensor, exact: Tensor):
    """(|mean error|^2 / |mean exact|^2, its standard error), of gradients [prompts, FOLDED].

    Both squares are means of the products of two different responses. So what a response scatters
    around the mean is in neither.
    """

    def crossed(x: Tensor) -> float:
        return square(x.sum(0)) - square(x)

    others = ~torch.eye(len(exact), dtype=torch.bool)
    left_out = [crossed(errors[kept]) / crossed(exact[kept]) for kept in others]
    return crossed(errors) / crossed(exact), jackknife(left_out)


def measure(name: str, found: list[Response], head: Tensor, pulls, folded: Tensor, draws: int):
    """Yield the columns of the CSV from `space` on, for each space.

    `pulls`: the function g -> J^T g of every response. `folded`: their exact gradients [prompts,
    FOLDED].
    """
    loss = make_loss(builtin(**ESTIMATORS[name]))
    generator = torch.Generator().manual_seed(0)
    draws_nothing = is_top_k(ESTIMATORS[name])
    draws = 1 if draws_nothing else draws
    squares = {"logits": [], "hidden": []}  # of the errors, a number for each response
    wholes = {"logits": [], "hidden": []}  # of the exact gradients
    errors = []  # of the gradients of all parameters
    for r, pull in zip(found, pulls):
        exact = r.exact()
        drawn = [logit_gradient(loss, r, generator) - exact for _ in range(draws)]
        for space, to_space in (("logits", lambda g: g), ("hidden", lambda g: g @ head)):
            squares[space].append(statistics.mean(square(to_space(error)) for error in drawn))
            wholes[space].append(square(to_space(exact)))
        errors.append(pull(drawn[0]))
    squares["parameters"] = [square(e) for e in errors]
    wholes["parameters"] = [square(g) for g in folded]
    for space in squares:
        each = ratio(squares[space], wholes[space])
        if draws_nothing:
            bias = bias_of_mean(torch.stack(errors), folded) if space == "parameters" else each
            yield space, name, *bias, 0.0, 0.0, 0.0
        else:
            yield space, name, 0.0, 0.0, *each, median_ratio(squares[space], wholes[space])


def prefix_noise(found: list[Response], folded: Tensor):
    """The line of PREFIXES: the variance of a response's gradient, less its length times the mean
    per token.
    """
    lengths = torch.tensor([[float(len(r.s))] for r in found])
    rest = folded - lengths * (folded.sum(0) / lengths.sum())
    parts = [square(x) * len(found) / (len(found) - 1) for x in rest]
    wholes = [square(g) for g in folded]
    return "parameters", PREFIXES, 0.0, 0.0, *ratio(parts, wholes), median_ratio(parts, wholes)


def print_masses(found: list[Response]):
    top = torch.cat([r.b.exp().topk(max(MASSES)).values for r in found]).cumsum(-1)
    print("mass of the sampler's top K: mean, and quantiles over positions of 5, 50, 95 %")
    for k in MASSES:
        mass = top[:, k - 1]
        print(
            f"  K = {k:2d}: {mass.mean():.3f}; "
            + ", ".join(f"{mass.quantile(q):.3f}" for q in (0.05, 0.5, 0.95))
        )


def exact_drift(found: list[Response]) -> list[Tensor]:
    """KL(sampler || student) at the positions of each response."""
    return [(r.b.exp() * (r.b - r.s)).sum(-1) for r in found]


def print_drift(found: list[Response]):
    """The exact drift, and how well two estimates from the emitted tokens know it."""
    emitted = []  # b - s of the tokens of each response
    for r in found:
        ids = torch.tensor(r.rollout.response_ids)[:, None]
        emitted.append((r.b - r.s).gather(1, ids)[:, 0])
    estimates = {
        "exact": exact_drift(found),
        "drift_kl": emitted,
        "drift_k3": [(-d).expm1() + d for d in emitted],
    }
    for name, drifts in estimates.items():
        mean, error = ratio([float(d.sum()) for d in drifts], [len(d) for d in drifts])
        print(f"  {name:8s} {mean:9.2e} +- {error:.1e} nats")


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--heal",
        type=Path,
        default=RUNS / "heal",
        help="the --out of experiments.heal; what is not there is made",
    )
    parser.add_argument(
        "--draws",
        type=at_least(1),
        default=4,
        help="times that every estimator draws at a position; once for `parameters`",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "real_model.csv")
    args = parser.parse_args()
    heal.prepare(args.heal)
    steps = snapshots(args.heal)
    prompts = read_jsonl(
        str(args.heal / "held_out.jsonl"), load_tokenizer("--student", str(steps[0])), 64
    )
    student, teacher = (
        load_model(str(path), torch.float32, CPU) for path in (steps[0], args.heal / "teacher")
    )
    pullback = Pullback(student.requires_grad_(True))
    lines = []
    for lag, sampler in steps.items():
        found = responses(sampler, student, teacher, prompts)
        print(
            f"lag {lag} updates; {sum(len(r.s) for r in found)} positions of {len(found)} prompts"
        )
        print_drift(found)
        if lag == 0:
            print_masses(found)
        drift = float(torch.cat(exact_drift(found)).mean())
        pulls = [pullback.of(r.rollout) for r in found]
        folded = torch.stack([pull(r.exact()) for r, pull in zip(found, pulls)])
        rows = [prefix_noise(found, folded)]
        for name in ESTIMATORS:
            rows += measure(name, found, head_weight(student).detach(), pulls, folded, args.draws)
        for row in rows:
            lines.append(dict(zip(COLUMNS, (lag, drift, *row))))
            space, name, bias, bias_error, variance, error, median = row
            print(
                f"  {space:10s} {name:30s} bias {bias:.3f} +- {bias_error:.3f}   "
                f"variance {variance:.3g} +- {error:.2g}, median {median:.3g}",
                flush=True,
            )
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(*(table(lines, space) for space in ("logits", "parameters")), sep="\n\n")


if __name__ == "__main__":
    main()
