"""GSM8K as prompts for train.py: `python -m experiments.gsm8k --out runs/gsm8k`
(needs `pip install datasets` and a network).

Writes prompts.jsonl (7,473 questions) and eval.jsonl (1,319), one JSON object a line: `messages`,
and the number after "####" as `answer`. The instruction asks for the final number in \\boxed{},
which is what `judges/text.py` looks for.
"""

import argparse
import json
import sys
from pathlib import Path

INSTRUCTION = "Reason step by step, and put the final answer into \\boxed{}."


def line(question: str, solution: str) -> str:
    """A line of the file; commas are taken out of the answer."""
    answer = solution.split("####")[-1].strip().replace(",", "")
    return (
        json.dumps(
            {
                "messages": [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}],
                "answer": answer,
            },
            ensure_ascii=False,
        )
        + "\n"
    )


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.gsm8k",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    args = parser.parse_args()
    try:
        from datasets import load_dataset
    except ImportError:
        sys.exit("gsm8k: error: datasets is not installed: pip install datasets")
    args.out.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "prompts.jsonl"), ("test", "eval.jsonl")):
        rows = load_dataset("openai/gsm8k", "main", split=split)
        (args.out / name).write_text("".join(line(row["question"], row["answer"]) for row in rows))
        print(f"{args.out / name}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
