"""The figures of docs/staleness.md from the CSVs beside them: `python -m experiments.figures` (needs matplotlib, extra [plots]).

Points are means over seeds, bars run from the lowest to the highest seed. Colours are Okabe and Ito's; every line also
has a marker of its own. The timelines come from two runs' trace.json, of which `--traces` keeps two seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path

try:
    import matplotlib
except ImportError:
    raise SystemExit("the figures need matplotlib: pip install matplotlib") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import estimators, frontier, staleness
from experiments.claims import cells
from experiments.study import RESULTS

BLACK, GREY, ORANGE, SKY, GREEN = "#000000", "#888888", "#E69F00", "#56B4E9", "#009E73"
RED, BLUE, PINK, OLIVE = "#D55E00", "#0072B2", "#CC79A7", "#999933"
STYLE = {  # one for each loss, in all figures
    "forward KL 16": (BLACK, "o"), "forward KL 32": (BLACK, "o"), "dense reverse KL": (OLIVE, "s"),
    "rollout signal": (RED, "v"), "rollout signal + IS": (PINK, "P"), "rollout signal + PPO clip": (GREEN, "D"), "decoupled": (SKY, "X"), "M2PO": (OLIVE, "*"),
    "current signal": (ORANGE, "^"), "current signal, N=16": (ORANGE, "<"), "current signal + IS": (BLUE, "o"), "current signal + IS, N=16": (SKY, "s"),
    "current signal + IS, N=32": (BLUE, "s"), "rollout signal + IS, N=16": (GREY, "P"), "sparse K=16": (RED, "X"), "sparse K=32": (RED, "*"),
    "stratified 12+4": (PINK, "D"), "stratified 28+4": (GREEN, "P"),
}  # fmt: skip
ONE_SAMPLE = ("rollout signal", "rollout signal + IS", "current signal", "current signal + IS", "rollout signal + PPO clip", "decoupled", "M2PO")
CANDIDATES = ("forward KL 16", "dense reverse KL", "current signal, N=16", "rollout signal + IS, N=16", "current signal + IS, N=16",
              "current signal + IS, N=32", "sparse K=32", "stratified 12+4", "stratified 28+4")  # fmt: skip
ESTIMATORS = ("rollout signal", "rollout signal + PPO clip", "current signal", "current signal + IS", "current signal + IS, N=16", "current signal + IS, N=32",
              "sparse K=32", "stratified 12+4", "stratified 28+4")  # fmt: skip
SEEDS = 5  # the marker of a point of fewer is hollow
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8}


def spread(axis, points: dict, name: str, i: int, label: str = "", dashed: bool = False):
    """Line i of a panel through the means of points {x: [a value per seed]}, bars from lowest to highest; lines stand side by side."""
    means = [statistics.mean(group) for group in points.values()]
    bars = [[m - min(g) for m, g in zip(means, points.values())], [max(g) - m for m, g in zip(means, points.values())]]
    colour, marker = STYLE[name]
    look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.3, "linestyle": "--" if dashed else "-", "capsize": 2, "clip_on": False}
    axis.errorbar([x + 0.03 * (i - 4) for x in points], means, bars, label=label or name, **look)
    for (x, group), mean in zip(points.items(), means):
        if len(group) < SEEDS:
            axis.plot(x + 0.03 * (i - 4), mean, color=colour, marker=marker, markersize=6, markerfacecolor="white", zorder=3)


def over(axis, values: dict[tuple, dict[int, float]], cell, xs: tuple, name: str, i: int, **look):
    """Line i: the cell `cell(x)` for every x of a categorical axis that has one."""
    points = {place: list(values[cell(x)].values()) for place, x in enumerate(xs) if cell(x) in values}
    if points:
        spread(axis, points, name, i, **look)
    axis.set(xticks=range(len(xs)), xticklabels=xs)


def against_lag(lines: list[dict], metric: str, start: str, out: Path):
    """Final accuracy or divergence against lag: one panel for one sample a position, one for more candidates."""
    values = cells("staleness", lines, metric)
    lags = [lag for lag in staleness.LAGS if any(cell[0] == start and cell[2] == lag for cell in values)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, names, title in zip(axes, (ONE_SAMPLE, CANDIDATES), ("one sample a position", "more candidates")):
        for i, name in enumerate(names):
            over(axis, values, lambda lag: (start, name, lag), lags, name, i)  # noqa: B023
        axis.set(title=title, xlabel="lag, updates")
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    label, scale = {"accuracy": ("accuracy", "linear"), "reverse_kl": ("reverse KL, nats a token,", "log")}[metric]
    axes[0].set_ylabel(f"{label} after {max(line['update'] for line in lines)} updates")
    axes[0].set_yscale(scale)
    figure.savefig(out, dpi=160, bbox_inches="tight")


def save_with_legend(figure, axis, out: Path):
    """Panels side by side, one legend below for all."""
    figure.subplots_adjust(wspace=0.35)
    figure.legend(*axis.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=4)
    figure.savefig(out, dpi=160, bbox_inches="tight")


def bias_and_variance(lines: list[dict], out: Path, lag: int = 8):
    """Bias and standard deviation of the gradient against lag, and the error at one lag against the batch.

    Linear below 0.01, so that what is exactly unbiased is seen lying at 0.
    """
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
    for axis, key, title in zip(axes, ("bias", "deviation"), ("bias", "st. deviation, 1,000 tokens")):
        values = cells("estimators", lines, key)
        for i, name in enumerate(ESTIMATORS):
            over(axis, values, lambda lag: (name, lag), staleness.LAGS, name, i)  # noqa: B023
        axis.set(title=title, xlabel="lag, updates", ylim=(0, None))
        axis.set_yscale("symlog", linthresh=0.01)
    for i, name in enumerate(ESTIMATORS):
        spread(axes[2], {place: list(cells("estimators", lines, f"error_{m}")[name, lag].values()) for place, m in enumerate(estimators.BATCHES)}, name, i)
    axes[2].set(title=f"error at lag {lag}", xlabel="tokens in the batch", yscale="log", xticks=range(4), xticklabels=("1k", "10k", "100k", "1M"))
    axes[0].set_ylabel("relative to the exact gradient")
    save_with_legend(figure, axes[0], out)


def frontier_of(lines: list[dict], out: Path):
    """Tokens/s, lag, seconds to 90 % (of the seeds that reached it) and final accuracy against --max-staleness."""
    panels = {"tokens_per_second": "tokens / s", "lag_mean": "mean lag, updates", "seconds_to_90": "seconds to 90 %\n(hollow: not all did)", "accuracy": "accuracy"}
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.8))
    curves = list(dict.fromkeys((line["loss"], line["order"]) for line in lines))
    for axis, (key, title) in zip(axes, panels.items()):
        values = cells("frontier", lines, key)
        for i, (loss, order) in enumerate(curves):
            look = {"label": f"{loss}, {order} order", "dashed": order == "arrival"}
            over(axis, values, lambda s: (loss, order, s), frontier.STALENESS, loss, i, **look)  # noqa: B023
        axis.set(title=title, xlabel="--max-staleness", ylim=(0, None))
    save_with_legend(figure, axes[0], out)


def keep_window(traces: dict[str, Path], out: Path, seconds: float = 2.0):
    """The spans in the middle `seconds` of each trace.json, as a CSV: run, role, what, begin, end (seconds)."""
    with open(out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", "role", "what", "begin", "end"))
        for run, path in traces.items():
            events = json.loads(path.read_text())
            roles = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
            spans = [(e["tid"], e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events if e["ph"] == "X"]
            first = statistics.median(begin for _, _, begin, _ in spans)
            for tid, name, begin, end in sorted(spans, key=lambda span: span[2]):
                if begin < first + seconds and end > first:
                    writer.writerow((run, roles[tid], name, f"{max(0, begin - first):.4f}", f"{min(seconds, end - first):.4f}"))


def timelines(path: Path, out: Path):
    """Who works when, a panel per run."""
    with open(path, newline="") as file:
        spans = list(csv.DictReader(file))
    runs, roles = (list(dict.fromkeys(span[key] for span in spans)) for key in ("run", "role"))
    roles = sorted(roles, key=lambda role: ("generator", "teacher", "learner").index(role.split()[0]))
    figure, axes = plt.subplots(len(runs), 1, figsize=(9, 1.5 * len(runs)), sharex=True, squeeze=False)
    for axis, run in zip(axes[:, 0], runs):
        for span in spans:
            if span["run"] == run:
                begin, end, place = float(span["begin"]), float(span["end"]), roles.index(span["role"])
                axis.barh(place, end - begin, left=begin, color=(BLUE, GREEN, RED)[place % 3], height=0.8)
        axis.set(title=run, yticks=range(len(roles)), yticklabels=roles)
        axis.margins(x=0)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(out, dpi=160)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the CSVs, and of the PNGs")
    parser.add_argument("--traces", type=Path, nargs=2, metavar=("SYNC", "ASYNC"), help="trace.json of a synchronous and an asynchronous run")
    args = parser.parse_args()
    lines = staleness.read(args.results / "staleness.csv")
    for start in ("weak", "strong"):
        against_lag(lines, "accuracy", start, args.results / f"accuracy_{start}.png")
        against_lag(lines, "reverse_kl", start, args.results / f"reverse_kl_{start}.png")
    bias_and_variance(estimators.read(args.results / "estimators.csv"), args.results / "estimators.png")
    frontier_of(frontier.read(args.results / "frontier.csv"), args.results / "frontier.png")
    if args.traces:
        runs = dict(zip(("synchronous (--max-staleness 0)", "asynchronous (--max-staleness 1)"), args.traces))
        keep_window(runs, args.results / "timelines.csv")
    timelines(args.results / "timelines.csv", args.results / "timelines.png")


if __name__ == "__main__":
    main()
