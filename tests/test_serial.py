"""Claims about the algorithm in one process: it is what train.py does, and its lag is exact."""

import os
import re
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SYNC, load
from frozen import full_logp
from runs import BASE, metrics

from model import flat_parameters
from serial import Serial
from support.config import builtin, parse
from support.data import load_prompts
from support.load import load_tokenizer


def new_serial(flags, lag):
    config = parse([*BASE, *flags])
    return Serial(
        config, lag, *load_prompts(config, load_tokenizer("--student", config.path("student")))
    )


def recorded_versions(channel):
    """The weight version of every response token in the table."""
    counts = (channel.length - channel.prompt_len).tolist()
    return [channel.weight_version[row, :count].tolist() for row, count in enumerate(counts)]


def test_the_command_line_prints_the_accuracy_before_and_after_training(pair, tmp_path):
    flags = [
        *pair,
        "--steps=2",
        "--batch-size=8",
        "--slots=8",
        "--eval-size=8",
        "--max-new-tokens=12",
    ]
    run = subprocess.run(
        [sys.executable, str(ROOT / "serial.py"), *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    accuracy = r"\d+\.\d%"
    assert re.search(rf"accuracy before training {accuracy}\n", run.stdout) and re.search(
        rf"accuracy after training {accuracy}\n$", run.stdout
    )
    assert [int(n) for n in re.findall(r"^update +(\d)/2 .*\d", run.stdout, re.M)] == [1, 2]
    assert not os.listdir(tmp_path)  # it writes nothing


def test_the_shipped_models_learn_their_task_in_a_few_updates():
    config = builtin(steps=14, eval_size=64, seed=1, cpu_threads=1)
    run = Serial(
        config, 0, *load_prompts(config, load_tokenizer("--student", config.path("student")))
    )
    first, *_, last = [run.update()["reverse_kl"] for _ in range(config.steps)]
    assert 0 < last < 0.7 * first


def test_without_lag_its_losses_are_those_of_a_synchronous_run_of_processes(pair, sync_run):
    """To float rounding: processes score quarters of a batch, here all of it is scored at once."""
    records = metrics(sync_run[0])[:3]
    run = new_serial([*pair, *SYNC, "--slots=5"], lag=0)  # the order in which they end is another
    assert run.accuracy() == records[0]["eval_accuracy_before"]
    mine = [run.update() for _ in records]
    for name in (
        "loss",
        "reverse_kl",
        "grad_norm",
        "tokens",
        "lag_max",
        "lr",
        "support_mass_student",
        "support_mass_teacher",
    ):
        assert mine[0][name] == pytest.approx(records[0][name], rel=1e-4), name
        # Weights differ by rounding since.
        assert mine[-1][name] == pytest.approx(records[-1][name], rel=0.02), name


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_every_token_is_sampled_with_the_weights_of_exactly_lag_updates_ago(
    lag, pair, model_dir, monkeypatch
):
    """Also the first updates, and also if the newest weights are evaluated in between."""
    run = new_serial([*pair, "--steps=6", "--lr=0.03", "--warmup-steps=0", "--slots=3"], lag)
    weights = [flat_parameters(run.learner.model)]
    for update in range(6):
        metrics = run.update()
        expected = min(lag, update)
        versions = recorded_versions(run.channel)
        assert len(versions) == 8 and all(set(row) == {update - expected} for row in versions)
        assert metrics["lag_mean"] == metrics["lag_max"] == expected
        sampler = load(model_dir("qwen3", 0))
        torch.nn.utils.vector_to_parameters(weights[update - expected], sampler.parameters())
        # The recorded number says the truth.
        monkeypatch.setattr("frozen.load", lambda path: sampler)
        for row, count in enumerate(map(len, versions)):
            logp = full_logp("", run.channel, row).gather(
                1, run.channel.candidate_ids[row, :count, :1].long()
            )
            torch.testing.assert_close(
                run.channel.behavior_logp[row, :count, :1], logp, atol=1e-4, rtol=1e-4
            )
        weights.append(flat_parameters(run.learner.model))
        if update % 2:
            run.accuracy()
    # So the log-probabilities above tell versions apart.
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)


def test_a_sampler_that_gets_no_weights_is_told_from_staleness_by_drift_at_a_lag_of_0(monkeypatch):
    """Docs/metrics.md: what looks like staleness while `lag_mean` says that there is none."""
    flags = ["--steps=12", "--lr=1e-3", "--warmup-steps=1", "--micro-batch-tokens=512"]
    healthy = [run.update() for run in [new_serial(flags, 0)] for _ in range(12)]
    stale = [run.update() for run in [new_serial(flags, 4)] for _ in range(12)]

    def pick_up(self, behind):  # the version arrives, the weights do not
        self.sampler.generator.version = self.learner.version - behind

    monkeypatch.setattr(Serial, "pick_up", pick_up)
    broken = [run.update() for run in [new_serial(flags, 0)] for _ in range(12)]
    assert all(m["drift_k3"] < 1e-6 and m["ess"] > 0.9999 for m in healthy)
    for first, *rest in (stale, broken):
        assert first["drift_k3"] < 1e-6 and first["ess"] > 0.9999
        assert all(m["drift_k3"] > 0.1 and m["ess"] < 0.95 for m in rest)
    assert {m["lag_max"] for m in broken} == {0} and stale[-1]["lag_max"] == 4
    # Staleness has an end, the drift of a sampler without weights has none.
    late = [statistics.mean(m["drift_k3"] for m in runs[8:]) for runs in (stale, broken)]
    assert late[1] > 1.5 * late[0]
