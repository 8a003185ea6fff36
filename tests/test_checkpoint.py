"""Claims about what lies on disk: whole or absent, and never another run's."""

import json
import os
import shutil
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load
from frozen import ROWS
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_learner import config_for, new_learner, stale_table
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import Learner
from support.checkpoint import (
    check_output,
    checkpoints,
    lock_output,
    read_progress,
    start_output,
    write,
)
from support.config import InputError, builtin, parse

# ---- the output directory -----------------------------------------------------------------------


def test_an_output_directory_that_holds_another_run_is_left_alone(tmp_path):
    config = builtin(output_dir=str(tmp_path))
    assert check_output(config, "hash") is None
    start_output(config, None)
    # Died before its first update: nothing to lose.
    assert check_output(config, "hash") is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(
        InputError,
        match="holds another run: choose a new directory, or --resume if a step_N is in it",
    ):
        check_output(replace(config, lr=1.0), "hash")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_an_output_directory_belongs_to_one_run_at_a_time(tmp_path):
    first = lock_output(tmp_path / "run")
    with pytest.raises(InputError, match="--output-dir .*run: another run uses it, choose another"):
        lock_output(tmp_path / "run")
    os.close(first)
    os.close(lock_output(tmp_path / "run"))
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(
            InputError, match=f"--output-dir .* cannot be used, choose another: .*{message}"
        ):
            lock_output(path)


def test_a_full_disk_leaves_a_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write(path, "old")

    def full(self, text, **options):
        open(self, "w").close()  # there is room for an empty file
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        write(path, "new")
    assert path.read_text() == "old"


# ---- to resume ----------------------------------------------------------------------------------


def write_checkpoint(directory, config):
    """What check_output looks at."""
    torch.save({"version": 4}, directory / "training_state.pt")
    progress = {"settings": asdict(config), "prompts": "hash", "trained_ahead": []}
    progress["started"] = datetime(2026, 11, 30)
    (directory / "progress.yaml").write_text(yaml.safe_dump(progress))
    return directory / "progress.yaml"


def test_resume_without_a_checkpoint_or_with_other_prompts_is_refused(tmp_path, model_dir, capsys):
    config = builtin(output_dir=str(tmp_path), resume=True, steps=9)
    with pytest.raises(InputError, match="--resume: no checkpoint"):
        check_output(config, "hash")
    start_output(replace(config, resume=False), None)
    shutil.copytree(model_dir(), tmp_path / "step_4")
    progress = write_checkpoint(tmp_path / "step_4", config)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i}) + "\n" for i in range(1, 7))
    )
    with pytest.raises(InputError, match="--resume: seed was 0 and is now 5: keep it"):
        check_output(replace(config, seed=5), "hash")
    with pytest.raises(InputError, match="has made 4 updates, --steps is 4"):
        check_output(replace(config, steps=4), "hash")
    checkpoint = check_output(replace(config, lr=0.5), "hash")
    assert checkpoint == tmp_path / "step_4"
    assert capsys.readouterr().out == f"resuming from {checkpoint}\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    start_output(config, tmp_path / "step_4")
    # Updates 5 and 6 are made again.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    lines = ['{"step": 4, "prompt": "one\u2028two\x85three"}\n', '{"step": 5, "prompt": "é"}\n']
    (tmp_path / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    start_output(config, tmp_path / "step_4")
    assert (tmp_path / "samples.jsonl").read_text(encoding="utf-8") == lines[0]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    start_output(config, checkpoint)
    # And so is what the machine did not finish writing.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    start_output(replace(config, lr=0.5), checkpoint)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.5
    # A checkpoint keeps the settings that made it.
    assert read_progress(checkpoint)["settings"]["lr"] == 1e-3
    with pytest.raises(
        InputError, match="--resume: the prompts are not what they were: give the same files"
    ):
        check_output(config, "another hash")
    for text in ("", "a: [", "- 1\n", "{}", "settings:\nstarted: x\nprompts: hash\n"):
        progress.write_text(text)
        with pytest.raises(
            InputError, match="--resume: .*step_4 is damaged, or of an older version"
        ):
            check_output(config, "hash")
    progress.unlink()
    with pytest.raises(
        InputError, match="--resume: .*older version of this program: .*No such file"
    ):
        check_output(config, "hash")


def test_of_several_changed_settings_the_first_that_must_match_is_named(tmp_path):
    config = builtin(output_dir=str(tmp_path), resume=True, steps=9)
    start_output(replace(config, resume=False), None)
    (tmp_path / "step_4").mkdir()
    write_checkpoint(tmp_path / "step_4", config)
    with pytest.raises(InputError, match="--resume: seed was 0 and is now 1: keep it"):
        check_output(replace(config, seed=1, batch_size=3, window=100, lr=1.0), "hash")


def test_a_run_is_resumed_from_the_newest_checkpoint_that_is_whole(tmp_path):
    for name in ("step_4", "step_10", "step_12", "step_20_copy", "diverged_30"):
        (tmp_path / name).mkdir()
        torch.save({}, tmp_path / name / "training_state.pt")
    state = tmp_path / "step_12" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:100])
    assert [path.name for path in checkpoints(tmp_path)] == ["step_4", "step_10"]


def test_metrics_that_are_damaged_are_refused_before_anything_is_written(tmp_path):
    config = builtin(output_dir=str(tmp_path), resume=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish}\n')
    with pytest.raises(InputError, match="--resume: .*metrics.jsonl is damaged, move it away"):
        start_output(config, tmp_path / "step_4")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_loads_with_transformers_and_continues_bit_for_bit(
    model_dir, tmp_path, tokenizer
):
    config = config_for("forward_kl", top_k=6)
    table = stale_table(model_dir, config)
    straight = new_learner(model_dir(seed=2), config)
    straight.update(table, ROWS[:4])
    progress = {"settings": {"lr": 1.0}, "started": datetime(2026, 11, 30), "prompts": "hash"}
    progress["trained_ahead"] = [9, 11]
    straight.save(tmp_path, tokenizer, progress)
    saved = tmp_path / "step_1"
    assert checkpoints(tmp_path) == [saved]
    again = new_learner(str(saved), config)
    again.load(saved)
    assert again.version == 1 and read_progress(saved) == progress
    first, second = straight.update(table, ROWS[4:]), again.update(table, ROWS[4:])
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters, again.parameters))
    assert AutoModelForCausalLM.from_pretrained(saved).dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(saved)) == len(tokenizer)


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(tmp_path):
    (tmp_path / ".partial_step_9").mkdir()
    (tmp_path / ".partial_step_9" / "training_state.pt").touch()
    (tmp_path / "step_8").mkdir()
    assert checkpoints(tmp_path) == []


def test_a_full_disk_while_saving_is_one_kind_of_error_and_leaves_nothing_half(
    model_dir, tmp_path, tokenizer, monkeypatch
):
    """safetensors raises SafetensorError there, torch.save a RuntimeError."""
    config = config_for("forward_kl", top_k=6)
    learner = new_learner(model_dir(seed=2), config)
    learner.update(stale_table(model_dir, config), ROWS)
    for target, error in (
        ("transformers.modeling_utils.safe_save_file", SafetensorError),
        ("torch.save", RuntimeError),
    ):
        with (
            monkeypatch.context() as patch,
            pytest.raises(OSError, match="step_1 cannot be written: No space left"),
        ):
            patch.setattr(target, raising(error("No space left on device")))
            learner.save(tmp_path, tokenizer, [])
        assert not list(tmp_path.iterdir())
    learner.save(tmp_path, tokenizer, [])
    assert checkpoints(tmp_path) == [tmp_path / "step_1"]


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_checkpoint_holds_tied_weights_once_and_buffers_too(model_dir, tmp_path, tokenizer):
    learner = new_learner(model_dir(), config_for("forward_kl", top_k=6))
    learner.model.model.register_buffer("correction", torch.arange(3.0))
    learner.save(tmp_path, tokenizer, [])
    expected = {name for name, _ in learner.model.named_parameters()} | {"model.correction"}
    tensors = load_file(tmp_path / "step_0" / "model.safetensors")
    assert set(tensors) == expected and "lm_head.weight" not in expected
    assert all(torch.equal(tensors[name], p) for name, p in learner.model.named_parameters())


def test_parameters_that_never_had_a_gradient_resume_without_a_state(
    model_dir, tmp_path, tokenizer
):
    """A vision tower, the routing biases of a mixture of experts. The others have theirs back."""

    def with_idle(directory):
        model = load(directory)
        model.model.idle = torch.nn.Parameter(torch.ones(3))
        return Learner(model, config_for("forward_kl", top_k=6), 173, torch.float32)

    first = with_idle(model_dir())
    for _ in range(2):
        for name, p in first.model.named_parameters():
            p.grad = None if "idle" in name else torch.ones_like(p)
        first.optimizer.step()
    first.version = 2
    first.save(tmp_path, tokenizer, {})
    again = with_idle(model_dir())
    again.load(tmp_path / "step_2")
    states = [
        {n: l.optimizer.state.get(p, {}) for n, p in l.model.named_parameters()}
        for l in (first, again)
    ]
    assert states[0].keys() == states[1].keys() and not states[1]["model.idle"]
    for name, state in states[0].items():
        assert all(torch.equal(value, states[1][name][key]) for key, value in state.items()), name
    assert all(p.requires_grad for p in again.model.parameters())
    state = torch.load(tmp_path / "step_2" / "training_state.pt")
    del state["optimizer"]["state"]["model.norm.weight"]
    torch.save(state, tmp_path / "step_2" / "training_state.pt")
    with pytest.raises(InputError, match="training_state.pt is damaged, .*model.norm.weight"):
        with_idle(model_dir()).load(tmp_path / "step_2")
