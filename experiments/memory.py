"""How much memory does a run need, and what would fit? With the options of train.py:

    python -m experiments.memory --nproc-per-node 2 --student org/small --teacher org/large

It prints what each role needs and what that consists of, whether each GPU holds its roles, and the
largest settings that fit. No model is loaded: the sizes come from config.json.

Letters of shapes: serial.py. A layer of n parameters keeps about 9 sqrt(n) values of every token
for the backward pass (counted in tests/test_memory.py, for dense models). With checkpointing it
keeps its input, F values. Without a backward pass one layer's values exist at a time. USABLE leaves
room for what CUDA and the libraries take.

A generator records a CUDA graph for each power of two of slots, and as many again for evaluation,
which uses the same KV cache. A graph's own memory is assumed (GRAPH).
"""

import argparse
import math
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import torch
from transformers import AutoModelForCausalLM

from experiments.study import at_least
from model import compute_dtype
from support.config import Config, InputError, parse, refusal, require
from support.load import shared_vocabulary, text_config
from support.roles import role_devices

USABLE = 0.9  # of a GPU's memory
GIB = 2**30
USUAL_GIB = 80.0
GRAPH = 32 * 2**20  # bytes of one CUDA graph of a decode step, besides its tensors (assumed)
PARTS = ("weights", "gradients, moments", "activations", "KV cache", "logits", "graphs")


# ---- what a role needs ------------------------------------------------------------------------


@cache
def model_size(path: str):
    """(parameters, layers, F, values of a token that a layer saves, values of its keys)."""
    settings = text_config(path)
    layers, features = settings.num_hidden_layers, settings.hidden_size
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(settings).num_parameters()
    heads = settings.num_attention_heads
    groups = getattr(settings, "num_key_value_heads", None) or heads
    keys = groups * (getattr(settings, "head_dim", None) or features // heads)
    saved = 9 * ((count - settings.vocab_size * features) / layers) ** 0.5
    return count, layers, features, saved, keys


def estimate(config: Config, ranks: int, size: int):
    """role -> {part: bytes} of one process, of a teacher on each of its GPUs. Each name of
    --teacher is a role of its own.

    `ranks`: learner ranks of a node. `size`: bytes of a value in the forward pass.
    """
    count, layers, features, saved, keys = model_size(config.path("student"))
    vocab = shared_vocabulary(config)
    chunk = 4 * vocab * config.head_chunk  # of logits, float32
    tokens = size * config.micro_batch_tokens
    # Sharded, two layers are whole at a time, beside embedding and head.
    whole = count if ranks == 1 else 2 * (vocab * features + count / layers)
    kept = layers * features + saved if config.checkpoint_activations else layers * saved
    learner = {
        "weights": 4 * count / ranks + size * whole + 2 * vocab * features,
        # Two moments, and a scratch copy of Adam's. The head's gradient is whole.
        "gradients, moments": 16 * count / ranks + 4 * vocab * features,
        "activations": kept * tokens,
        "logits": chunk,
    }
    if sum(learner.values()) < 4 * count:  # at the start every rank loads the model whole
        learner = {"weights": 4 * count}
    slots = min(config.slots, rollouts_of_a_generator(config))
    prefilled = min(config.micro_batch_tokens, slots * config.max_prompt_tokens)
    evaluations = 2 if config.eval_every else 1
    generator = {
        "weights": size * count,
        "activations": size * saved * max(prefilled, slots),
        "KV cache": slots * 2 * size * layers * keys * config.max_sequence,
        "logits": (1 + evaluations) * slots * 12 * vocab,  # eager steps, and each pool of graphs
        "graphs": evaluations * len(shapes_of_steps(slots)) * GRAPH,
    }
    roles = {"learner": learner, "generator": generator}
    for name, path in config.teacher_paths.items():
        count, _, _, saved, _ = model_size(path)
        roles[f"teacher {name}".strip()] = {
            "weights": size * count / config.teacher_gpus,
            "activations": saved * tokens,
            "logits": 2 * chunk,
        }
    return roles


def needed(config: Config, ranks: int, size: int):
    """role -> bytes, as `estimate`."""
    return {role: sum(parts.values()) for role, parts in estimate(config, ranks, size).items()}


def shapes_of_steps(slots: int):
    """For how many slots there is a graph: see Generator.computed_slots."""
    return sorted({min(slots, 1 << n) for n in range(slots.bit_length() + 1)})


def rollouts_of_a_generator(config: Config):
    """How many it has at once, at most: more slots are of no use."""
    return math.ceil(config.table_rows / config.generators)


# ---- what a GPU holds -------------------------------------------------------------------------


def roles_on_gpus(config: Config, ranks: int, gpus: int):
    """For every GPU the processes that it holds: [("learner", 0), ...], ..."""
    roles = [("learner", i) for i in range(ranks)]
    for name in config.role_names[:-1]:
        role, _, number = name.rpartition(" ")
        roles.append((role, int(number)))
    held = [[] for _ in range(gpus)]
    for (role, number), device in zip(roles, role_devices(config, ranks, gpus)):
        count = config.teacher_gpus if role.startswith("teacher") else 1
        for gpu in range(device.index, device.index + count):
            held[gpu].append((role, number))
    return held


def loads(config: Config, ranks: int, gpus: int, size: int):
    """Bytes that every GPU must have."""
    sizes = needed(config, ranks, size)
    held = roles_on_gpus(config, ranks, gpus)
    return [sum(sizes[role] for role, _ in processes) for processes in held]


def fits(config: Config, ranks: int, memory: list[float], size: int):
    """`memory`: bytes of every GPU."""
    needs = loads(config, ranks, len(memory), size)
    return all(need <= USABLE * limit for need, limit in zip(needs, memory))


def largest(config: Config, ranks: int, memory: list[float], size: int):
    """`config` with the largest micro_batch_tokens, then slots, that fit; None if none do.

    Fewer slots than asked for are tried only if they must be.
    """
    most = rollouts_of_a_generator(config)
    asked = min(config.slots, most)
    tokens = [longest_pass(config), *powers(longest_pass(config), token_limit(config))]
    for slots in (asked, *reversed(powers(0, asked))):
        for count in reversed(tokens):
            found = replace(config, micro_batch_tokens=count, slots=slots)
            if fits(found, ranks, memory, size):
                more = (replace(found, slots=n) for n in (most, *reversed(powers(slots, most))))
                return next((one for one in more if fits(one, ranks, memory, size)), found)
    return None


def longest_pass(config: Config):
    """The longest sequence that any model reads."""
    return max(config.max_sequence, config.max_teacher_sequence)


def token_limit(config: Config):
    """A forward pass over all rollouts of an update; a power of two."""
    return 1 << (config.batch_size * longest_pass(config) - 1).bit_length()


def powers(above: int, limit: int):
    """Powers of two in (above, limit], rising."""
    return [1 << n for n in range(limit.bit_length()) if above < 1 << n <= limit]


def smallest(config: Config):
    """`config` with as little at once as can be."""
    least = {"micro_batch_tokens": longest_pass(config), "slots": 1, "checkpoint_activations": True}
    return replace(config, **least)


# ---- the command line -------------------------------------------------------------------------

FIXES = {
    "learner": "raise --nproc-per-node, or lower --head-chunk or --max-new-tokens",
    "generator": "lower --max-new-tokens, or take a smaller student",
    "teacher": "raise --teacher-gpus, or lower --head-chunk or --max-new-tokens",
}


def report(config: Config, ranks: int, memory: list[float]):
    """The lines that are printed."""
    size = compute_dtype(config, torch.device("cuda")).itemsize
    yield from table(config, ranks, size)
    yield ""
    yield from of_gpus(config, ranks, memory, size)
    yield ""
    yield f"The largest that fit: powers of two, or one sequence ({longest_pass(config)} tokens)"
    for on in (False, True):
        flag = "--checkpoint-activations" if on else "--no-checkpoint-activations"
        found = largest(replace(config, checkpoint_activations=on), ranks, memory, size)
        settings = "none"
        if found:
            settings = f"--micro-batch-tokens {found.micro_batch_tokens} --slots {found.slots}"
        yield f"  {flag:28s} {settings}"
    if not found:  # not even with checkpointing
        yield from advice(config, ranks, memory, size)


def table(config: Config, ranks: int, size: int):
    """What each role needs."""
    yield f"{'GiB of a process':24s}  {'  '.join(PARTS)}     all"
    roles = estimate(config, ranks, size)
    counts = Counter(name.rpartition(" ")[0] for name in config.role_names)
    counts["learner"] = ranks
    for role, parts in roles.items():
        name = f"{role}, {counts[role]} of them" if counts[role] > 1 else role
        if role.startswith("teacher") and config.teacher_gpus > 1:
            name += ", on each GPU"
        cells = [gib(parts[part]) if part in parts else "-" for part in PARTS]
        padded = "  ".join(f"{cell:>{len(part)}s}" for cell, part in zip(cells, PARTS))
        yield f"{name:24s}  {padded}  {gib(sum(parts.values())):>6s}"
    if len(roles["learner"]) == 1:
        yield "The learner needs most at the start, when each rank loads the model whole."


def of_gpus(config: Config, ranks: int, memory: list[float], size: int):
    """Does each GPU hold its roles?"""
    held = roles_on_gpus(config, ranks, len(memory))
    needs = loads(config, ranks, len(memory), size)
    for gpu, (processes, need, limit) in enumerate(zip(held, needs, memory)):
        names = ", ".join(f"{role} {number}" for role, number in processes) or "nothing"
        verdict = "fits" if need <= USABLE * limit else "TOO MUCH"
        yield (
            f"GPU {gpu}: {gib(need)} of {gib(USABLE * limit)} GiB ({USABLE:.0%} of {gib(limit)}), "
            f"{verdict}: {names}"
        )


def advice(config: Config, ranks: int, memory: list[float], size: int):
    """What to change where even the smallest settings do not fit."""
    least = smallest(config)
    sizes = needed(least, ranks, size)
    needs = loads(least, ranks, len(memory), size)
    for gpu, processes in enumerate(roles_on_gpus(least, ranks, len(memory))):
        limit = USABLE * memory[gpu]
        if needs[gpu] <= limit:
            continue
        alone = [role for role, _ in processes if sizes[role] > limit]
        fix = "; ".join(f"{role}: {FIXES[role.split()[0]]}" for role in dict.fromkeys(alone))
        yield (
            f"GPU {gpu} needs {gib(needs[gpu])} GiB with one sequence at a time. "
            + (fix or "Its roles would fit on a GPU each: take more GPUs, or fewer processes")
        )


def gib(count: float):
    return f"{count / GIB:.1f}"


def gpu_memory(config: Config, ranks: int, gpus: int | None, gpu_gib: float | None):
    """(bytes of every GPU of a node, what to tell the user)."""
    found = torch.cuda.device_count()
    teachers = len(config.teacher_processes) * config.teacher_gpus
    processes = ranks + config.generators + teachers
    count = gpus or found or processes
    require(ranks <= count, f"{ranks} learner ranks, {count} GPUs: lower --nproc-per-node")
    if gpu_gib:
        return [gpu_gib * GIB] * count, ""
    if found:
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(found)]
        return [sizes[min(i, found - 1)] for i in range(count)], ""
    note = f"No GPU is here: these are {count} of {USUAL_GIB:.0f} GiB (--gpus, --gpu-gib).\n"
    return [USUAL_GIB * GIB] * count, note


def parse_args(argv=None):
    """(own options, Config)"""
    parser = argparse.ArgumentParser(
        "python -m experiments.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of train.py: see its --help.",
        allow_abbrev=False,
    )
    option = parser.add_argument
    count = at_least(1)
    option("--nproc-per-node", type=count, default=1, help="learner ranks, as for torchrun")
    option("--gpus", type=count, help="of a node; default: those here, or one for each process")
    option("--gpu-gib", type=at_least(0.1, float), help="memory of a GPU; default: of those here")
    own, rest = parser.parse_known_args(argv)
    return own, parse(["--prompts=builtin", *rest])  # it needs none


def main():
    try:
        own, config = parse_args()
        memory, note = gpu_memory(config, own.nproc_per_node, own.gpus, own.gpu_gib)
        with refusal("the sizes of the models cannot be estimated"):
            shared_vocabulary(config)
            for path in (config.path("student"), *config.teacher_paths.values()):
                model_size(path)
        print(note + "\n".join(report(config, own.nproc_per_node, memory)))
    except InputError as error:
        sys.exit(f"experiments.memory: error: {error}")


if __name__ == "__main__":
    main()
