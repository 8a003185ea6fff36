"""How to split the GPUs of a box between the roles: `python -m experiments.splits`.

For each pair of models it tries every split of the GPUs into learner ranks, generators and teachers, drops those that the
estimate of experiments/memory.py refuses, and prints the one with the shortest update. Nothing here was measured. The times are predicted
from peaks and assumed efficiencies:

    H100 SXM: 989 TFLOP/s in bfloat16 and 3.35 TB/s (NVIDIA's data sheet, without sparsity), 80 GB
    MATMUL, BANDWIDTH   the part of each that is reached (assumed)
    LAYER, SAMPLING     what a decode step costs beside reading memory, seconds a layer and a step (assumed)
    LINK                bytes a second that a rank gathers of a sharded model, and PUBLISH those into the mailbox (assumed)

A role's time is for one update. In a run with staleness the slowest role sets the pace; `--max-staleness 0` adds them up.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

from transformers import Qwen3Config

from experiments import memory
from config import Config
from experiments.memory import USABLE, estimate

model_size = memory.model_size = cache(memory.model_size)  # of each model once

FLOPS, BYTES, MEMORY = 989e12, 3.35e12, 80e9
MATMUL, BANDWIDTH = 0.4, 0.6
LAYER, SAMPLING = 30e-6, 1e-3
LINK, PUBLISH = 2e11, 5e9
PROMPT = 512
VOCAB = 151_936
SHAPES = {  # hidden, layers, MLP, query heads, key-value heads, size of a head, tied: the models' own config.json
    "0.5B": (896, 24, 4864, 14, 2, 64, True),  # Qwen2.5; the others are Qwen3
    "1.5B": (1536, 28, 8960, 12, 2, 128, True),  # Qwen2.5
    "0.6B": (1024, 28, 3072, 16, 8, 128, True),
    "1.7B": (2048, 28, 6144, 16, 8, 128, True),
    "4B": (2560, 36, 9728, 32, 8, 128, True),
    "8B": (4096, 36, 12288, 32, 8, 128, False),
    "32B": (5120, 64, 25600, 64, 8, 128, False),
}
PAIRS = [f"{student},{teacher},{lengths}" for student, teacher in (("0.6B", "8B"), ("1.7B", "8B"), ("8B", "32B")) for lengths in ("1024,2048", "8192,16384")]


def write_config(directory, name):
    hidden, layers, mlp, heads, groups, head, tied = SHAPES[name]
    path = Path(directory) / name
    Qwen3Config(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=head, tie_word_embeddings=tied, max_position_embeddings=40_960,
    ).save_pretrained(path)  # fmt: skip
    return str(path)


def seconds(config, mean, world, recompute):
    """(generators, teachers, learner with publish): seconds an update. `mean`: response tokens."""
    generators = config.generators
    count, layers, _, _, keys = model_size(config.student_path)
    teacher_count = model_size(config.teacher_path)[0]
    tokens = config.batch_size * (PROMPT + mean)
    slots = min(config.slots, config.table_rows / generators)
    read = 2 * count + slots * 2 * 2 * layers * keys * (PROMPT + mean / 2)
    step = max(read / (BYTES * BANDWIDTH), 2 * count * slots / (FLOPS * MATMUL)) + layers * LAYER + SAMPLING
    generator = config.batch_size * mean / (slots * generators) * step + 2 * count * config.batch_size * PROMPT / (FLOPS * MATMUL * generators)
    teacher = 2 * teacher_count * tokens / (FLOPS * MATMUL * config.teachers)
    products = (8 if recompute else 6) * count * tokens / (world * FLOPS * MATMUL)
    gathers = (3 * 2 + 4) * count / LINK * tokens / (world * config.micro_batch_tokens) if world > 1 else 0.0
    learner = max(products, gathers) + 20 * count / (world * BYTES * BANDWIDTH) + 2 * count / PUBLISH
    return generator, teacher, learner


def splits(config, mean, gpus):
    """What fits, the fastest first: (seconds of the slowest role, ranks, config, seconds, GiB, recompute)."""
    found = []
    counts = [(world, teachers) for world, teachers in product(range(1, gpus), repeat=2) if world + teachers < gpus and config.batch_size % teachers == 0]
    for (world, teachers), slots, tokens in product(counts, (64, 32, 16, 8), (16_384, 8192, 4096)):
        tokens = max(tokens, config.max_sequence)
        roles = {"teachers": teachers, "generators": gpus - world - teachers}
        choice = replace(config, slots=slots, micro_batch_tokens=tokens, **roles)
        for recompute in (False, True):
            needed = estimate(choice, world, recompute, 2)
            if max(needed) <= USABLE * MEMORY:
                times = seconds(choice, mean, world, recompute)
                found.append((max(times), world, choice, times, [size / 2**30 for size in needed], recompute))
                break
    return sorted(found, key=lambda split: (split[0], sum(split[3])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="PAIR", help="student,teacher,mean,longest response: 0.6B,8B,1024,2048")
    args = parser.parse_args()
    print("| student, teacher | response tokens: mean, longest | learner ranks, generators, teachers | `--slots`, `--micro-batch-tokens` "
          "| GiB: learner, generator, teacher | seconds an update: learner, generators, teachers |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        paths = {name: write_config(directory, name) for name in SHAPES}
        for student, teacher, *lengths in (pair.split(",") for pair in args.pairs):
            mean, longest = map(int, lengths)
            config = Config(
                student=paths[student], teacher=paths[teacher], max_prompt_tokens=PROMPT, max_new_tokens=longest,
                batch_size=args.batch_size, micro_batch_tokens=PROMPT + longest,
            )  # fmt: skip
            cells = [f"{student}, {teacher}", f"{mean:,}, {longest:,}"]
            fitting = splits(config, mean, args.gpus)
            if fitting:
                _, world, choice, (generating, scoring, learning), sizes, recompute = fitting[0]
                cells += [f"{world}{' (recomputing)' if recompute else ''}, {choice.generators}, {choice.teachers}", f"{choice.slots}, {choice.micro_batch_tokens:,}"]
                cells += [", ".join(f"{size:.0f}" for size in sizes), f"{learning:.1f}, {generating:.1f}, {scoring:.1f}"]
            print("| " + " | ".join(cells + ["none fits"] * (not fitting)) + " |")


if __name__ == "__main__":
    main()
