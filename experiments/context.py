"""Context distillation of a real model:
`python -m experiments.context`, about a quarter of an hour on two cores.

The teacher is SmolLM2-135M with three worked examples in its prompt, each answered in one short
sentence. The student is the same model without them: `train.py --teacher student`, and rows with
`teacher_messages`. It learns to write as if the examples stood there, from its own answers alone.
experiments/heal.py says what to install.

`--out` gets the model, prompts.jsonl, held_out.jsonl and run/. The CSV has a line for each held-out
prompt, before and after: tokens of a sampled answer, whether it is one short sentence, the exact
reverse KL to the teacher at its tokens, and the answer. The lines "teacher" are the teacher's own
answers. The figure needs matplotlib.
"""

import argparse
import csv
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from channel import STOP, Rollout
from experiments.heal import (
    CPU,
    NEW_TOKENS,
    mean_and_error,
    prepare,
    questions,
    respond,
    response_logits,
)
from experiments.study import RESULTS, ROOT, RUNS, at_least
from support.config import builtin
from support.data import for_teachers, read_jsonl
from support.load import load_model, load_tokenizer, shared_vocabulary

EXAMPLES = {
    "What is the capital of Sweden?": "The capital of Sweden is Stockholm.",
    "Why do we need shoes?": "Shoes protect our feet and keep them warm.",
    "Name three fruits.": "Apples, pears and plums.",
}
LENGTHS = {"max_prompt_tokens": 64, "max_teacher_prompt_tokens": 160, "max_new_tokens": NEW_TOKENS}
HELD_OUT = 48  # questions
LONGEST = 160 + NEW_TOKENS
COLUMNS = ("when", "prompt", "tokens", "is_short", "reverse_kl", "answer")


def is_short(text: str, is_finished: bool):
    """One sentence of at most 25 words, to its end."""
    return bool(
        is_finished and re.fullmatch(r"[^.!?\n]+[.!?]", text.strip()) and len(text.split()) <= 25
    )


def rows():
    """Of prompts.jsonl and held_out.jsonl."""
    examples = []
    for question, answer in EXAMPLES.items():
        examples.append({"role": "user", "content": question})
        examples.append({"role": "assistant", "content": answer})
    for question in questions():
        asked = {"role": "user", "content": question}
        yield {"messages": [asked], "teacher_messages": [*examples, asked]}


def measure(when: str, student: Path, teacher: Path, prompts):
    """Lines of the CSV: of the student's answers, or of the teacher's own."""
    tokenizer = load_tokenizer("--student", str(student))
    models = [
        load_model(str(path), torch.float32, CPU, length=LONGEST) for path in (student, teacher)
    ]
    read = [prompt.for_teacher if when == "teacher" else prompt.ids for prompt in prompts]
    lines = []
    for number, rollout in enumerate(respond(student, read, LONGEST - NEW_TOKENS)):
        text = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        # The same answer, after the teacher's prompt.
        other = Rollout(prompts[number].for_teacher, candidate_ids=rollout.candidate_ids)
        with torch.no_grad():
            s = response_logits(models[0], rollout).log_softmax(-1)  # [T,V]
            t = response_logits(models[1], other).log_softmax(-1)
        kl = float((s.exp() * (s - t)).sum(-1).mean())
        short = int(is_short(text, rollout.finish == STOP))
        lines.append(dict(zip(COLUMNS, (when, number, len(s), short, kl, text))))
    return lines


def train(out: Path, model: Path, steps: int, lr: float, flags: list[str]):
    command = [
        sys.executable, str(ROOT / "train.py"), f"--student={model}", "--teacher=student",
        f"--prompts={out}/prompts.jsonl",
        *(f"--{name.replace('_', '-')}={value}" for name, value in LENGTHS.items()),
        f"--output-dir={out}/run", f"--steps={steps}", f"--lr={lr}", "--batch-size=16",
        "--slots=16", "--micro-batch-tokens=1024", "--head-chunk=256", "--eval-every=0",
        "--save-every=20", "--cpu-threads=1", *flags,
    ]  # fmt: skip
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def summary(lines):
    """A line for each of before, after, teacher; then answers side by side."""
    rows = []
    of = {when: [line for line in lines if line["when"] == when] for when in dict.fromkeys(
        line["when"] for line in lines)}  # fmt: skip
    for when, own in of.items():
        short = statistics.mean(line["is_short"] for line in own)
        tokens = statistics.mean(line["tokens"] for line in own)
        kl = mean_and_error([line["reverse_kl"] for line in own])
        rows.append(
            f"{when:8s} reverse KL {kl}, {tokens:.1f} tokens, {short:.0%} one short sentence"
        )
    for number in range(3):
        rows += [f"{when:8s} {of[when][number]['answer']!r}" for when in of]
    return "\n".join(rows)


def write(path: Path, lines):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=at_least(1), default=60, help="updates")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--out", type=Path, default=RUNS / "context")
    parser.add_argument("--csv", type=Path, default=RESULTS / "context.csv")
    parser.add_argument("--flags", default="", help='further flags of train.py: --flags="--seed=1"')
    args = parser.parse_args()
    prepare(args.out)
    model = args.out / "teacher"  # whole, as it comes
    lines = [json.dumps(row) + "\n" for row in rows()]
    (args.out / "held_out.jsonl").write_text("".join(lines[:HELD_OUT]))
    (args.out / "prompts.jsonl").write_text("".join(lines[HELD_OUT:]))
    config = builtin(student=str(model), teacher="student", **LENGTHS)
    tokenizer = load_tokenizer("--student", str(model))
    held_out = read_jsonl(str(args.out / "held_out.jsonl"), tokenizer, 64)
    held_out = for_teachers(held_out, config, {}, shared_vocabulary(config))
    lines = measure("before", model, model, held_out)
    lines += measure("teacher", model, model, held_out)
    print(summary(lines), flush=True)
    train(args.out, model, args.steps, args.lr, args.flags.split())
    lines += measure("after", args.out / "run" / f"step_{args.steps}", model, held_out)
    write(args.csv, lines)
    print(summary(lines))
    if importlib.util.find_spec("matplotlib"):
        from experiments.run_figure import draw_context
        from experiments.run_files import read_run

        draw_context(read_run(args.out / "run"), lines, args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
