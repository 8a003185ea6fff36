"""Useful tokens per second of the slot generator against `model.generate`:
`python -m benchmarks.generation` and `python -m benchmarks.generation --model smollm2`.

Same model, same prompts, same response lengths, of two kinds: `tail`, lognormal with a median of 40
tokens and sigma 1, cut at --max-new-tokens; `equal`, all as long as the mean of those.
`model.generate` gets left-padded batches of as many rows as the generator has slots and runs until
the longest of a batch is done. A useful token is one of a response, stop token included; rows that
wait produce none. Both sample at temperature 1, on `--threads` threads, in alternation; the ratio
is of medians.

Then one decode step with the default loss is compared with its matrix products alone, in
alternation: what is above 1 is attention, norms, sampling and Python.

Models: `toy`, a random Qwen3 of 5M parameters; `smollm2`, the student of experiments/heal.py, which
says what to install.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers import StoppingCriteria, StoppingCriteriaList

from channel import Rollout
from experiments.heal import prepare
from generate import Generator
from losses import Proposal, make_loss
from support.config import builtin
from support.load import load_model

STOP_ID = 0


def toy() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def build_models(name: str):
    """The same model twice: with slots, and as transformers has it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "student"
        toy().save_pretrained(path) if name == "toy" else prepare(Path(directory))
        return load_models(str(path), torch.device("cpu"), torch.float32)


def load_models(path: str, device, dtype):
    models = [load_model(path, dtype, device) for _ in "12"]
    for model, attention in zip(models, ("kv_slots", "sdpa")):
        model.set_attn_implementation(attention)
        model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
        model.generation_config.pad_token_id = 0
    return models


class Lengths(StoppingCriteria):
    """A row is done once it has as many new tokens as it should."""

    def __init__(self, lengths: list[int], prompt: int):
        self.lengths, self.prompt = lengths, prompt

    def __call__(self, input_ids, scores, **kwargs):
        count = input_ids.shape[1] - self.prompt
        return torch.tensor([count >= length for length in self.lengths], device=input_ids.device)


class ScriptedGenerator(Generator):
    """Draws the stop token where `lengths` says and nowhere else, by its random numbers:
    id 0 has the lowest of them."""

    lengths: list[int]

    def add(self, rollouts):
        first = len(self.active)
        super().add(rollouts)
        for slot, rollout in enumerate(rollouts, first):
            self.uniforms[slot] = 0.5 + 0.5 * self.uniforms[slot]
            self.uniforms[slot, self.lengths[rollout.ticket] - 1] = 0.0


def run_ours(model, prompts, slots, lengths, times=1):
    """Tokens/s of the last of `times` runs of one generator."""
    config = builtin(max_prompt_tokens=max(map(len, prompts)), max_new_tokens=max(lengths))
    generator = ScriptedGenerator(
        model, Proposal(), config, {STOP_ID}, vocab=model.config.vocab_size, slots=slots
    )
    generator.lengths = lengths
    for _ in range(times):
        started = time.perf_counter()
        rollouts = generator.generate([Rollout(ids, ticket=i) for i, ids in enumerate(prompts)])
        seconds = time.perf_counter() - started
    assert [len(rollout.weight_version) for rollout in rollouts] == lengths
    return sum(lengths) / seconds


def run_generate(model, prompts, slots, lengths):
    started = time.perf_counter()
    for i in range(0, len(prompts), slots):
        batch, wanted = prompts[i : i + slots], lengths[i : i + slots]
        width = max(map(len, batch))
        device = model.device
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=device)
        stop = StoppingCriteriaList([Lengths(wanted, width)])
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in batch]
        model.generate(
            ids,
            attention_mask=torch.tensor(mask, device=device),
            do_sample=True,
            top_k=0,
            max_new_tokens=max(wanted),
            stopping_criteria=stop,
        )
    return sum(lengths) / (time.perf_counter() - started)


def step_over_products(model, slots: int, repeats: int, length: int = 64):
    """(milliseconds of a decode step of `slots` full slots, of its matrix products alone)."""
    config = builtin(max_prompt_tokens=length, max_new_tokens=length)
    generator = Generator(model, make_loss(config), config, set(), model.config.vocab_size, slots)
    generator.add([Rollout(list(range(1, length + 1)), ticket=i) for i in range(slots)])
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head] + [head]
    inputs = [torch.randn(slots, module.in_features) for module in linear]

    @torch.no_grad()
    def products():
        for module, x in zip(linear, inputs):
            module(x)

    def milliseconds(function):
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)

    pairs = [(milliseconds(generator.step), milliseconds(products)) for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*pairs[2:])]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["toy", "smollm2"], default="toy")
    parser.add_argument("--lengths", nargs="+", default=["tail", "equal"])
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    ours, theirs = build_models(args.model)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(64, ours.config.vocab_size, (int(n),), generator=generator).tolist()
        for n in torch.randint(4, 33, (args.prompts,), generator=generator)
    ]
    tail = (40 * torch.randn(args.prompts, generator=generator).exp()).long()
    tail = tail.clamp(1, args.max_new_tokens).tolist()
    mixes = {"tail": tail, "equal": [round(statistics.mean(tail))] * args.prompts}
    print(
        f"{args.model}: {ours.num_parameters():,} parameters, {args.prompts} prompts, "
        f"{args.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    results = []
    for slots in args.slots:
        for mix in args.lengths:
            results.append(compare(ours, theirs, prompts, slots, mix, mixes[mix], args.repeats))
        step, products = step_over_products(ours, slots, 12)
        results.append({"slots": slots, "step_ms": step, "products_ms": products})
        print(
            f"{slots:4d} slots: a decode step takes {step:.1f} ms, its products {products:.1f} ms: "
            f"{step / products:.2f}x",
            flush=True,
        )
    if args.json:
        record = {
            "model": args.model,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        }
        with open(args.json, "w") as file:
            json.dump(record | {"threads": args.threads, "results": results}, file, indent=1)


def compare(ours, theirs, prompts, slots, mix, lengths, repeats):
    """Both generators in alternation; prints and returns a row of figures."""
    speeds = {"ours": [], "generate": []}
    for _ in range(repeats):
        speeds["ours"].append(run_ours(ours, prompts, slots, lengths))
        speeds["generate"].append(run_generate(theirs, prompts, slots, lengths))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["generate"])]
    row = {
        "slots": slots,
        "lengths": mix,
        "ours": median["ours"],
        "generate": median["generate"],
        "ratio": median["ours"] / median["generate"],
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "mean_length": statistics.mean(lengths),
        "max_length": max(lengths),
    }
    print(
        f"{slots:4d} slots, {mix}: {row['ours']:7.0f} useful tokens/s, "
        f"model.generate {row['generate']:7.0f}, ratio {row['ratio']:.2f} "
        f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f}); "
        f"lengths mean {row['mean_length']:.0f}, max {row['max_length']}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
