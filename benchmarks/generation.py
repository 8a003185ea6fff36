"""Useful tokens per second of the slot generator against `model.generate`:
`python -m benchmarks.generation`.

Same random Qwen3 model, same prompts, same long-tailed response lengths: lognormal, median 40
tokens, sigma 1, cut at --max-new-tokens. `model.generate` gets left-padded batches of as many rows
as the generator has slots and runs until the longest of a batch is done. A useful token is one of a
response, stop token included; rows that wait produce none. Both sample at temperature 1, on
`--threads` threads, in alternation; the ratio is of medians.
"""

import argparse
import json
import os
import platform
import statistics
import time

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM, StoppingCriteria, StoppingCriteriaList

from channel import Rollout
from generate import Generator
from losses import Proposal
from support.config import builtin

VOCAB, STOP_ID = 2048, 0


def build_model(attention: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    model.set_attn_implementation(attention)
    return model


class Lengths(StoppingCriteria):
    """A row is done once it has as many new tokens as it should."""

    def __init__(self, lengths: list[int], prompt: int):
        self.lengths, self.prompt = torch.tensor(lengths), prompt

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt >= self.lengths


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


def run_ours(model, prompts, slots, lengths):
    config = builtin(max_prompt_tokens=max(map(len, prompts)), max_new_tokens=max(lengths))
    generator = ScriptedGenerator(
        model=model, proposal=Proposal(), config=config, stops={STOP_ID}, vocab=VOCAB, slots=slots
    )
    generator.lengths = lengths
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
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
        stop = StoppingCriteriaList([Lengths(wanted, width)])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=max(wanted),
            stopping_criteria=stop,
        )
    return sum(lengths) / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    ours, theirs = build_model("kv_slots"), build_model("sdpa")
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(64, VOCAB, (int(n),), generator=generator).tolist()
        for n in torch.randint(4, 33, (args.prompts,), generator=generator)
    ]
    lengths = (
        (40 * torch.randn(args.prompts, generator=generator).exp())
        .long()
        .clamp(1, args.max_new_tokens)
        .tolist()
    )
    print(
        f"{ours.num_parameters():,} parameters, {args.prompts} prompts, {args.threads} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    results = []
    for slots in args.slots:
        speeds = {"ours": [], "generate": []}
        for _ in range(args.repeats):
            speeds["ours"].append(run_ours(ours, prompts, slots, lengths))
            speeds["generate"].append(run_generate(theirs, prompts, slots, lengths))
        median = {name: statistics.median(values) for name, values in speeds.items()}
        ratios = [a / b for a, b in zip(speeds["ours"], speeds["generate"])]
        row = {
            "slots": slots,
            "ours": median["ours"],
            "generate": median["generate"],
            "ratio": median["ours"] / median["generate"],
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "mean_length": statistics.mean(lengths),
            "max_length": max(lengths),
        }
        results.append(row)
        print(
            f"{slots:4d} slots: {row['ours']:7.0f} useful tokens/s, "
            f"model.generate {row['generate']:7.0f}, ratio {row['ratio']:.2f} "
            f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f}); "
            f"lengths mean {row['mean_length']:.0f}, max {row['max_length']}",
            flush=True,
        )
    if args.json:
        record = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        }
        with open(args.json, "w") as file:
            json.dump(record | {"threads": args.threads, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
