"""The figures of docs/staleness.md from the CSVs beside them: `python -m experiments.figures` (needs matplotlib, extra [plots]).

Points are means over seeds, bars run from the lowest to the highest seed. Colours are Okabe and Ito's; every line also
has a marker of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from experiments.staleness import LAGS, read  # noqa: E402

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999933")
MARKERS = "os^vDPX*"
ONE_SAMPLE = ("rollout signal", "rollout signal + IS", "current signal", "current signal + IS", "rollout signal + PPO clip", "decoupled", "M2PO")
CANDIDATES = ("forward KL 16", "dense reverse KL", "current signal + IS, N=16", "current signal + IS, N=64", "sparse K=16", "sparse K=64",
              "stratified 12+4", "stratified 28+4")  # fmt: skip
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8}


def style(i: int) -> dict:
    return {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "markersize": 5, "linewidth": 1.3, "capsize": 2}


def spread(axis, xs, groups: list[list[float]], label: str, i: int):
    """Means with bars from the lowest to the highest; markers of different lines side by side."""
    means = [statistics.mean(group) for group in groups]
    bars = [[m - min(g) for m, g in zip(means, groups)], [max(g) - m for m, g in zip(means, groups)]]
    axis.errorbar([x + 0.03 * (i - 3.5) for x in xs], means, bars, label=label, **style(i))


def accuracy(lines: list[dict], metric: str, start: str, out: Path):
    """Final accuracy (or divergence) against lag, one panel for one-sample losses, one for many candidates."""
    last = max(line["update"] for line in lines)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, names, title in zip(axes, (ONE_SAMPLE, CANDIDATES), ("one sample a position", "more candidates")):
        for i, name in enumerate(names):
            chosen = [line for line in lines if (line["start"], line["loss"], line["update"]) == (start, name, last)]
            lags = [lag for lag in LAGS if any(line["lag"] == lag for line in chosen)]
            if lags:
                spread(axis, [LAGS.index(lag) for lag in lags], [[c[metric] for c in chosen if c["lag"] == lag] for lag in lags], name, i)
        axis.set(title=title, xlabel="lag, updates", xticks=range(len(LAGS)), xticklabels=LAGS)
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    axes[0].set_ylabel(f"{metric.replace('_', ' ')} after {last} updates")
    if metric != "accuracy":
        axes[0].set_yscale("log")
    figure.savefig(out, dpi=160, bbox_inches="tight")


def estimators(path: Path, out: Path):
    """Bias and standard deviation of the gradient, relative to the exact gradient's norm, against lag."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    names = ("rollout signal", "current signal", "rollout signal + PPO clip", "current signal + IS", "current signal + IS, N=16", "sparse K=16",
             "sparse K=32", "stratified 12+4")  # fmt: skip
    for axis, key, title in zip(axes, ("bias", "variance"), ("bias (does not average out)", "standard deviation (averages out over positions)")):
        for i, name in enumerate(names):
            groups = [[float(r[key]) ** (0.5 if key == "variance" else 1) for r in lines if r["estimator"] == name and int(r["lag"]) == lag] for lag in LAGS]
            if max(map(max, groups)) > 1e-5:  # float32's zero is no point on a logarithmic axis
                spread(axis, range(len(LAGS)), [[max(x, 1e-4) for x in group] for group in groups], name, i)
        axis.set(title=title, xlabel="lag, updates", xticks=range(len(LAGS)), xticklabels=LAGS, yscale="log")
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    axes[0].set_ylabel("relative to the exact gradient")
    figure.savefig(out, dpi=160, bbox_inches="tight")


def frontier(path: Path, out: Path):
    """Tokens/s, lag and seconds to 90 % against --max-staleness."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3))
    losses = list(dict.fromkeys(line["loss"] for line in lines))
    values = sorted({int(line["max_staleness"]) for line in lines})
    for axis, key, title in zip(axes, ("tokens_per_second", "lag_mean", "seconds_to_90"), ("tokens / s", "mean lag, updates", "seconds to 90 %")):
        for i, (loss, order) in enumerate((loss, order) for loss in losses for order in ("batch", "arrival")):
            groups = {v: [float(r[key]) for r in lines if (r["loss"], r["order"], int(r["max_staleness"])) == (loss, order, v) and r[key]] for v in values}
            groups = {v: group for v, group in groups.items() if group}
            if groups:
                spread(axis, [values.index(v) for v in groups], list(groups.values()), f"{loss}, {order} order", i)
        axis.set(title=title, xlabel="--max-staleness", xticks=range(len(values)), xticklabels=values, ylim=(0, None))
    axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3)
    figure.savefig(out, dpi=160, bbox_inches="tight")


def timelines(traces: dict[str, Path], out: Path, window: float = 2.0):
    """Who works when: `window` seconds out of the middle of each trace.json."""
    figure, axes = plt.subplots(len(traces), 1, figsize=(9, 1.5 * len(traces)), sharex=True, squeeze=False)
    for axis, (title, path) in zip(axes[:, 0], traces.items()):
        events = json.loads(path.read_text())
        tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
        spans = [e for e in events if e["ph"] == "X" and e["name"] != "evaluate"]
        begin = statistics.median(e["ts"] for e in spans)
        for e in spans:
            if begin <= e["ts"] + e["dur"] and e["ts"] <= begin + window * 1e6:
                axis.barh(e["tid"], e["dur"] / 1e6, left=(e["ts"] - begin) / 1e6, color=COLOURS[(5, 3, 4)[e["tid"] % 3]], height=0.8)
        axis.set(title=title, yticks=list(tracks), yticklabels=list(tracks.values()), xlim=(0, window))
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(out, dpi=160)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    parser.add_argument("--traces", type=Path, nargs=2, metavar=("SYNC", "ASYNC"), help="trace.json of a synchronous and an asynchronous run")
    args = parser.parse_args()
    if (path := args.results / "staleness.csv").exists():
        lines = read(path)
        for start in sorted({line["start"] for line in lines}):
            accuracy(lines, "accuracy", start, args.results / f"accuracy_{start}.png")
            accuracy(lines, "reverse_kl", start, args.results / f"reverse_kl_{start}.png")
    if (path := args.results / "estimators.csv").exists():
        estimators(path, args.results / "estimators.png")
    if (path := args.results / "frontier.csv").exists():
        frontier(path, args.results / "frontier.png")
    if args.traces:
        timelines({"synchronous": args.traces[0], "asynchronous (--max-staleness 1)": args.traces[1]}, args.results / "timelines.png")


if __name__ == "__main__":
    main()
