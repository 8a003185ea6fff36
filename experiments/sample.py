"""What models say: `python -m experiments.sample --model DIR [DIR ...] --prompts FILE.jsonl`.

Prints every prompt with the response of each model below it and, where there are answers, right or
wrong and the accuracy. `--json` prints an object per prompt and model, for programs, and the
accuracy on stderr.
"""

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path

import torch

from channel import STOP, Rollout, available_memory
from experiments.memory import needed
from generate import Generator
from kv_cache import switch_to_slots
from losses import Greedy, Proposal
from model import compute_dtype, head_weight
from support.config import builtin, judge, refusal, require
from support.data import read_jsonl
from support.load import check_config, load_model, load_tokenizer, stop_ids, text_config


def parse_args():
    parser = argparse.ArgumentParser(
        "python -m experiments.sample",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--model", nargs="+", required=True, help="directories or hub ids; builtin: the student")
    option("--prompts", default="builtin", help="JSONL, as for train.py; builtin: running sums")
    option("--first", type=int, help="how many prompts; 0: all; default 10, with --json all")
    option("--json", action="store_true", help="an object per prompt and model")
    option("--temperature", type=float, default=1.0, help="softmax temperature; 0: greedy")
    option("--max-prompt-tokens", type=int, default=2048, help="longest prompt, tokens")
    option("--drop-long-prompts", action="store_true", help="leave longer prompts out")
    option("--max-new-tokens", type=int, help="longest response, tokens; default 256 or what fits")
    option("--slots", type=int, default=64, help="sequences decoded at once")
    option("--seed", type=int, default=0, help="seed of sampling")
    option("--stop-token", action="append", default=[], help="one more that ends a response")
    option("--answers", default="text", help="judge of answers, as for train.py")
    args = parser.parse_args()
    new_tokens = 1 if args.max_new_tokens is None else args.max_new_tokens
    if min(args.max_prompt_tokens, new_tokens, args.slots) < 1:
        parser.error("--max-prompt-tokens, --max-new-tokens and --slots are at least 1")
    if args.first is None:
        args.first = 0 if args.json else 10
    if args.first < 0:
        parser.error("--first is at least 0")
    if not 0 <= args.temperature < float("inf") or not 0 <= args.seed < 2**32:
        parser.error("--temperature and --seed are at least 0 and finite")
    if 0 < args.temperature < 0.001:
        parser.error("--temperature is 0 (greedy) or at least 0.001")
    return args


def sample(args, model):
    """{place in the file: (prompt, finished rollout, response text)}, in order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = builtin(student=model).path("student")
    tokenizer = load_tokenizer("--model", path)
    file = builtin().path("eval_prompts") if args.prompts == "builtin" else args.prompts
    prompts = read_jsonl(file, tokenizer, args.max_prompt_tokens, drop_long=args.drop_long_prompts)
    prompts = prompts[: args.first or len(prompts)]
    longest = max(len(prompt.ids) for prompt in prompts)
    positions = getattr(text_config(path), "max_position_embeddings", None) or longest + 256
    max_new_tokens = args.max_new_tokens or max(1, min(256, positions - longest))
    config = builtin(
        student=path,
        teacher=path,
        slots=args.slots,
        batch_size=min(len(prompts), 8192),
        max_prompt_tokens=longest,
        max_new_tokens=max_new_tokens,
        micro_batch_tokens=max(8192, longest + max_new_tokens),
        temperature=args.temperature or 1.0,
        seed=args.seed,
    )
    dtype = compute_dtype(config, device)
    check_memory(config, device, dtype)
    check_config(config)
    model = load_model(path, dtype, device, length=config.max_sequence)
    switch_to_slots(model, config.max_sequence)
    proposal = Proposal() if args.temperature > 0 else Greedy()
    stops = stop_ids(path, tokenizer, args.stop_token)
    vocab = len(head_weight(model))
    slots = min(args.slots, len(prompts))
    generator = Generator(model, proposal, config, stops, vocab, slots)
    rollouts = [Rollout(prompt.ids, ticket) for ticket, prompt in enumerate(prompts)]
    generator.generate(rollouts)
    texts = [tokenizer.decode(x.response_ids, skip_special_tokens=True) for x in rollouts]
    return {x.source[0]: (x, *of_prompt) for x, *of_prompt in zip(prompts, rollouts, texts)}


def check_memory(config, device, dtype):
    """Raise InputError if model and KV slots cannot fit."""
    with refusal(f"{config.student}: its size cannot be estimated"):
        size = needed(config, 1, dtype.itemsize)["generator"]
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
    require(
        size < 0.9 * free,
        f"{size / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free: lower --slots "
        f"({config.slots}) or --max-new-tokens ({config.max_new_tokens})",
    )


def result_of(model, prompt, rollout, response, is_correct):
    """One response as an object."""
    result = {
        "model": model,
        "prompt": prompt.text,
        "question": question(prompt),
        "response": response,
        "tokens": len(rollout.response_ids),
        "finish": "stop" if rollout.finish == STOP else "length",
    }
    if prompt.answer is not None:
        result |= {"answer": prompt.answer, "correct": is_correct(response, prompt.answer)}
    return result


def question(prompt) -> str:
    """What the user says last, or the text."""
    _, row = prompt.source
    return row["messages"][-1]["content"] if "messages" in row else row["prompt"]


def show(prompt, results, names):
    """The prompt, and below it what every model says to it."""
    answer = f"   (answer: {prompt.answer})" if prompt.answer is not None else ""
    print(f"{question(prompt)}{answer}")
    indent = 4 + max(map(len, names))
    width = max(40, min(shutil.get_terminal_size().columns, 110)) - indent
    for name, result in zip(names, results):
        verdict = {True: "  [right]", False: "  [wrong]"}.get(result.get("correct"), "")
        cut = " ..." if result["finish"] == "length" else ""
        text = f"{result['response']}{cut}{verdict}"
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width)] or [""]
        print(f"  {name:{indent - 2}}" + f"\n{' ' * indent}".join(lines))
    print(flush=True)


def main():
    args = parse_args()
    names = [Path(model).name for model in args.model]
    names = names if len(set(names)) == len(names) else args.model
    try:
        is_correct = judge(builtin(answers=args.answers))
        found = [sample(args, model) for model in args.model]
    except ValueError as error:
        sys.exit(f"experiments.sample: {error}")
    right = {name: [] for name in names}
    for place in [place for place in found[0] if all(place in answers for answers in found)]:
        responses = [answers[place] for answers in found]
        results = [result_of(*x, is_correct) for x in zip(args.model, *zip(*responses))]
        for name, result in zip(names, results):
            if "correct" in result:
                right[name].append(result["correct"])
        if args.json:
            print("\n".join(json.dumps(result, ensure_ascii=False) for result in results))
        else:
            show(responses[0][0], results, names)
    for name, verdicts in right.items():
        if verdicts:
            share = f"{sum(verdicts)} of {len(verdicts)} ({sum(verdicts) / len(verdicts):.1%})"
            print(f"{name}: {share} answers correct", file=sys.stderr)


if __name__ == "__main__":
    main()
