"""Rank the estimators of exercise 11: `python rank.py SUBMISSION... [--lags 0 8]`.

Trains the built-in student with every submission's estimator.py and with the default loss, at every
lag and seed, in the solution's tree. What counts is the reverse KL after each of the last 10
updates, summed over the vocabulary at all positions of the update's rollouts. Writes ranking.csv
and ranking.png, and prints the table, best first.

Every run has a process of its own in bubblewrap, as in grade_all.py, and a time limit. A submission
could print a result of its own: the place is no grade.
Submissions that do not pass the tests of exercise 11 are left out, unless you say --all.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sandbox import KEPT, SETTINGS, SandboxError, bubblewrap, check_bubblewrap

HERE = Path(__file__).resolve().parent
LAST = 10  # updates that count
LIMIT = 900.0  # seconds of a run
DEFAULT = "default: stratified 16 + 16"


def reverse_kl(run):
    """KL(student || teacher), a mean over the positions of the rollouts at hand."""
    from kernels.head import head_logits
    from model import head_weight, response_hidden

    rows = list(range(run.config.table_rows))
    logp = []
    for model in (run.learner.model, run.teachers[0].model):
        hidden = response_hidden(model, run.channel, rows).detach()
        logits = head_logits(hidden, head_weight(model).detach())
        logp.append(logits.double().log_softmax(-1))
    return float((logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean())


def train(tree: str, loss: str, lag: str, updates: str, seed: str):
    """Print the mean reverse KL of the last updates."""
    os.chdir(tree)
    sys.path[0] = tree
    import torch

    import losses
    from serial import Serial
    from support.config import parse
    from support.data import load_prompts
    from support.load import load_tokenizer

    torch.set_num_threads(1)
    flags = ["--plugin", "estimator.py", "--loss", loss]
    flags += ["--max-staleness", lag, "--steps", updates, "--seed", seed]
    config = parse(flags)
    losses.LOSSES[loss].propose = losses.Proposal.propose  # no other counts
    tokenizer = load_tokenizer("--student", config.path("student"))
    run = Serial(config, int(lag), *load_prompts(config, tokenizer))
    found = []
    for _ in range(config.steps):
        run.update()
        found = [*found, reverse_kl(run)][-LAST:]
    print(f"\n{sum(found) / len(found)}")


def result(tree: Path, *arguments, sandboxed: bool):
    """Start `train`: (reverse KL, ""), or (inf, why there is none)."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= dict.fromkeys(SETTINGS, "1")
    files = [tree, HERE / "rank.py", HERE / "sandbox.py"]
    command = [*bubblewrap(files)] * sandboxed
    command += [sys.executable, str(HERE / "rank.py"), "--train", str(tree), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out:
        try:
            code = subprocess.run(command, env=environment, stdout=out, stderr=out, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return float("inf"), f"not done after {LIMIT:.0f} s"
        out.seek(0)
        last = (out.read().splitlines() or [""])[-1]
    try:
        value = float(last)
    except ValueError:
        return float("inf"), last
    is_possible = code.returncode == 0 and 0 < value < float("inf")
    return (value, "") if is_possible else (float("inf"), f"{last} is no reverse KL")


def admitted(paths, wants_all: bool, sandboxed: bool):
    """name -> estimator.py, in bytes, of the submissions that have all points of exercise 11."""
    import grade_all
    import submission

    grades = {}

    def done(name, report):
        grades[name] = grade_all.reports.grades_of(report)

    if not wants_all:
        exercise = grade_all.chosen([11])
        grade_all.grade_class(paths, exercise, 1, grade_all.LIMIT, done, sandboxed)
    found = {}
    for path in paths:
        name = submission.name_of(path)
        with submission.opened(path, ["estimator.py"]) as (place, _):
            data, why = submission.read_file(place / "estimator.py")
        grade = grades.get(name, {"points": 0, "max": 0, "blocked": 0})
        if data is None or grade["points"] < grade["max"]:
            why = f"estimator.py {why}" if why else f"{grade_all.reports.in_words(grade)}"
            print(f"{name} is left out: {why}")
        else:
            found[name] = data
    return found


def run(name: str, estimator: bytes | None, lag: int, seed: int, args):
    """Reverse KL of one run. Without an estimator: of the default loss."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(HERE / "solution", Path(place, "tree"))
        if estimator is not None:
            Path(place, "tree", "estimator.py").write_bytes(estimator)
        loss = "stratified_reverse_kl" if estimator is None else "mine"
        tree, sandboxed = Path(place, "tree").resolve(), not args.unsandboxed
        value, why = result(tree, loss, lag, args.updates, seed, sandboxed=sandboxed)
    print(f"{name}, lag {lag}, seed {seed}: {why or f'{value:.4f}'}", flush=True)
    return value


def run_all(named: dict, args):
    """name -> lag -> reverse KL at every seed."""
    runs = {name: {lag: [] for lag in args.lags} for name in named}
    todo = [(name, lag, seed) for name in named for lag in args.lags for seed in range(args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        values = pool.map(lambda one: run(one[0], named[one[0]], *one[1:], args), todo)
        for (name, lag, _), value in zip(todo, values):
            runs[name][lag].append(value)
    return runs


def draw(means: dict, lags, file: Path):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    axes = Figure(figsize=(7, 4)).subplots()
    for name, values in means.items():
        axes.plot(lags, values, "ko--" if name == DEFAULT else "o-", label=name)
    axes.set(xlabel="lag, updates", ylabel="reverse KL, nats a token", yscale="log", xticks=lags)
    axes.legend(frameon=False)
    axes.figure.savefig(file, dpi=100, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("submissions", type=Path, nargs="+", metavar="SUBMISSION")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2, help="runs at every lag")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--all", action="store_true", help="rank what fails the tests, too")
    parser.add_argument(
        "--unsandboxed", action="store_true", help="without bubblewrap: submissions run as you"
    )
    args = parser.parse_args()
    try:
        if not args.unsandboxed:
            check_bubblewrap()
    except SandboxError as error:
        sys.exit(f"rank.py: error: {error}")
    named = {DEFAULT: None} | admitted(args.submissions, args.all, not args.unsandboxed)
    runs = run_all(named, args)
    with open("ranking.csv", "w", newline="") as file:
        lines = [(name, lag, *values) for name, of in runs.items() for lag, values in of.items()]
        seeds = [f"seed {seed}" for seed in range(args.seeds)]
        csv.writer(file).writerows([("submission", "lag", *seeds), *lines])
    means = {name: [sum(x) / len(x) for x in of.values()] for name, of in runs.items()}
    means = dict(sorted(means.items(), key=lambda pair: sum(pair[1])))
    print("\n" + "submission".ljust(40), *(f"lag {lag:<6d}" for lag in args.lags))
    for name, values in means.items():
        print(name.ljust(40), *(f"{value:<10.4f}" for value in values))
    draw(means, args.lags, Path("ranking.png"))


if __name__ == "__main__":
    train(*sys.argv[2:]) if sys.argv[1:2] == ["--train"] else main()
