"""Train the built-in student in one process and add its curve to a picture.

    python experiment.py "lag 0" --loss sampled_reverse_kl --num-samples 32 --lr 3e-4
    python experiment.py "lag 8" --loss sampled_reverse_kl --num-samples 32 --lr 3e-4 \\
        --max-staleness 8

The label comes first, then options of serial.py. Without --max-staleness the lag is 0 here, and a
run has 100 updates. The curves are kept in curves.csv: delete it to begin again. The picture,
curves.png, needs matplotlib: .venv/bin/python -m pip install matplotlib.
"""

import csv
import sys
from pathlib import Path

import torch

from serial import Serial
from support.config import InputError, parse
from support.data import load_prompts
from support.load import load_tokenizer

HERE = Path(__file__).resolve().parent
CURVES = HERE / "curves.csv"
COLUMNS = ("label", "update", "reverse_kl", "accuracy")
EVERY = 10  # updates between two lines of output


def train(label: str, flags: list[str]):
    """Lines of curves.csv of one run."""
    config = parse(["--steps", "100", "--max-staleness", "0", *flags])
    torch.set_num_threads(config.cpu_threads or torch.get_num_threads())
    prompts, held_out = load_prompts(config, load_tokenizer("--student", config.path("student")))
    run = Serial(config, config.max_staleness, prompts, held_out)
    lines = []
    for update in range(1, config.steps + 1):
        reverse_kl = run.update()["reverse_kl"]
        is_last = update == config.steps
        accuracy = run.accuracy() if is_last and held_out else ""
        lines.append((label, update, reverse_kl, accuracy))
        if update % EVERY == 0 or is_last:
            print(f"update {update:4d}/{config.steps}  reverse KL {reverse_kl:.4f}")
    if accuracy != "":
        print(f"accuracy after training {accuracy:.1%}")
    return lines


def draw():
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    curves = {}
    for line in csv.DictReader(open(CURVES)):
        curves.setdefault(line["label"], []).append(float(line["reverse_kl"]))
    figure, axes = plt.subplots(figsize=(7, 4))
    for label, values in curves.items():
        smooth = [sum(values[max(0, i - 4) : i + 1]) / min(5, i + 1) for i in range(len(values))]
        axes.plot(range(1, len(smooth) + 1), smooth, label=label)
    axes.set(xlabel="update", ylabel="reverse KL, nats a token (mean of 5)", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(HERE / "curves.png", dpi=150, bbox_inches="tight")
    print("curves.png")


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    try:
        lines = train(sys.argv[1], sys.argv[2:])
    except (InputError, NotImplementedError) as error:
        blanks = [one for one in (error, error.__cause__) if isinstance(one, NotImplementedError)]
        said = f"not written yet: {blanks[0]}" if blanks else error
        sys.exit(f"experiment.py: error: {said}")
    is_new = not CURVES.exists()
    with open(CURVES, "a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([COLUMNS] * is_new + lines)
    draw()


if __name__ == "__main__":
    main()
