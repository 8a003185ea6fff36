"""Training throughput against TRL on a real pair: `python -m benchmarks.against_trl`.

The pair of experiments/heal.py (a real 135M chat model and its damaged student, which says what to
install), 16 rollouts an update, up to 48 tokens, AdamW, float32. Both use all cores: ours
asynchronously, one thread a role; TRL's DistillationTrainer (`pip install trl==1.16.0`, reverse KL
over the full vocabulary) synchronously, with that many threads. Whole runs in alternation. Tokens
per second are response tokens trained over the time of the updates after the first `--skip`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from experiments.heal import NEW_TOKENS, pair_flags, prepare

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16


def ours(pair: Path, output: Path, updates: int, skip: int):
    command = [sys.executable, str(ROOT / "train.py"), *pair_flags(pair, BATCH)]
    command += [f"--output-dir={output}", f"--steps={updates}", "--lr=2e-4", "--cpu-threads=1"]
    subprocess.run(command, check=True, capture_output=True)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = records[-1]["wall_seconds"] - records[skip - 1]["wall_seconds"]
    return sum(record["tokens"] for record in records[skip:]) / seconds


def theirs(pair: Path, output: Path, updates: int, skip: int):
    """In a process of its own: TRL changes global settings."""
    command = [sys.executable, "-m", "benchmarks.against_trl", "--theirs", str(pair), str(output)]
    command += [f"--updates={updates}", f"--skip={skip}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout.splitlines()[-1])


def run_trl(pair: Path, output: Path, updates: int, skip: int):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    torch.set_num_threads(os.cpu_count())
    rows = [json.loads(line) for line in (pair / "prompts.jsonl").read_text().splitlines()]
    marks, tokens = [], []

    def counted(self, inputs):
        """The first thing that an update does."""
        marks.append(time.perf_counter())
        found = generate(self, inputs)
        tokens.append(int(found["completion_mask"].sum()))
        return found

    generate = DistillationTrainer._generate_and_score_completions
    args = DistillationConfig(
        output_dir=str(output),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        max_steps=updates,
        max_completion_length=NEW_TOKENS,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        beta=1.0,
        temperature=1.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=updates,
    )
    models = [
        AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32)
        for name in ("student", "teacher")
    ]
    trainer = DistillationTrainer(
        model=models[0],
        teacher_model=models[1],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(pair / "student"),
    )
    DistillationTrainer._generate_and_score_completions = counted
    trainer.train()
    marks.append(time.perf_counter())
    return sum(tokens[skip:updates]) / (marks[updates] - marks[skip])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--skip", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--theirs", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.theirs:
        print(run_trl(*args.theirs, args.updates, args.skip))
        return
    ratios = []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        prepare(place / "pair")
        for number in range(args.repeats):
            sizes = (args.updates, args.skip)
            mine = ours(place / "pair", place / f"ours_{number}", *sizes)
            other = theirs(place / "pair", place / f"trl_{number}", *sizes)
            ratios.append(mine / other)
            print(f"ours {mine:.1f} tokens/s, TRL {other:.1f}: {ratios[-1]:.2f}x", flush=True)
    print(f"median {statistics.median(ratios):.2f}x of {len(ratios)} pairs of runs in turn")


if __name__ == "__main__":
    main()
