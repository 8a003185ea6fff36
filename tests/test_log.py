"""Claims about what a run shows while it goes on."""

from types import SimpleNamespace

import pytest
import torch
from runs import read_trace

from support.checkpoint import start_output
from support.config import builtin
from support.log import Log, Timeline


def test_the_timeline_adds_up_busy_seconds_and_writes_a_trace_that_is_json(tmp_path, monkeypatch):
    # Begin and end of each span below.
    clock = iter([1.0, 1.5, 1.5005, 1.9, 2.1, 2.2, 5.0, 6.0, 6.0, 6.5])
    monkeypatch.setattr("support.log.time", SimpleNamespace(monotonic=lambda: next(clock)))
    ours, config = SimpleNamespace(busy=torch.zeros(3)), builtin(output_dir=str(tmp_path))
    start_output(config, None)
    first, second = (Timeline(config, ours, i) for i in (0, 1))
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
    events = read_trace(config.output)
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


def log_of(tmp_path, values, step=1, **changes):
    """What `Log.advise` prints for updates with these reverse KLs."""
    config = builtin(output_dir=str(tmp_path))
    start_output(config, None)
    log = Log(config, SimpleNamespace(busy=torch.zeros(3)))
    for number, value in enumerate(values, step):
        log.advise({"step": number, "reverse_kl": value, "truncated_fraction": 0.0} | changes)


@pytest.mark.parametrize(
    "values, told",
    [
        ([1.0 - 0.02 * i for i in range(60)], 0),
        ([1.0, 0.86, 1.47] * 20, 0),
        ([0.8] * 10 + [0.9] * 10, 0),
        ([0.5] * 10 + [0.7] * 10, 0),
        ([0.5] * 10 + [0.8] * 10, 1),
        ([0.01] * 19 + [0.7], 0),
        ([0.3] * 30 + [1.0] * 30, 1),
        ([0.1 * i for i in range(100)], 1),
        ([0.002, 0.006] * 30, 0),
        ([0.5] * 9 + [5.0] * 10, 0),
    ],
)
def test_a_reverse_kl_that_rises_over_twenty_updates_is_said_once(values, told, tmp_path, capsys):
    log_of(tmp_path, values)
    out = capsys.readouterr().out
    assert out.count("note: the reverse KL has risen over 20 updates: lower --lr") == told
    assert out.count("note") == told


@pytest.mark.parametrize("fraction, step, told", [(0.6, 1, 1), (0.5, 1, 0), (0.9, 40, 1)])
def test_responses_that_are_mostly_cut_are_said_early_and_once(
    fraction, step, told, tmp_path, capsys
):
    log_of(tmp_path, [0.5] * 8, step, truncated_fraction=fraction)
    note = "note: most responses are cut at --max-new-tokens: raise it"
    assert capsys.readouterr().out.count(note) == told
