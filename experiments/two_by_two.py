"""Where does staleness hurt, in prefixes or candidates? `python -m experiments.two_by_two`

A stale rollout is old in two ways. The student did not write its *prefixes* with its present
weights. And the *candidates* of its positions, with their density b, were proposed by the old
weights. Here each of the two is either `old`, from the weights of exactly `lag` updates ago, or
`fresh`. Where they differ, one more forward pass over the finished rollouts proposes the candidates
again. Both old is what asynchronous training does, both fresh is synchronous training; these two
come from the studies of staleness.py and real_curves.py.

What was expected, written before the first run: fresh candidates on old prefixes end where lag 0
ends, within the spread of the seeds, and old candidates on fresh prefixes end where the lag ends.
Reasons: losses that draw nothing hardly notice a lag, and their prefixes are as old as all others.
If that is so, staleness of on-policy distillation is a matter of the estimator, and one forward
pass at the learner removes it. If fresh candidates on old prefixes end as the lag does, the drift
of the rollouts is the cause, as f-OPD has it, and no estimator helps.

A line of the CSV per run. A CSV that exists is continued. `--models smollm2` needs the models of
experiments/heal.py.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments import heal, real_curves, staleness, study
from experiments.lagged import CPU, Lagged
from model import flatten_parameters
from support.load import load_model

LOSSES = {  # model -> names in the METHODS of its study
    "toy": (
        "current signal",
        "current signal + IS",
        "rollout signal + PPO clip",
        "truncated K=32",
        "stratified 16+16",
    ),
    "smollm2": ("32 draws, rollout signal, no ratio", "stratified 16+16", "edge K=32"),
}
LAGS = {"toy": (8, 32), "smollm2": (8, 40)}
SEEDS = {"toy": 5, "smollm2": 3}
MIXED = (("old", "fresh"), ("fresh", "old"))  # prefixes, candidates
KINDS = {"model": str, "loss": str, "lag": int, "prefixes": str, "candidates": str, "seed": int}
COLUMNS = (*KINDS, "accuracy", "reverse_kl", "forward_kl")
RESULTS = study.RESULTS / "two_by_two.csv"


class Swapped(Lagged):
    """A run whose prefixes and candidates may come from different weights."""

    def __init__(self, config, lag, prompts, held_out, prefixes: str, candidates: str):
        """`prefixes`, `candidates`: "fresh", or "old" for the weights of `lag` updates ago."""
        super().__init__(config, lag, prompts, held_out)
        self.lag = lag if prefixes == "old" else 0  # what `sample` goes by
        self.candidate_lag = lag if candidates == "old" else 0
        self.proposer = load_model(config.path("student"), torch.float32, CPU)
        self.proposer_weights = flatten_parameters(self.proposer)

    def sample(self, rows):
        super().sample(rows)
        if self.candidate_lag != self.lag:
            behind = min(self.candidate_lag, self.learner.version)
            self.proposer_weights.copy_(self.versions[-1 - behind])
            self.propose_again(rows)

    @torch.no_grad()
    def propose_again(self, rows):
        """Candidates of all positions of `rows`, from the weights of the proposer.

        Column 0, of losses that draw, is then a draw like the others: no longer the emitted token.
        """
        channel, proposal = self.channel, self.sampler.generator.proposal
        for row in rows:
            logits = self.logits(self.proposer, [row])  # [T,V]
            random = np.random.default_rng([self.config.seed, int(channel.ticket[row]), 1])
            uniforms = torch.from_numpy(random.random((len(logits), proposal.num_uniforms)))
            ids, logp = proposal.propose(logits, uniforms)
            channel.candidate_ids[row, : len(ids), : ids.shape[1]] = ids.int()
            channel.behavior_logp[row, : len(ids), : ids.shape[1]] = logp


@dataclass(frozen=True)
class Job:
    model: str
    loss: str
    lag: int
    prefixes: str
    candidates: str
    seed: int
    models: Path  # what heal.prepare wrote


def run(job: Job) -> list[dict]:
    """The CSV's one line of a run: what it ends with."""
    torch.set_num_threads(1)
    if job.model == "toy":
        config = staleness.setting("weak", job.loss, job.seed, steps=80)
        prompts, held_out = staleness.task()
    else:
        config, prompts, held_out = real_curves.setting(job.models, job.loss, job.seed)
    swapped = Swapped(config, job.lag, prompts, held_out, job.prefixes, job.candidates)
    (end,) = swapped.curve(config.steps, config.steps, metrics=())
    line = vars(job) | end
    return [{key: line[key] for key in COLUMNS}]


def read(path: Path) -> list[dict]:
    """Lines of a CSV with numbers; accuracy is None where the prompts have no answers."""
    return study.read(path, COLUMNS, KINDS, optional=("accuracy",))


def both(results: Path = study.RESULTS) -> list[dict]:
    """Lines of the cells where prefixes and candidates are equally old, from the other studies."""
    lines = []
    for line in staleness.read(results / "staleness.csv"):
        if line["start"] == "weak" and line["update"] == 80 and line["loss"] in LOSSES["toy"]:
            lines.append({"model": "toy", **line})
    for line in real_curves.read(results / "real_curves.csv"):
        if line["update"] == real_curves.STEPS and line["loss"] in LOSSES["smollm2"]:
            lines.append({"model": "smollm2", "accuracy": None, **line})
    for line in lines:
        line["prefixes"] = line["candidates"] = "old" if line["lag"] else "fresh"
    return lines


def make(path: Path, jobs: list[Job], workers: int = 0) -> list[dict]:
    """Append the lines of those `jobs` that the CSV does not hold; all its lines."""

    def missing(lines: list[dict]) -> list[Job]:
        held = {tuple(line[key] for key in KINDS) for line in lines}
        return [job for job in jobs if tuple(vars(job)[key] for key in KINDS) not in held]

    return study.complete(path, COLUMNS, KINDS, read, missing, run, workers)


def jobs_for(cells: list[tuple], seeds, directory: Path = real_curves.MODELS) -> list[Job]:
    """Jobs of those (model, loss, lag, prefixes, candidates) that are mixed, seed by seed."""
    return [
        Job(*cell, seed, directory)
        for seed in seeds
        for cell in dict.fromkeys(cells)
        if cell[3:] in MIXED
    ]


def grid(model: str) -> list[tuple]:
    """All mixed cells of a model."""
    return [
        (model, loss, lag, *mixed)
        for lag in LAGS[model]
        for loss in LOSSES[model]
        for mixed in MIXED
    ]


def table(lines: list[dict], model: str) -> str:
    """Markdown: what runs end with, a row for every loss and lag, a column for every cell: mean
    over seeds, lowest and highest. Accuracy in percent, or reverse KL where there are no answers.
    """
    key, unit = ("accuracy", 100) if model == "toy" else ("reverse_kl", 1)
    digits = 0 if model == "toy" else 2
    cells = (("fresh", "fresh"), ("old", "fresh"), ("fresh", "old"), ("old", "old"))
    head = " | ".join(f"{prefixes} prefixes, {ids} candidates" for prefixes, ids in cells)
    rows = [f"| loss | lag | {head} |", "|---|---|---|---|---|---|"]
    for loss in LOSSES[model]:
        for lag in LAGS[model]:
            row = [loss, str(lag)]
            for cell in cells:
                found = [
                    unit * line[key]
                    for line in lines
                    if (line["model"], line["loss"]) == (model, loss)
                    and (line["prefixes"], line["candidates"]) == cell
                    and line["lag"] == (0 if cell == cells[0] else lag)
                ]
                ends = (statistics.mean(found), min(found), max(found)) if found else ()
                words = [f"{x:.{digits}f}" for x in ends]
                row.append("{} ({} to {})".format(*words) if words else "-")
            rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.two_by_two",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=LOSSES, default=["toy"])
    parser.add_argument("--heal", type=Path, default=real_curves.MODELS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV, continued if it exists")
    parser.add_argument("--workers", type=study.at_least(0), default=0, help="0: one per core")
    args = parser.parse_args()
    if "smollm2" in args.models:
        heal.prepare(args.heal)
    jobs = [
        job
        for model in args.models
        for job in jobs_for(grid(model), range(SEEDS[model]), args.heal)
    ]
    lines = make(args.out, jobs, args.workers) + both()
    print(*(table(lines, model) for model in args.models), sep="\n\n")


if __name__ == "__main__":
    main()
