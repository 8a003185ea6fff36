"""What a run needs of the memory there is, before a model is loaded.

Letters of shapes: serial.py. A layer of n parameters keeps about 9 sqrt(n) values of every token
for the backward pass (counted in tests/test_memory.py, for dense models). With checkpointing it
keeps its input, D values. USABLE leaves room for what CUDA and the libraries take.
"""

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from config import Config, InputError
from model import compute_dtype, shared_vocabulary, text_config

USABLE = 0.9  # of a device's memory


# ---- GPUs -------------------------------------------------------------------------------------


def model_size(path):
    """(parameters, layers, D, values of a token that a layer saves, values of its keys)."""
    settings = text_config(path)
    layers, width = settings.num_hidden_layers, settings.hidden_size
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(settings).num_parameters()
    heads = settings.num_attention_heads
    groups = getattr(settings, "num_key_value_heads", None) or heads
    keys = groups * (getattr(settings, "head_dim", None) or width // heads)
    saved = 9 * ((count - settings.vocab_size * width) / layers) ** 0.5
    return count, layers, width, saved, keys


def estimate(config, world, recompute, size):
    """Bytes a GPU of a learner rank, a generator and a teacher. `size`: of a value, bytes."""
    count, layers, width, saved, keys = model_size(config.student_path)
    teacher_count, _, _, teacher_saved, _ = model_size(config.teacher_path)
    vocab = shared_vocabulary(config)
    logits = 4 * vocab * config.head_chunk
    masters = 20 * count / world  # with gradient, two moments, and a scratch copy of Adam's
    gathered = count if world == 1 else 2 * (vocab * width + count / layers)
    kept = layers * width + saved if recompute else layers * saved
    learner = masters + size * (gathered + kept * config.micro_batch_tokens)
    learner = max(learner + 6 * vocab * width + logits, 4 * count)  # every rank loads it whole
    slots = min(config.slots, config.table_rows)
    cache = slots * (2 * size * layers * keys * config.max_sequence + 12 * vocab)
    teacher = size * (
        teacher_count / config.teacher_gpus + teacher_saved * config.micro_batch_tokens
    )
    return learner, size * count + cache, teacher + 2 * logits


def plan_memory(config: Config, world: int, devices):
    """(does the learner recompute its activations?, what to tell the user).

    `devices`: of all roles. Raises InputError, with the numbers, if a GPU is too small and
    `config.checkpoint_activations` is auto.
    """
    choice = config.checkpoint_activations
    if devices[0].type == "cpu":
        return choice == "on", ""
    size = compute_dtype(config, devices[0]).itemsize
    for recompute in (False, True) if choice == "auto" else (choice == "on",):
        learner, generator, teacher = estimate(config, world, recompute, size)
        sizes = [learner] * world + [generator] * config.generators
        sizes += [teacher] * config.teachers  # on the first GPU of each
        text = (
            f"estimated memory, GiB: learner {learner / 2**30:.1f}, "
            f"generator {generator / 2**30:.1f}, teacher {teacher / 2**30:.1f}"
        )
        fits = True
        for device in dict.fromkeys(devices):
            needed = sum(part for part, place in zip(sizes, devices) if place == device)
            limit = USABLE * torch.cuda.get_device_properties(device).total_memory
            fits &= needed <= limit
            text += f"; {device}: {needed / 2**30:.1f} of {limit / 2**30:.1f}"
        if fits or choice != "auto":
            return recompute, f"{text}\n"
    raise InputError(
        f"{text}: lower --micro-batch-tokens ({config.micro_batch_tokens}) for learner and "
        f"teacher, --slots ({config.slots}) for a generator, or raise --nproc-per-node or "
        f"--teacher-gpus ({config.teacher_gpus}). "
        "--checkpoint-activations on or off starts it all the same"
    )


# ---- the machine's own ------------------------------------------------------------------------


def available_memory():
    """Bytes that may still be used: what the kernel calls available, or a cgroup's limit."""
    free = 1024 * number_after("MemAvailable:", Path("/proc/meminfo"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        return min(free, limit - used + number_after("inactive_file", group / "memory.stat"))
    except (OSError, ValueError):  # no cgroup, or its limit is "max"
        return free


def number_after(name, path):
    return int(re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)[1])


def check_memory(needed, config):
    """Raises MemoryError before anything is allocated."""
    free = available_memory()
    if needed > 0.9 * free:
        raise MemoryError(
            f"the rollout table and the weight mailbox need {needed / 2**20:,.0f} MiB of shared "
            f"memory, {free / 2**20:,.0f} MiB are available: lower --batch-size "
            f"({config.batch_size}), --max-staleness ({config.max_staleness}), --max-new-tokens "
            f"({config.max_new_tokens}) or the candidates per position ({config.num_candidates}), "
            "or give the container more memory"
        )
