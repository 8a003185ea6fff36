"""The figures: `python -m experiments.figures` (needs matplotlib, extra [plots]).

Without options it draws the figures of the docs from the CSVs beside them. With --run it
draws the picture of one run of train.py (run_figure.py).

Points are means over seeds, bars run from the lowest to the highest seed. A loss has one colour and
one marker in all figures, and its label is what --loss wants. The timelines come from two runs'
trace.json, of which `--traces` keeps two seconds.
"""

import argparse
import csv
import statistics
from pathlib import Path

from experiments.run_figure import draw_run, draw_timeline, keep_window, label_ends, plt
from experiments.run_files import Span

RESULTS = Path(__file__).parent / "results"
ARRIVAL = 100  # the window of experiments/frontier.py that means order of arrival
NODES = {  # variants of experiments/scaling.py
    "as built": ("#000000", "o"),
    "arrival order": ("#787878", "s"),
    "staleness 1": ("#D98300", "^"),
    "shared pool": ("#2BA87F", "D"),
    "reading to the longest slot": ("#1F67AE", "o"),
}
STYLE = {
    # nothing is drawn: black and grey
    "forward KL 16": ("#000000", "o"),
    "forward KL 32": ("#000000", "o"),
    "dense reverse KL": ("#787878", "s"),
    # the rollout's signal: red; what clips its ratio: a colour each
    "rollout signal": ("#A50F15", "v"),
    "rollout signal + IS": ("#F5684A", "P"),
    "rollout signal + IS, N=16": ("#E0281F", "P"),
    "rollout signal + PPO clip": ("#D16BB0", "D"),
    "decoupled": ("#3A2F8F", "X"),
    "M2PO": ("#00807A", "*"),
    "M2PO (AReaL)": ("#7DB8B3", "*"),
    # the current signal: orange without the ratio, blue with it, darker with more draws
    "current signal": ("#D98300", "^"),
    "current signal, N=16": ("#D49500", "<"),
    "current signal + IS": ("#4A9FDB", "o"),
    "current signal + IS, N=16": ("#1F67AE", "s"),
    "current signal + IS, N=32": ("#0B2A66", "s"),
    # a top-K: purple alone, green with a tail
    "truncated K=32": ("#7A1F8C", "*"),
    "stratified 12+4": ("#2BA87F", "D"),
    "stratified 28+4": ("#00593F", "P"),
    "stratified 16+16": ("#A6B727", "P"),
    "stratified 28+4, order of arrival": ("#68AB2D", "P"),
    "stratified 16+16, order of arrival": ("#7D8B1F", "P"),
    # other forms of a top-K, with a certain K and for all
    "sparse_reverse_kl": ("#C2185B", "H"),
    "truncated_reverse_kl": ("#7A1F8C", "*"),
    "renormalised_top_k": ("#8D6E63", "<"),
    "centred_top_k": ("#B39DDB", ">"),
    "bucket_top_k": ("#5D4037", "p"),
    "score_top_k": ("#BDBDBD", "h"),
    "edge K=32": ("#C2185B", "H"),
    "renormalised K=32": ("#8D6E63", "<"),
    "centred K=32": ("#B39DDB", ">"),
    "bucket K=32": ("#5D4037", "p"),
    "score K=32": ("#BDBDBD", "h"),
    "forward KL + bucket 32": ("#424242", "d"),
    # on the real model
    "32 draws": ("#0B2A66", "s"),
    "32 draws, no baseline": ("#1F67AE", "s"),
    "stratified 16+16, no baseline": ("#C9D36B", "P"),
    "prompts and prefixes": ("#000000", "_"),
    "top 31 + emitted (EMA-PG)": ("#D98300", "^"),
    "32 draws, rollout signal, no ratio": ("#A50F15", "v"),
}
ONE_SAMPLE = (
    "rollout signal",
    "rollout signal + IS",
    "current signal",
    "current signal + IS",
    "rollout signal + PPO clip",
    "decoupled",
    "M2PO",
    "M2PO (AReaL)",
)
CANDIDATES = (
    "forward KL 16",
    "dense reverse KL",
    "current signal, N=16",
    "rollout signal + IS, N=16",
    "current signal + IS, N=16",
    "current signal + IS, N=32",
    "truncated K=32",
    "stratified 12+4",
    "stratified 28+4",
    "stratified 16+16",
    "edge K=32",
)
ESTIMATORS = (
    "rollout signal",
    "rollout signal + PPO clip",
    "current signal",
    "current signal + IS",
    "current signal + IS, N=16",
    "current signal + IS, N=32",
    "truncated K=32",
    "stratified 12+4",
    "stratified 28+4",
)
AXES = {
    "accuracy": ("accuracy", "linear"),
    "reverse_kl": ("reverse KL, nats a token,", "log"),
}
FRONTIER = {
    "tokens_per_second": "tokens/s over synchronous",
    "lag_mean": "mean lag, updates",
    "seconds_to_90": "time to 90 % over synchronous (hollow: not all seeds)",
    "accuracy": "accuracy",
}
AT_THE_FRONTIER = (  # (loss, window)
    ("stratified 16+16", 0),
    ("stratified 16+16", ARRIVAL),
    ("edge K=32", 0),
    ("forward KL 32", 0),
    ("current signal + IS, N=32", 0),
)
WINDOWS = FRONTIER | {"tokens_per_second": "tokens/s over ticket order"}
LABELS: dict[str, str] = {}  # name in a study -> label; `draw_study` fills it
Cells = dict[tuple, dict[int, float]]  # cell of a study -> seed -> value


# ---- lines ------------------------------------------------------------------------------------


def spread(axis, groups: dict[int, list[float]], name: str, shift: float, seeds: int):
    """A line through the means of groups {x: [a value per seed]}, with bars to the extremes.

    The marker of a group of fewer than `seeds` is hollow.
    """
    colour, marker = STYLE[name]
    look = {"color": colour, "marker": marker, "clip_on": False}
    places = [x + shift for x in groups]
    means = [statistics.mean(group) for group in groups.values()]
    below = [mean - min(group) for mean, group in zip(means, groups.values())]
    above = [max(group) - mean for mean, group in zip(means, groups.values())]
    axis.errorbar(places, means, (below, above), fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    line = "--" if name.endswith("arrival") else "-"
    label = LABELS.get(name, name)
    axis.plot(places, means, line, linewidth=1.3, markersize=5, label=label, **look)
    hollow = [i for i, group in enumerate(groups.values()) if len(group) < seeds]
    for i in hollow:
        axis.plot(places[i], means[i], markersize=6, markerfacecolor="white", zorder=3, **look)


def over(axis, values: Cells, cells: dict[str, list[tuple]], ticks: list):
    """A line for every name in `cells`, whose cells are in the order of the ticks.

    A cell that the study does not have is left out. Lines stand side by side.
    """
    axis.set(xticks=range(len(ticks)), xticklabels=ticks)
    seeds = max(map(len, values.values()))
    for i, (name, places) in enumerate(cells.items()):
        groups = {x: list(values[cell].values()) for x, cell in enumerate(places) if cell in values}
        if groups:
            spread(axis, groups, name, 0.03 * (i - len(cells) / 2), seeds)


# ---- figures ----------------------------------------------------------------------------------


def draw_against_lag(values: Cells, start: str, metric: str, updates: int, out: Path):
    """Final accuracy or divergence against lag, with one sample a position and with more."""
    lags = sorted({cell[-1] for cell in values if cell[0] == start})
    label, scale = AXES[metric]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    figure.subplots_adjust(wspace=0.85)
    for axis, names in zip(axes, (ONE_SAMPLE, CANDIDATES)):
        cells = {name: [(start, name, lag) for lag in lags] for name in names}
        over(axis, values, cells, lags)
        axis.set(xlabel="lag, updates", yscale=scale)
    axes[0].set(title="one sample a position", ylabel=f"{label} after {updates} updates")
    axes[1].set(title="more candidates")
    for axis in axes:
        label_ends(axis)
    figure.savefig(out)


def draw_forms(values: Cells, forms: dict[str, str], sizes: tuple[int, ...], out: Path):
    """Reverse KL of every form of a top K against K, a panel for every lag.

    `forms`: name in the study -> loss. The default is drawn as a line over all K.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), sharey=True)
    figure.subplots_adjust(wspace=0.75)
    for axis, lag in zip(axes, (0, 8, 32)):
        cells = {
            loss: [("weak", f"{form} K={k}", lag) for k in sizes] for form, loss in forms.items()
        }
        cells["stratified 16+16"] = [("weak", "stratified 16+16", lag)] * len(sizes)
        over(axis, values, cells, sizes)
        axis.set(title=f"lag {lag}", xlabel="K", yscale="log")
    axes[0].set(ylabel="reverse KL, nats a token")
    for axis in axes:
        label_ends(axis)
    figure.savefig(out)


def draw_estimators(tables: dict[str, Cells], batches: tuple[int, ...], out: Path, lag: int = 8):
    """Bias and standard deviation of the gradient against lag, and the error at one lag.

    Linear below 0.01, so that what is exactly unbiased is seen lying at 0.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    figure.subplots_adjust(wspace=1.5)
    lags = sorted({cell[-1] for cell in tables["bias"]})
    cells = {name: [(name, lag) for lag in lags] for name in ESTIMATORS}
    for axis, key in zip(axes, ("bias", "deviation")):
        over(axis, tables[key], cells, lags)
        axis.set(xlabel="lag, updates", ylim=(0, None))
        axis.set_yscale("symlog", linthresh=0.01)
    errors = {(name, m): tables[f"error_{m}"][name, lag] for name in ESTIMATORS for m in batches}
    cells = {name: [(name, m) for m in batches] for name in ESTIMATORS}
    over(axes[2], errors, cells, [f"{m // 1000}k" for m in batches])
    axes[2].set(title=f"error at lag {lag}", xlabel="tokens in the batch", yscale="log")
    axes[1].set(title="st. deviation, 1,000 tokens")
    axes[0].set(title="bias", ylabel="relative to the exact gradient")
    for axis in axes:
        label_ends(axis)
    figure.savefig(out)


def over_ticket_order(values: Cells, staleness: int) -> Cells:
    """Values over those of the same loss and seed in ticket order, which ran on the same day."""
    found = {}
    for cell, seeds in values.items():
        base = values[cell[0], 0, staleness]
        found[cell] = {seed: x / base[seed] for seed, x in seeds.items() if seed in base}
    return found


def draw_frontier(tables: dict[str, Cells], out: Path):
    """Throughput, lag, time to 90 % (of the seeds that got there) and final accuracy."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5))
    figure.subplots_adjust(wspace=1.1, hspace=0.4)
    staleness = sorted({cell[-1] for cell in tables["accuracy"]})
    cells = {}
    for loss, window in AT_THE_FRONTIER:
        name = f"{loss}, order of arrival" if window else loss
        cells[name] = [(loss, window, limit) for limit in staleness]
    for axis, (key, title) in zip(axes.flat, FRONTIER.items()):
        is_timed = key in ("tokens_per_second", "seconds_to_90")
        values = over_ticket_order(tables[key], 0) if is_timed else tables[key]
        over(axis, values, cells, staleness)
        axis.set(title=title, xlabel="--max-staleness", ylim=(0, None))
        label_ends(axis)
    figure.savefig(out)


def draw_windows(tables: dict[str, Cells], out: Path):
    """Throughput, lag and final accuracy against --window, at a staleness of 1."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3))
    figure.subplots_adjust(wspace=0.35)
    windows = sorted({cell[1] for cell in tables["accuracy"]})
    ticks = [w if w < ARRIVAL else "arrival" for w in windows]
    losses = sorted({cell[0] for cell in tables["accuracy"]})
    cells = {loss: [(loss, w, 1) for w in windows] for loss in losses}
    for axis, key in zip(axes, ("tokens_per_second", "lag_mean", "accuracy")):
        is_timed = key == "tokens_per_second"
        values = over_ticket_order(tables[key], 1) if is_timed else tables[key]
        over(axis, values, cells, ticks)
        axis.set(title=WINDOWS[key], xlabel="--window", ylim=(0, None))
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(out)


def draw_two_teachers(lines: list[dict], out: Path):
    """Accuracy of both tasks against updates, with the right teachers and with a wrong one.

    Lines are means over seeds, bands reach to the extremes.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
    figure.subplots_adjust(wspace=0.3)
    titles = {"right": "each task has its own teacher", "wrong": "one teacher for both"}
    for axis, (run, title) in zip(axes, titles.items()):
        for task, colour in (("sums", "#0B2A66"), ("pairs", "#D98300")):
            groups = {}
            for line in lines:
                if (line["run"], line["task"]) == (run, task):
                    groups.setdefault(line["update"], []).append(line["accuracy"])
            means = [statistics.mean(group) for group in groups.values()]
            ends = [[end(group) for group in groups.values()] for end in (min, max)]
            axis.fill_between([*groups], *ends, color=colour, alpha=0.2, linewidth=0)
            axis.plot([*groups], means, color=colour, label=task)
        axis.set(title=title, xlabel="updates", ylim=(0, 1))
    axes[0].set(ylabel="accuracy, held-out prompts")
    for axis in axes:
        label_ends(axis)
    figure.savefig(out)


def draw_real_curves(values: Cells, out: Path):
    """Held-out reverse KL of a real model against updates, a panel for every lag."""
    lags = sorted({cell[1] for cell in values})
    updates = sorted({cell[2] for cell in values})
    nats = [0.8, 1, 2, 4, 7]
    figure, axes = plt.subplots(1, len(lags), figsize=(10, 4), sharey=True)
    figure.subplots_adjust(wspace=0.95)
    for axis, lag in zip(axes, lags):
        names = dict.fromkeys(cell[0] for cell in values if cell[1] == lag)
        over(axis, values, {name: [(name, lag, u) for u in updates] for name in names}, updates)
        axis.set(title=f"lag {lag}", xlabel="updates", yscale="log")
        axis.minorticks_off()
        axis.set_yticks(nats, nats)
    axes[0].set(ylabel="reverse KL, nats a token")
    for axis in axes:  # when both have made their common limits final
        label_ends(axis)
    figure.savefig(out)


def draw_real_model(lines: list[dict], out: Path):
    """Noise of a real model's gradient against lag: at a position, and of a whole response.

    Bars are standard errors over prompts.
    """
    lags = sorted({line["lag"] for line in lines})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    figure.subplots_adjust(wspace=0.95)
    for axis, space in zip(axes, ("logits", "parameters")):
        here = [line for line in lines if line["space"] == space and line["estimator"] in STYLE]
        for name in dict.fromkeys(line["estimator"] for line in here if line["variance"]):
            colour, marker = STYLE[name]
            found = [line for line in here if line["estimator"] == name]
            means = [line["variance"] for line in found]
            errors = [line["variance_error"] for line in found]
            axis.errorbar(range(len(lags)), means, errors, fmt="none", ecolor=colour, capsize=2)
            label = LABELS.get(name, name)
            axis.plot(means, linewidth=1.3, markersize=5, color=colour, marker=marker, label=label)
        axis.set(xticks=range(len(lags)), xticklabels=lags, xlabel="lag, updates", yscale="log")
    axes[0].set(title="logits, one position", ylabel="variance / square of the exact gradient")
    axes[1].set(title="all parameters, one response")
    for axis in axes:
        label_ends(axis)
    figure.savefig(out)


def mean_cells(lines: list[dict], metric: str) -> dict[tuple, float]:
    """(loss, lr, lag) -> mean of a metric over the seeds of learning_rate.py."""
    values = {}
    for line in lines:
        values.setdefault((line["loss"], line["lr"], line["lag"]), []).append(line[metric])
    return {cell: statistics.mean(found) for cell, found in values.items()}


def draw_rates(lines: list[dict], out: Path):
    """Final accuracy against the learning rate: a panel for every loss, a line for every lag."""
    accuracy = mean_cells(lines, "accuracy")
    losses, lags = (list(dict.fromkeys(line[key] for line in lines)) for key in ("loss", "lag"))
    figure, axes = plt.subplots(1, len(losses), figsize=(13, 3.2), sharey=True)
    for axis, loss in zip(axes, losses):
        for lag, colour in zip(lags, ("#000000", "#1F67AE", "#2BA87F", "#D98300")):
            rates = sorted({lr for name, lr, of in accuracy if (name, of) == (loss, lag)})
            values = [accuracy[loss, lr, lag] for lr in rates]
            look = {"color": colour, "markersize": 4, "linewidth": 1.3, "clip_on": False}
            axis.plot(rates, values, "o-", label=f"lag {lag}", **look)
        axis.set(title=LABELS.get(loss, loss), xlabel="lr", xscale="log", ylim=(0, 1))
    axes[0].set(ylabel="accuracy")
    axes[-1].legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(out)


def draw_axes_of_rates(lines: list[dict], out: Path):
    """What a lag leaves of the accuracy without it, against three numbers that might decide it.

    A point for every loss, rate and lag. Rates that end below a half without lag are left out.
    """
    accuracy = mean_cells(lines, "accuracy")
    at = {name: mean_cells(lines, name) for name in ("drift_kl", "ess")}
    at["delay"] = {(loss, lr, lag): lr * (2 * lag + 1) for loss, lr, lag in accuracy}
    titles = {"delay": "lr (2 lag + 1)", "drift_kl": "drift, nats a token", "ess": "ess"}
    cells = [cell for cell in accuracy if cell[2] and accuracy[(*cell[:2], 0)] > 0.5]
    figure, axes = plt.subplots(1, len(titles), figsize=(13, 3.4), sharey=True)
    for axis, (name, title) in zip(axes, titles.items()):
        for loss in dict.fromkeys(cell[0] for cell in cells):
            own = [cell for cell in cells if cell[0] == loss]
            kept = [accuracy[cell] / accuracy[(*cell[:2], 0)] for cell in own]
            colour, marker = STYLE.get(loss, ("#C2185B", "H"))
            places = [at[name][cell] for cell in own]
            label = LABELS.get(loss, loss)
            axis.scatter(places, kept, s=26, color=colour, marker=marker, label=label)
        axis.set(xlabel=title, xscale="linear" if name == "ess" else "log", ylim=(-0.03, 1.2))
    axes[0].set(ylabel="accuracy over that without lag")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(out)


def draw_timelines(path: Path, out: Path):
    """Draw a panel for every run of the CSV."""
    runs = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            span = Span(line["role"], line["what"], float(line["begin"]), float(line["end"]))
            runs.setdefault(line["run"], []).append(span)
    figure, axes = plt.subplots(len(runs), 1, figsize=(9, 1.5 * len(runs)), sharex=True)
    figure.subplots_adjust(hspace=0.4)
    for axis, (run, spans) in zip(axes, runs.items()):
        draw_timeline(axis, spans)
        axis.set(title=run)
    axes[-1].set_xlabel("seconds")
    figure.savefig(out)


def draw_nodes(path: Path, out: Path):
    """Tokens/s a node against nodes, for both kinds of batch, with what one node makes as 1."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    kinds = list(dict.fromkeys(line["batch"] for line in lines))
    figure, axes = plt.subplots(2, len(kinds), figsize=(10, 6.5), sharex=True, sharey="row")
    for column, kind in zip(axes.T, kinds):
        here = [line for line in lines if line["batch"] == kind]
        for name, (colour, marker) in NODES.items():
            found = [line for line in here if line["variant"] == name]
            nodes = [int(line["nodes"]) for line in found]
            each = [float(line["tokens_per_second"]) / int(line["nodes"]) for line in found]
            waits = [100 * float(line["waiting_for_nodes"]) for line in found]
            look = {"color": colour, "marker": marker, "linewidth": 1.3, "markersize": 5}
            column[0].plot(nodes, each, label=name, **look)
            column[1].plot(nodes, waits, **look)
        column[0].set(title=f"simulated: {kind} an update", xscale="log", ylim=(0, None))
        column[1].set(xlabel="nodes of 8 GPUs", xticks=nodes, xticklabels=nodes, ylim=(0, 100))
        column[1].minorticks_off()
    axes[0, 0].set_ylabel("tokens/s, a node")
    axes[1, 0].set_ylabel("waiting for other nodes, % of the time")
    axes[1, 0].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(out)


# ---- all of them ------------------------------------------------------------------------------


def label_of(fields: dict) -> str:
    """What --loss, --top-k and --num-samples are: "stratified_reverse_kl 16+16"."""
    top, draws = fields.get("top_k"), fields.get("num_samples")
    size = f"{top}+{draws}" if top and draws else f"K={top}" if top else f"N={draws}"
    return f"{fields['loss']} {size}"


def draw_study(results: Path):
    # These import torch, which the picture of a run does without.
    from experiments import (
        estimators,
        frontier,
        learning_rate,
        real_curves,
        real_model,
        staleness,
        two_teachers,
    )
    from experiments.claims import cells

    studies = (staleness.METHODS, real_curves.METHODS, real_model.ESTIMATORS, frontier.METHODS)
    for methods in studies:
        LABELS.update({name: label_of(fields) for name, fields in methods.items()})
    for name, label in [*LABELS.items()]:
        LABELS[f"{name}, order of arrival"] = f"{label}, arrival"
    lines = staleness.read(results / "staleness.csv")
    updates = max(line["update"] for line in lines)
    for metric in AXES:
        values = cells("staleness", lines, metric)
        for start in ("weak", "strong"):
            draw_against_lag(values, start, metric, updates, results / f"{metric}_{start}.png")
    values = cells("staleness", lines, "reverse_kl")
    draw_forms(values, staleness.TOP_K, staleness.TOP_K_SIZES, results / "top_k.png")
    lines = estimators.read(results / "estimators.csv")
    keys = ("bias", "deviation", *(f"error_{m}" for m in estimators.BATCHES))
    tables = {key: cells("estimators", lines, key) for key in keys}
    draw_estimators(tables, estimators.BATCHES, results / "estimators.png")
    lines = frontier.read(results / "frontier.csv")
    tables = {key: cells("frontier", lines, key) for key in FRONTIER}
    draw_frontier(tables, results / "frontier.png")
    lines = frontier.read(results / "windows.csv")
    tables = {key: cells("frontier", lines, key) for key in FRONTIER}
    draw_windows(tables, results / "windows.png")
    draw_two_teachers(two_teachers.read(results / "two_teachers.csv"), results / "two_teachers.png")
    lines = real_curves.read(results / "real_curves.csv")
    values = cells("real_curves", lines, "reverse_kl")
    draw_real_curves(values, results / "real_curves.png")
    draw_real_model(real_model.read(results / "real_model.csv"), results / "real_model.png")
    lines = learning_rate.read(results / "learning_rate.csv")
    draw_rates(lines, results / "learning_rate.png")
    draw_axes_of_rates(lines, results / "rates_and_lags.png")
    draw_timelines(results / "timelines.csv", results / "timelines.png")
    draw_nodes(results / "simulated_nodes.csv", results / "simulated_nodes.png")


def options() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--run", type=Path, help="--output-dir of a run, whose picture is drawn")
    parser.add_argument("--out", type=Path, help="PNG of --run; default run.png in the run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="place of CSVs and PNGs")
    traces = "trace.json of a synchronous and an asynchronous run, for timelines.csv"
    parser.add_argument("--traces", type=Path, nargs=2, metavar=("SYNC", "ASYNC"), help=traces)
    return parser


def main():
    parser = options()
    args = parser.parse_args()
    if args.run:
        return draw_run(args.run, args.out or args.run / "run.png")
    if args.out:
        parser.error(f"--out {args.out}: it belongs to --run: add --run, or use --results")
    if args.traces:
        names = ("synchronous (--max-staleness 0)", "asynchronous (--max-staleness 1)")
        keep_window(dict(zip(names, args.traces)), args.results / "timelines.csv")
    draw_study(args.results)


if __name__ == "__main__":
    main()
