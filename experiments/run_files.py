"""What a run of train.py has left in its directory, read without torch.

For pictures and pages: run_figure.py, page.py, follow.py.
"""

import json
from pathlib import Path
from typing import NamedTuple

ROLES = {"generator": "#0072B2", "teacher": "#009E73", "learner": "#D55E00"}  # and their colours


class Span(NamedTuple):
    """A stretch of work, in seconds."""

    role: str
    what: str
    begin: float
    end: float


def objects(path: Path) -> list[dict]:
    """The JSON objects of a file, one a line. Brackets and a line that was cut off are left out."""
    found = []
    for line in path.read_text("utf-8", errors="replace").split("\n"):  # text may hold U+2028
        try:
            found.append(json.loads(line.rstrip().rstrip(",")))
        except ValueError:
            continue
    return [each for each in found if isinstance(each, dict)]


def read_trace(path: Path) -> list[Span]:
    """The spans of a trace.json, closed or not, in the order they begin. None without the file."""
    events = objects(path) if path.is_file() else []
    roles = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = []
    for event in events:
        if event["ph"] == "X":
            begin = event["ts"] / 1e6
            end = begin + event["dur"] / 1e6
            spans.append(Span(roles[event["tid"]], event["name"], begin, end))
    return sorted(spans, key=lambda span: span.begin)


def rank(role: str) -> tuple:
    """The place of a role from top to bottom: generators by number, teachers by name and number,
    the learner.
    """
    kind, *words = role.split()
    return list(ROLES).index(kind), *(word.zfill(6) for word in words)  # 2 before 10


def read_run(run: Path) -> list[dict]:
    """The records of metrics.jsonl. Raises ValueError where the directory is not that of a run."""
    metrics = run / "metrics.jsonl"
    fix = "give the --output-dir of a run"
    if not run.is_dir():
        raise ValueError(f"{run}: no such directory: {fix}")
    if not metrics.is_file():
        raise ValueError(f"{run}: no metrics.jsonl in it: {fix}")
    records = [record for record in objects(metrics) if "step" in record]
    if not records:
        raise ValueError(f"{run}: no update in its metrics.jsonl: let the run make one")
    return records


def points_of(records: list[dict], key: str) -> list[tuple[int, float]]:
    """(update, value) wherever the metric was measured, before the first update included."""
    points = [(record["step"], record[key]) for record in records if key in record]
    metric, slash, teacher = key.partition("/")
    before = records[0].get(f"{metric}_before{slash}{teacher}")
    return points if before is None else [(0, before), *points]
