"""One page to look at a run, or at several side by side: `python -m experiments.page runs/default`.

It writes page.html into the first run's directory: curves, who works when, what the student says,
and a reader of rollouts. The page holds all of its data and asks no network for anything. page.js
and page.css, beside this file, are what it is made of.

A long run is thinned out: a curve keeps POINTS means, the timeline the first and the last of SPANS
spans, samples and rollouts keep BYTES each, with the first and the last update among them.
"""

import argparse
import base64
import json
import math
import sys
from array import array
from itertools import groupby
from pathlib import Path

import yaml

from experiments.run_files import ROLES, objects, points_of, rank, read_run, read_trace

POINTS = 1500
SPANS = 1_000_000
BYTES = 24 * 2**20
STEPS_PER_NAT = 256  # log-probabilities are sent as int16
UNKNOWN = -(2**15)  # among them
TITLES = {  # metric -> title of its panel; what stands behind a slash is another line in it
    "reverse_kl": "reverse KL, nats a token",
    "eval_accuracy": "accuracy",
    "tokens_per_second": "tokens / s",
    "lag_mean": "lag, updates",
    "lag_max": "lag, updates",
    "generator_busy": "busy",
    "teacher_busy": "busy",
    "learner_busy": "busy",
    "ess": "effective sample size",
    "drift_k3": "drift, nats a token",
    "top_overlap": "overlap of the top K",
    "support_mass_student": "mass of the candidates",
    "support_mass_teacher": "mass of the candidates",
    "truncated_fraction": "responses that were cut",
    "grad_norm": "gradient norm",
}
SETTINGS = """student teacher loss plugin top_k num_samples temperature lr batch_size max_staleness
    window refresh generators teachers""".split()


# ---- thinning out -----------------------------------------------------------------------------


def means(points: list[tuple[int, float]], most: int = POINTS):
    """At most `most` points (update, value): means of equally many that follow each other."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def ends(spans: list, most: int = SPANS):
    """The first and the last of the spans, `most` together, and the (begin, end) left out."""
    if len(spans) <= most:
        return spans, None
    first, last = spans[: most // 2], spans[len(spans) - most // 2 :]
    return first + last, (last_end(first), last[0].begin)


def last_end(spans: list):
    return max(span.end for span in spans)


def within(groups: list[list[dict]], most: int = BYTES):
    """The groups that fit into so many bytes of JSON: every second one is dropped until they do,
    never the first or the last. Of the last two, lines are dropped.
    """
    sizes = [len(json.dumps(group)) for group in groups]
    while len(groups) > 2 and sum(sizes) > most:
        kept = [i for i in range(len(groups)) if i % 2 == 0 or i == len(groups) - 1]
        if len(kept) == len(groups):  # three groups
            kept = [0, len(groups) - 1]
        groups, sizes = [groups[i] for i in kept], [sizes[i] for i in kept]
    if sum(sizes) > most:
        groups = [group[: max(1, len(group) * most // sum(sizes))] for group in groups]
    return groups


# ---- what the page holds ----------------------------------------------------------------------


def packed(kind: str, values) -> str:
    """Base64 of numbers of array.array's `kind`, as typed arrays of JavaScript read them."""
    return base64.b64encode(array(kind, values).tobytes()).decode()


def curves(records: list[dict]):
    """[{"title", "metric", "x", "y"}] of all metrics that have a panel."""
    found = []
    for key in sorted({key for record in records for key in record}):
        title = TITLES.get(key.partition("/")[0])
        if title:
            x, y = zip(*means(points_of(records, key)))
            found.append({"title": title, "metric": key, "x": x, "y": y})
    order = list(TITLES)
    return sorted(found, key=lambda curve: order.index(curve["metric"].partition("/")[0]))


def timeline(run: Path):
    """The tracks of roles from top to bottom: of each span its name's place in `names`, its begin
    since the run's first, and its length, in seconds.
    """
    spans, left_out = ends(read_trace(run / "trace.json"))
    start = spans[0].begin if spans else 0.0
    names = sorted({span.what for span in spans})
    places = {name: place for place, name in enumerate(names)}
    tracks = []
    for role in sorted({span.role for span in spans}, key=rank):
        own = [span for span in spans if span.role == role]
        track = {
            "role": role,
            "name": packed("B", (places[span.what] for span in own)),
            "begin": packed("d", (span.begin - start for span in own)),
            "length": packed("f", (span.end - span.begin for span in own)),
        }
        tracks.append(track)
    left_out = [at - start for at in left_out] if left_out else None
    return {"names": names, "tracks": tracks, "left_out": left_out}


def by_step(path: Path):
    """The lines of samples.jsonl or rollouts.jsonl, a list for every update."""
    lines = objects(path) if path.is_file() else []
    lines.sort(key=lambda line: line["step"])
    return [list(group) for _, group in groupby(lines, key=lambda line: line["step"])]


def compact(rollout: dict):
    """A line of rollouts.jsonl with its tables packed: ids as places in the list `texts`."""
    places = {id: place for place, id in enumerate(rollout["texts"])}
    ids = [places[str(id)] for row in rollout["candidate_ids"] for id in row]
    compacted = rollout | {"texts": list(rollout["texts"].values()), "ids": list(places)}
    compacted["candidate_ids"] = packed("I", ids)
    for name in ("student_logp", "teacher_logp", "behavior_logp"):
        compacted[name] = packed("h", (in_steps(x) for row in rollout[name] for x in row))
    return compacted


def in_steps(logp: float | None) -> int:
    """A log-probability as int16."""
    if logp is None or math.isnan(logp):
        return UNKNOWN
    return round(min(max(STEPS_PER_NAT * logp, UNKNOWN + 1), 2**15 - 1))


def describe(run: Path):
    """Everything of one run that its part of the page shows."""
    records = read_run(run)
    settings = run / "config.yaml"
    given = yaml.safe_load(settings.read_text()) if settings.is_file() else {}
    rollouts = within(
        [[compact(line) for line in group] for group in by_step(run / "rollouts.jsonl")]
    )
    return {
        "name": str(run),
        "settings": {name: given[name] for name in SETTINGS if given.get(name) not in (None, "")},
        "updates": records[-1]["step"],
        "seconds": records[-1]["wall_seconds"],
        "tokens": sum(record["tokens"] for record in records),
        "curves": curves(records),
        "timeline": timeline(run),
        "samples": [line for group in within(by_step(run / "samples.jsonl")) for line in group],
        "rollouts": [line for group in rollouts for line in group],
    }


def without_nan(data):
    """The same with None where a number is not finite: JSON has neither NaN nor infinity."""
    if isinstance(data, dict):
        return {key: without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def html(runs: list[dict]) -> str:
    """The page. Text of models may hold anything, so no `<` of the data survives."""
    here = Path(__file__).parent
    data = without_nan(
        {"runs": runs, "colours": ROLES, "steps_per_nat": STEPS_PER_NAT, "unknown": UNKNOWN}
    )
    escaped = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    title = ", ".join(run["name"] for run in runs).replace("&", "&amp;").replace("<", "&lt;")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{(here / "page.css").read_text("utf-8")}</style></head>
<body><main></main>
<script type="application/json" id="data">{escaped}</script>
<script>{(here / "page.js").read_text("utf-8")}</script>
</body></html>
"""


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", help="--output-dir of runs")
    parser.add_argument("--out", type=Path, help="default: page.html in the first run")
    args = parser.parse_args()
    out = args.out or args.runs[0] / "page.html"
    try:
        out.write_text(html([describe(run) for run in args.runs]), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"page: error: {error}")
    print(out)


if __name__ == "__main__":
    main()
