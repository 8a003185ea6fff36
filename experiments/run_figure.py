"""The picture of one run of train.py: `python -m experiments.figures --run runs/default`.

Above stand reverse KL, accuracy, tokens/s and lag against the update, from metrics.jsonl. Below
stands who works when in the middle of the run, from trace.json. The study's figures share the
labels and the timeline. Nothing here imports torch.
"""

import csv
import statistics
import sys
from pathlib import Path

from experiments.run_files import ROLES, Span, points_of, rank, read_run, read_trace

try:
    import matplotlib
except ImportError:
    sys.exit("figures: error: matplotlib is not installed: pip install matplotlib")

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

plt.rc("font", size=9)
plt.rc("axes.spines", top=False, right=False)
plt.rc("savefig", dpi=160, bbox="tight")
LABEL_POINTS = 8
ASIDE = ("evaluate", "save")  # work that makes no update, drawn pale
PANELS = {
    "reverse KL, nats a token": {"": "reverse_kl"},
    "accuracy": {"": "eval_accuracy"},
    "tokens / s": {"": "tokens_per_second"},
    "lag, updates": {"max": "lag_max", "mean": "lag_mean"},
}
ROLLOUTS = 16  # of an update of experiments/context.py
WIDE = {"color": "#E69F00", "linewidth": 3}  # the mean stays visible on top of the maximum
THIN = {"color": "#0072B2", "linewidth": 1}
TEACHERS = ("#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def refuse(value: str, wrong: str, fix: str):
    sys.exit(f"figures: error: {value}: {wrong}: {fix}")


# ---- labels at the ends of lines --------------------------------------------------------------


def apart(heights: list[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as possible until neighbours are `gap` apart.

    The lowest stays above 0 and the highest below 1, as long as there is room.
    """
    blocks = []
    for i, height in enumerate(heights):
        blocks.append([height - i * gap])
        while len(blocks) > 1 and statistics.mean(blocks[-2]) > statistics.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1].extend(last)
    levels = [statistics.mean(block) for block in blocks for _ in block]
    most = 1 - (len(heights) - 1) * gap
    return [max(0, min(level, most)) + i * gap for i, level in enumerate(levels)]


def label_ends(axis):
    """Write every line's label to the right of the panel, in its colour, where the line ends.

    Of lines that end together the one drawn first has the highest label.
    """
    axis.get_ylim()  # makes the limits final
    to_axes = axis.transData + axis.transAxes.inverted()
    heights = {}
    for line in reversed(axis.get_legend_handles_labels()[0]):
        heights[line] = to_axes.transform(line.get_xydata()[-1])[1]
    lines = sorted(heights, key=heights.get)
    inches = axis.get_position().height * axis.figure.get_figheight()
    gap = 1.3 * LABEL_POINTS / 72 / inches
    for line, height in zip(lines, apart(sorted(heights.values()), gap)):
        label_end(axis, line, height)


def label_end(axis, line, height: float):
    colour = line.get_color()
    look = {"arrowstyle": "-", "color": colour, "linestyle": ":", "linewidth": 0.7}
    axis.annotate(
        line.get_label(),
        xy=line.get_xydata()[-1],
        xytext=(1.06, height),
        textcoords="axes fraction",
        verticalalignment="center",
        fontsize=LABEL_POINTS,
        color=colour,
        arrowprops={**look, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4},
    )


# ---- who works when ---------------------------------------------------------------------------


def middle(spans: list[Span], seconds: float = 2.0) -> list[Span]:
    """The spans of the middle `seconds`, which begin at 0. A run hardly longer is kept whole."""
    first = spans[0].begin
    last = max(span.end for span in spans)
    if last - first > 1.5 * seconds:
        first = min(statistics.median(span.begin for span in spans), last - seconds)
        last = first + seconds
    kept = []
    for span in spans:
        if span.begin < last and span.end > first:
            begin = max(span.begin, first) - first
            kept.append(span._replace(begin=begin, end=min(span.end, last) - first))
    return kept


def draw_timeline(axis, spans: list[Span]):
    roles = sorted({span.role for span in spans}, key=rank)
    for span in spans:
        colour = ROLES[span.role.split()[0]]
        opacity = 0.35 if span.what in ASIDE else 1.0
        place = roles.index(span.role)
        axis.barh(place, span.end - span.begin, left=span.begin, color=colour, alpha=opacity)
    axis.set(yticks=range(len(roles)), yticklabels=roles)
    axis.margins(x=0)
    axis.invert_yaxis()


def keep_window(traces: dict[str, Path], out: Path):
    """Write the middle two seconds of each trace.json as a CSV."""
    windows = {}
    for run, path in traces.items():
        spans = read_trace(path)
        if not spans:
            refuse(f"--traces {path}", "no span in it", "give the trace.json of a run")
        windows[run] = middle(spans)
    with open(out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", *Span._fields))
        for run, spans in windows.items():
            for span in spans:
                times = (f"{span.begin:.4f}", f"{span.end:.4f}")
                writer.writerow((run, span.role, span.what, *times))


# ---- one run ----------------------------------------------------------------------------------


def panels_of(records: list[dict]) -> dict[str, dict[str, list]]:
    """title -> label -> points, of the panels whose metrics the run has."""
    panels = {}
    for title, keys in PANELS.items():
        curves = {label: points_of(records, key) for label, key in keys.items()}
        for key in sorted({key for record in records for key in record}):
            metric, _, teacher = key.partition("/")
            if metric == keys.get("") and teacher:
                curves[teacher] = points_of(records, key)
        if len(curves) > len(keys):
            curves["(all)"] = curves.pop("")
        if all(curves.values()):
            panels[title] = curves
    return panels


def draw_curves(axis, curves: dict[str, list], title: str):
    """Lines {label: points} against the update."""
    extremes = [0.0]
    for number, (label, points) in enumerate(curves.items()):
        steps, values = zip(*points)
        look = WIDE if label == "max" else THIN
        if "(all)" in curves:  # and one of each teacher
            look = {"color": TEACHERS[number % len(TEACHERS)], "linewidth": 1}
        marker = "o" if len(points) <= 20 else ""
        axis.plot(steps, values, label=label, marker=marker, markersize=3, clip_on=False, **look)
        extremes.extend((min(values), max(values)))
    top = None if max(extremes) > 0 else 1  # a synchronous run has no lag
    axis.set(title=title, xlabel="update", xlim=(0, 1.05 * steps[-1]), ylim=(min(extremes), top))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    label_ends(axis)


def draw_context(records: list[dict], lines: list[dict], out: Path):
    """A run of experiments/context.py: reverse KL, length of answers, answers that obey.

    `lines`: of its CSV.
    """
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8))
    figure.subplots_adjust(wspace=0.4)
    steps = [record["step"] for record in records]
    size = sum(line["when"] == "before" for line in lines)
    axes[0].plot(steps, [record["reverse_kl"] for record in records], **THIN)
    axes[0].set(title="reverse KL, nats a token", xlabel="update", ylim=0)
    counts = [record["tokens"] / ROLLOUTS for record in records]
    axes[1].plot(steps, counts, **THIN)
    axes[1].set(title="tokens of an answer", xlabel="update", ylim=0)
    whens = ("before", "after", "teacher")
    shares = [
        sum(line["is_short"] for line in lines if line["when"] == when) / size for when in whens
    ]
    axes[2].bar(whens, shares, color=("#787878", "#0072B2", "#009E73"))
    axes[2].set(title=f"one short sentence, {size} questions", ylim=(0, 1))
    figure.savefig(out)


def draw_run(run: Path, out: Path):
    """The timeline shows two seconds or, where updates are slow, as long as six of them take."""
    try:
        records = read_run(run)
    except ValueError as error:
        sys.exit(f"figures: error: --run {error}")
    last = records[-1]
    panels = panels_of(records)
    spans = read_trace(run / "trace.json")
    rows = 0.6 + 0.35 * len({span.role for span in spans})
    figure = plt.figure(figsize=(10, 2.6 + rows))
    figure.suptitle(f"{run} after update {last['step']}", y=1.02)
    has_names = any("(all)" in curves for curves in panels.values())
    look = {"height_ratios": (2, rows), "hspace": 0.6, "wspace": 0.6 if has_names else 0.35}
    grid = figure.add_gridspec(2, len(panels), **look)
    for place, (title, curves) in enumerate(panels.items()):
        draw_curves(figure.add_subplot(grid[0, place]), curves, title)
    if spans:
        axis = figure.add_subplot(grid[1, :])
        draw_timeline(axis, middle(spans, max(2.0, 6 * last["wall_seconds"] / last["step"])))
        axis.set(title="who works when (pale: evaluates, saves)", xlabel="seconds")
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        refuse(f"--out {out}", str(error), "name a .png in a directory that can be written")
