"""The README's first picture: what a student says before and after: `python -m experiments.says`

It draws experiments/results/says.jsonl, which these commands made. The prompts are the first eight
of those that training has not seen.

    python -m experiments.heal --only-models
    python train.py ...                         (the first command line of docs/recipes.md)
    python -m experiments.sample --json --temperature 0 --max-new-tokens 40 --first 8 \\
        --prompts runs/heal/held_out.jsonl --model runs/heal/student runs/heal/short/step_40
"""

import argparse
import json
import textwrap
from html import escape
from itertools import groupby
from pathlib import Path

from experiments.study import RESULTS, ROOT

HEADS = (
    "SmolLM2-135M without six of its 30 layers",
    "after 40 updates, seven minutes on two busy cores",
)
WIDTH, LETTERS, LINE = 980, 56, 19  # of a column: letters
LEFT = (20, 500)
STYLE = """text { font: 14px ui-sans-serif, system-ui, sans-serif; fill: #1d1d1f; }
.head { font-weight: 600; } .question { font-style: italic; fill: #6b6b70; }
.before { fill: #b04a00; } .after { fill: #00699e; } line { stroke: #d0d0d6; }
@media (prefers-color-scheme: dark) { text { fill: #ececf0; } .question { fill: #9a9aa2; }
.before { fill: #f09050; } .after { fill: #5fb4ea; } line { stroke: #3a3a40; } }"""


def text(x: int, y: int, words: str, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def svg(samples: list[dict]) -> str:
    """Objects of experiments.sample: of each prompt two that follow each other."""
    parts = [text(x, 24, head, "head") for x, head in zip(LEFT, HEADS)]
    y = 36
    for question, pair in groupby(samples, key=lambda sample: sample["question"]):
        parts.append(f'<line x1="20" x2="{WIDTH - 20}" y1="{y}" y2="{y}"/>')
        parts.append(text(LEFT[0], y + LINE + 2, question, "question"))
        heights = []
        for x, kind, sample in zip(LEFT, ("before", "after"), pair):
            cut = " ..." if sample["finish"] == "length" else ""
            lines = textwrap.wrap(" ".join(sample["response"].split()) + cut, LETTERS)
            heights.append(len(lines))
            for i, line in enumerate(lines):
                parts.append(text(x, y + (i + 2) * LINE + 4, line, kind))
        y += (max(heights) + 1) * LINE + 18
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def main():
    parser = argparse.ArgumentParser("python -m experiments.says", description=__doc__)
    parser.add_argument("--samples", type=Path, default=RESULTS / "says.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "says.svg")
    args = parser.parse_args()
    args.out.write_text(svg([json.loads(line) for line in args.samples.open()]))


if __name__ == "__main__":
    main()
