"""Claims about what a run shows while it goes on."""

import json
from types import SimpleNamespace

import pytest
import torch

from support.checkpoint import start_output
from support.config import builtin
from support.log import Timeline, close_trace


def test_the_timeline_adds_up_busy_seconds_and_writes_a_trace_that_is_json(tmp_path, monkeypatch):
    # Begin and end of each span below.
    clock = iter([1.0, 1.5, 1.5005, 1.9, 2.1, 2.2, 5.0, 6.0, 6.0, 6.5])
    monkeypatch.setattr("support.log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    ours, config = SimpleNamespace(busy=torch.zeros(3)), builtin(output_dir=str(tmp_path))
    start_output(config, None)
    first, second = (Timeline(config, ours, i, f"role {i}") for i in (0, 1))
    for timeline, name in (
        (first, "decode"),
        (first, "decode"),
        (first, "decode"),
        (second, "score"),
        (second, "publish"),
    ):
        with timeline.span(name):
            pass
    first.flush()
    second.flush()
    close_trace(config.output / "trace.json")
    events = json.loads((config.output / "trace.json").read_text())
    spans = [(e["tid"], e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events if e["ph"] == "X"]
    # 0.5 ms between them, 100 ms.
    merged, apart = (0, "decode", 1.0, pytest.approx(0.9)), (0, "decode", 2.1, pytest.approx(0.1))
    assert sorted(spans, key=lambda span: span[2]) == [
        merged,
        apart,
        (1, "score", 5.0, 1.0),
        (1, "publish", 6.0, 0.5),
    ]
    assert ours.busy[:2].tolist() == pytest.approx([0.9995, 1.5])
