"""Claims about benchmarks/first_gpu_day.py: it gets through, whatever a step does."""

import json
import sys

import pytest
import torch

from benchmarks import first_gpu_day as day


def run_main(monkeypatch, tmp_path, *flags):
    arguments = ["first_gpu_day", "--pretend", f"--out={tmp_path}", *flags]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        day.main()
    return end.value.code, json.loads((tmp_path / "results.json").read_text())["steps"]


def test_a_step_that_fails_or_hangs_costs_itself_alone(monkeypatch, tmp_path, capsys):
    found = {"tests": {"error": "boom | 1\n2"}, "decode attention": {"ms": 1.23456}}
    monkeypatch.setattr(day, "watched", lambda name, pretend, limit: found[name])
    code, steps = run_main(monkeypatch, tmp_path, "--steps", *found)
    assert code == 1 and steps == found
    text = (tmp_path / "results.md").read_text()
    assert "| tests | error | boom / 1<br>2 |" in text and "| ms | 1.235 |" in text
    assert "1 of 2 steps failed ['tests']" in capsys.readouterr().out


def test_the_results_of_a_step_are_on_disk_before_the_next_begins(monkeypatch, tmp_path):
    def step(name, pretend, limit):
        if name == "decode attention":
            raise KeyboardInterrupt
        return {"x": 1}

    monkeypatch.setattr(day, "watched", step)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, tmp_path, "--steps", "tests", "decode attention")
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == {"tests": {"x": 1}}


def test_no_step_gets_more_time_than_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(day, "watched", lambda name, pretend, limit: {"limit": limit})
    monkeypatch.setattr(day.time, "monotonic", iter([0.0, 0.0, 500.0, 610.0]).__next__)
    names = ["tests", "decode attention", "decode step"]
    _, steps = run_main(monkeypatch, tmp_path, "--minutes=10", "--steps", *names)
    assert [steps[name]["limit"] for name in names] == [day.LIMITS["tests"], 100.0, -10.0]


def test_a_step_is_ended_at_its_limit_and_not_begun_after_it():
    assert day.watched("generation", True, 0.2) == {"error": "not done after 0 s.", "seconds": 0}
    assert day.watched("generation", True, -1.0) == {"error": "no time was left"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it asks what happens without a GPU")
def test_without_a_gpu_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["first_gpu_day", f"--out={tmp_path}"])
    with pytest.raises(SystemExit, match="no GPU is here: --pretend runs the steps without one"):
        day.main()


@pytest.mark.slow
def test_all_of_it_gets_through_on_a_gpu_that_is_not_there(monkeypatch, tmp_path):
    code, steps = run_main(monkeypatch, tmp_path)
    assert code == 0 and steps.keys() == day.LIMITS.keys()
    assert steps["built-in task"]["synchronous runs are equal"]
    assert steps["decode attention"]["3 slots of 20, longest 40: equal bits"]
    assert steps["decode step"]["graphs, norms fused"] == 1
