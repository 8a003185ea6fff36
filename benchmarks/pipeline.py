"""Synchronous against asynchronous training, whole runs back to back:
`python -m benchmarks.pipeline` and `python -m benchmarks.pipeline --mix smollm2`.

All modes are `train.py` as shipped, in alternation, `--repeats` times each, on a mix of response
lengths:

  default  the built-in task and models
  tail     a random student of the built-in size whose responses end at random (several stop ids):
           geometric lengths, mean about 40, up to 160 tokens; scored by the built-in teacher,
           learning rate 1e-9 so that it stays so
  smollm2  the real 135M chat model and its damaged student of experiments/heal.py, which says what
           to install: 16 rollouts an update, up to 48 tokens

Modes: `sync` is strict (--max-staleness 0: every token from the weights it trains) and streams
finished rollouts to the teacher while the others decode; `async` is the default; `arrival` adds
--window 100 (order of arrival), so that no update waits for one long answer. Each mode gets the
threads per role that suit it best: a pilot run tries all of --threads.
Tokens per second are response tokens trained over the wall time of the updates after the first
`--skip`; evaluation is off.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from experiments.heal import pair_flags, prepare

ROOT = Path(__file__).resolve().parent.parent
STOPS = list(range(130, 134))
MODES = {"sync": ["--max-staleness=0"], "async": [], "arrival": ["--window=100"]}


def long_tailed(directory: Path) -> list[str]:
    """Flags for the mix `tail`: its student, and the teacher with room for its sequences."""
    from assets.tokenizer import build_tokenizer
    from support.load import load_model

    torch.manual_seed(0)
    student, teacher = (
        load_model(str(ROOT / "assets" / name), torch.float32, torch.device("cpu"))
        for name in ("student", "teacher")
    )
    student = type(student)(student.config)
    student.generation_config.eos_token_id = STOPS
    flags = [f"--config={ROOT}/assets/builtin.yaml", "--lr=1e-9", "--max-new-tokens=160"]
    for name, model in (("student", student), ("teacher", teacher)):
        model.config.max_position_embeddings = 256
        model.save_pretrained(directory / name)
        build_tokenizer().save_pretrained(directory / name)
        flags.append(f"--{name}={directory / name}")
    return flags


def run(mode: str, threads: int, flags: list[str], skip: int) -> dict:
    """One whole run; the medians and totals of its updates after the first `skip`."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=1",
            str(ROOT / "train.py"),
        ]
        command += [f"--output-dir={output}", f"--cpu-threads={threads}", "--eval-every=0", *flags]
        subprocess.run(command + MODES[mode], check=True, capture_output=True)
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    kept = records[skip:]
    seconds = records[-1]["wall_seconds"] - records[skip - 1]["wall_seconds"]
    busy = {
        f"{role}_busy": statistics.mean(r[f"{role}_busy"] for r in kept)
        for role in ("generator", "teacher", "learner")
    }
    return {
        "tokens_per_second": sum(r["tokens"] for r in kept) / seconds,
        "lag_mean": statistics.mean(r["lag_mean"] for r in kept),
        **busy,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--mix",
        nargs="+",
        default=["default", "tail"],
        choices=["default", "tail", "smollm2"],
    )
    parser.add_argument("--flags", default="", help="further train.py flags for every mode")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    table = []
    with tempfile.TemporaryDirectory() as directory:
        tail = long_tailed(Path(directory))
        for mix in args.mix:
            flags = [f"--steps={args.steps}", *args.flags.split()]
            if mix == "tail":
                flags += tail
            if mix == "smollm2":
                prepare(Path(directory) / "heal")
                flags += [*pair_flags(Path(directory) / "heal", 16), "--lr=2e-4"]
            threads = {}
            for mode in MODES:
                pilot = {
                    count: run(mode, count, flags, args.skip)["tokens_per_second"]
                    for count in args.threads
                }
                threads[mode] = max(pilot, key=pilot.get)
            runs = {mode: [] for mode in MODES}
            for _ in range(args.repeats):
                for mode in MODES:
                    runs[mode].append(run(mode, threads[mode], flags, args.skip))
            for mode, results in runs.items():
                ratios = sorted(
                    r["tokens_per_second"] / s["tokens_per_second"]
                    for r, s in zip(results, runs["sync"])
                )
                row = {"mix": mix, "mode": mode, "threads": threads[mode]}
                row |= {name: statistics.median(r[name] for r in results) for name in results[0]}
                row |= {
                    "ratio": statistics.median(ratios),
                    "ratio_min": ratios[0],
                    "ratio_max": ratios[-1],
                }
                table.append(row)
                print(
                    f"{mix:8s} {mode:8s} {row['threads']} threads/role  "
                    f"{row['tokens_per_second']:6.0f} tokens/s  {row['ratio']:.2f}x "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f})  "
                    f"busy: generator {row['generator_busy']:4.0%}, "
                    f"teacher {row['teacher_busy']:4.0%}, "
                    f"learner {row['learner_busy']:4.0%}  lag {row['lag_mean']:.2f}",
                    flush=True,
                )
    if args.json:
        machine = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu": platform.machine(),
            "cores": os.cpu_count(),
        }
        Path(args.json).write_text(
            json.dumps(
                machine | {"flags": args.flags, "steps": args.steps, "rows": table}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
