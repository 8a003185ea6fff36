"""Accuracy of the default run over seeds, asynchronous and synchronous:
`python -m benchmarks.seeds`.

Whole runs of `train.py` with its defaults and with --max-staleness 0. Prints greedy exact match on
the held-out prompts before and after, the wall time of training, and the largest lag of any trained
token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(seed: int, flags: list[str]) -> dict:
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
        subprocess.run(
            [*command, f"--output-dir={output}", f"--seed={seed}", *flags],
            check=True,
            capture_output=True,
        )
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "before": records[0]["eval_accuracy_before"],
        "after": records[-1]["eval_accuracy"],
        "seconds": records[-1]["wall_seconds"],
        "lag_mean": statistics.mean(r["lag_mean"] for r in records),
        "lag_max": max(r["lag_max"] for r in records),
        "reverse_kl": statistics.mean(r["reverse_kl"] for r in records[-20:]),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flags", default="", help="further train.py flags for both modes")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    table = {}
    for mode, extra in (("async", []), ("sync", ["--max-staleness=0"])):
        table[mode] = [run(seed, [*args.flags.split(), *extra]) for seed in range(args.seeds)]
        for row in table[mode]:
            print(
                f"{mode:5s} seed {row['seed']}: {row['before']:.1%} -> {row['after']:.1%} "
                f"in {row['seconds']:.0f} s, "
                f"lag mean {row['lag_mean']:.2f} max {row['lag_max']}, "
                f"reverse KL at the end {row['reverse_kl']:.3f}",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(
            json.dumps({"flags": args.flags, "runs": table}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
