"""Everything that lies on disk: the output directory, checkpoints, what --resume needs of them.

    config.yaml      the settings as used
    metrics.jsonl    an object per update
    samples.jsonl    answers of evaluations, and rollouts.jsonl: of training (log.py appends all)
    step_N/          a Hugging Face model directory (float32), with two files for --resume:
                     training_state.pt (the optimiser's) and progress.yaml (the run's)
    .lock            keeps a second run out

A file or a checkpoint is whole or absent, never half.
"""

import fcntl
import json
import os
import shutil
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.distributed.checkpoint import state_dict

from support.config import Config, InputError, refusal, require

# The settings that decide which rollouts come next, and how old they may be.
MUST_MATCH = """student prompts eval_prompts eval_size seed batch_size samples_per_prompt window
    max_prompt_tokens max_teacher_prompt_tokens teacher_system drop_long_prompts
    chat_template_kwargs""".split()
WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


# ---- the output directory ---------------------------------------------------------------------


def lock_output(output: Path):
    """Make the directory, and keep other runs out of it until the file descriptor is closed."""
    with refusal(f"--output-dir {output} cannot be used, choose another"):
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(output / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--output-dir {output}: another run uses it, choose another")
    except OSError:
        pass  # a file system without locks
    return lock


def checkpoints(output: Path):
    """The checkpoints of a run that are whole, oldest first."""
    states = filter(zipfile.is_zipfile, output.glob("step_*/training_state.pt"))
    return sorted((path.parent for path in states if path.parent.name[5:].isdigit()), key=step_of)


def step_of(checkpoint: Path):
    return int(checkpoint.name.removeprefix("step_"))


def start_output(config: Config, checkpoint: Path | None):
    """Write config.yaml and drop the lines of updates that will be made again."""
    config.output.mkdir(parents=True, exist_ok=True)
    files = [config.output / f"{name}.jsonl" for name in ("metrics", "samples", "rollouts")]
    kept = [lines_until(step_of(checkpoint), path) if checkpoint else [] for path in files]
    write(config.output / "config.yaml", config.dump())
    for path, lines in zip(files, kept):
        write(path, "".join(lines))
    (config.output / "trace.json").write_text("[\n")  # each event follows as a line


def lines_until(step: int, path: Path):
    """The lines of a file of JSON objects up to an update."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:  # str.splitlines cuts text, too
        whole = [line for line in file if line.endswith("}\n")]  # a crash may have cut the last
    with refusal(f"--resume: {path} is damaged, move it away"):
        return [line for line in whole if json.loads(line)["step"] <= step]


def write(path: Path, text: str):
    """The file is whole or as it was, also when the disk is full."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# ---- to resume --------------------------------------------------------------------------------


def check_output(config, fingerprint):
    """The checkpoint to resume from. None: a new run.

    `fingerprint`: of the prompts. Raises InputError if the directory holds another run, if there is
    nothing to resume, or if the prompts or a setting in MUST_MATCH have changed.
    """
    output = config.output
    checkpoint = (checkpoints(output) or [None])[-1]
    if config.resume:
        check_resume(config, checkpoint, fingerprint)
        return checkpoint
    fix = "choose a new directory, or --resume if a step_N is in it"
    metrics = output / "metrics.jsonl"
    is_used = checkpoint or (metrics.exists() and metrics.stat().st_size)
    require(not is_used, f"--output-dir {output} holds another run: {fix}")


def check_resume(config, checkpoint, fingerprint):
    fix = "start without --resume, or choose a new directory"
    require(checkpoint, f"--resume: no checkpoint (step_N) in --output-dir {config.output}: {fix}")
    done = step_of(checkpoint)
    progress = read_progress(checkpoint)
    for name in MUST_MATCH:
        before, now = progress["settings"].get(name), getattr(config, name)
        require(before == now, f"--resume: {name} was {before!r} and is now {now!r}: keep it")
    changed = "--resume: the prompts are not what they were: give the same files"
    require(progress["prompts"] == fingerprint, changed)
    fix = f"--steps is {config.steps}: raise it"
    require(done < config.steps, f"--resume: {config.output} has made {done} updates, {fix}")
    print(f"resuming from {checkpoint}")


def read_progress(checkpoint):
    """{"settings": of the run, "started": when it began, "prompts": their fingerprint,
    "trained_ahead": see Tickets}.
    """
    with refusal(f"--resume: {checkpoint} is damaged, or of an older version of this program"):
        progress = yaml.safe_load((checkpoint / "progress.yaml").read_text())
        missing = {"settings", "started", "prompts", "trained_ahead"} - progress.keys()
        require(not missing, f"progress.yaml lacks {missing}")
        return progress


# ---- checkpoints ------------------------------------------------------------------------------


def save(target: Path, model, optimizer, tokenizer, progress):
    """Write step_N. Every rank of node 0 takes part: each has its part of the model.

    `progress`: what `read_progress` returns. Raises OSError if that fails.
    """
    weights, moments = state_dict.get_state_dict(model, optimizer, options=WHOLE)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    once = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - once.keys()
    weights = {name: value for name, value in weights.items() if name not in tied}
    untrained = sorted(once.keys() - moments["state"].keys())  # they never had a gradient
    state = {"version": step_of(target), "optimizer": moments, "untrained": untrained}
    unfinished = target.with_name(f".partial_{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        torch.save(state, unfinished / "training_state.pt")
        (unfinished / "progress.yaml").write_text(yaml.safe_dump(progress))
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    except Exception as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{target} cannot be written: {error}") from error


def load_optimizer(checkpoint: Path, model, optimizer):
    """Restore the optimiser's state. Another number of ranks may have saved it.

    Parameters that never had a gradient have none yet. torch looks for the state of those alone
    that require a gradient.
    """
    path = checkpoint / "training_state.pt"
    with refusal(f"--resume: {path} is damaged, move {checkpoint} away"):
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        named = dict(model.named_parameters())
        idle = [named[name] for name in state["untrained"] if named[name].requires_grad]
        for parameter in idle:
            parameter.requires_grad_(False)
        state_dict.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
        for parameter in idle:
            parameter.requires_grad_(True)


def drop_old(output: Path, keep: int):
    """Leave the newest `keep` checkpoints, which is 0 for all."""
    if keep > 0:
        for old in checkpoints(output)[:-keep]:
            shutil.rmtree(old)
