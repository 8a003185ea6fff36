"""Generation: KV slots, continuous batching, candidates for the loss, weight pickup between decode steps.

    S  slots     n  active slots     T  longest sequence     M  longest response     r  index in the response
    C  candidates at a position      V  vocabulary

`Generator` works in one process: `add` prompts, `step` until they come back finished. `run` is the process
around it; `python generate.py --model DIR --prompts FILE` samples from a checkpoint on its own.

Slots are refilled while others decode (an eighth of them at a time), so no rollout waits for the longest. Active
slots are kept at the front, [0, n), by moving the last into the hole: a step costs what n costs. Prefill only writes the cache:
the decode step takes the last prompt token as its first input, so every token is sampled by the same code.
A rollout's random numbers are fixed by (seed, ticket) when it starts: they do not depend on its neighbours,
a resumed run draws with the same, and a decode step is a pure function that a CUDA graph can hold.

Tokens are drawn from softmax(logits / temperature) over the full vocabulary. Left out: top-p and top-k filters
(they make importance weights wrong), paged KV blocks, prefix sharing, speculative decoding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attention import Decode, KVCache, Prefill
from channel import LENGTH, STOP, Channel, may_start
from config import Config
from data import Prompt, is_correct, read_jsonl
from kernels.head import head_logits
from log import Timeline
from model import compute_dtype, flatten_parameters, head_weight, last_hidden, load_model, load_tokenizer, shared_vocabulary, stop_ids

# ---- drawing candidates -------------------------------------------------------------------------------


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Ids drawn by inverting the cumulative sum: probs [n,V] (any sum), uniforms float64 [n,k] -> int64 [n,k].

    In float32 the sum over 150,000 ids ends at 0.9999998 and the tail is distorted; in float64 the error is 1e-16.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return ids.clamp_(max=probs.shape[1] - 1)


def propose(logits: Tensor, uniforms: Tensor, loss: str, top_k: int) -> tuple[Tensor, Tensor]:
    """Candidates for one position of every slot, emitted token first: logits float32 [n,V] -> ids [n,C], logp [n,C].

    `logits` are already divided by the temperature. Columns are those of losses.candidate_columns; the tail's
    log-probabilities are those of the sampler restricted to the tail. "greedy" gives the argmax alone.
    """
    logp = logits.log_softmax(-1)
    if loss == "greedy":
        ids = logits.argmax(-1, keepdim=True)
        return ids, logp.gather(1, ids)
    emitted = draw(logp.exp(), uniforms[:, :1] if loss == "stratified_reverse_kl" else uniforms)
    if loss in ("sampled_reverse_kl", "forward_kl"):  # the draws are all, or the teacher adds its own
        return emitted, logp.gather(1, emitted)
    top = logp.topk(top_k, dim=-1).indices
    ids = torch.cat([emitted, top], 1)
    if loss != "stratified_reverse_kl":
        return ids, logp.gather(1, ids)
    tail_logp = logits.scatter(1, top, float("-inf")).log_softmax(-1)
    tail = draw(tail_logp.exp(), uniforms[:, 1:])
    return torch.cat([ids, tail], 1), torch.cat([logp.gather(1, ids), tail_logp.gather(1, tail)], 1)


def draws_per_position(loss: str, num_samples: int) -> int:
    return {"sampled_reverse_kl": num_samples, "stratified_reverse_kl": 1 + num_samples}.get(loss, 1)


# ---- the generator ------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One prompt on its way through a slot; the fields after `row` are filled in as it goes."""

    prompt_ids: list[int]
    ticket: int = 0
    row: int = 0
    finish: int = 0  # STOP or LENGTH
    weight_version: list[int] = field(default_factory=list)  # that sampled each response token
    candidate_ids: Tensor | None = None  # int64 [n,C], column 0 the response
    behavior_logp: Tensor | None = None  # float32 [n,C]

    @property
    def response_ids(self) -> list[int]:
        return self.candidate_ids[:, 0].tolist()


class Generator:
    """Continuous batching over `slots` KV slots of `model` (loaded with attention "kv_slots")."""

    def __init__(
        self, model, stops: set[int], *, slots: int, max_prompt: int, max_new: int, loss: str = "greedy", top_k: int = 0,
        num_samples: int = 1, temperature: float = 1.0, vocab: int | None = None, seed: int = 0, prefill_tokens: int = 8192,
    ):  # fmt: skip
        self.model, self.stops, self.slots, self.max_new, self.seed = model, stops, slots, max_new, seed
        self.loss, self.top_k, self.scale, self.prefill_tokens = loss, top_k, 1.0 / temperature, prefill_tokens
        self.device, self.vocab, self.version = model.device, vocab or head_weight(model).shape[0], 0
        draws = draws_per_position(loss, num_samples)
        columns = draws if loss in ("sampled_reverse_kl", "forward_kl", "greedy") else draws + top_k
        self.cache, self.refill = KVCache(slots, max_prompt + max_new), max(1, slots // 8)
        self.active: list[Rollout] = []  # slot i holds active[i]
        i64, dev = torch.int64, self.device
        self.last_token = torch.zeros(slots, dtype=i64, device=dev)
        self.position = torch.zeros(slots, dtype=i64, device=dev)  # where last_token goes
        self.index = torch.zeros(slots, dtype=i64, device=dev)  # r of the token to be drawn
        self.uniforms = torch.zeros(slots, max_new, draws, dtype=torch.float64, device=dev)
        self.candidate_ids = torch.zeros(slots, max_new, columns, dtype=i64, device=dev)
        self.behavior_logp = torch.zeros(slots, max_new, columns, device=dev)
        self.per_slot = (self.last_token, self.position, self.index, self.uniforms, self.candidate_ids, self.behavior_logp)
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    @property
    def room(self) -> int:
        """How many rollouts to start now. A prefill costs about a decode step, so an eighth of the slots is refilled at once."""
        free = self.slots - len(self.active)
        return free if not self.active or free >= self.refill else 0

    @torch.no_grad()
    def add(self, rollouts: list[Rollout]):
        """Start rollouts in free slots: random numbers, prefill of all but the last prompt token."""
        for rollout in rollouts:
            slot = len(self.active)
            self.active.append(rollout)
            if self.loss != "greedy":
                noise = np.random.default_rng([self.seed, rollout.ticket]).random(self.uniforms.shape[1:])
                self.uniforms[slot] = torch.from_numpy(noise)
            self.last_token[slot] = rollout.prompt_ids[-1]
            self.position[slot] = len(rollout.prompt_ids) - 1
            self.index[slot] = 0
        first = len(self.active) - len(rollouts)
        waiting = sorted((len(r.prompt_ids) - 1, first + i) for i, r in enumerate(rollouts) if len(r.prompt_ids) > 1)
        while waiting:  # longest first, as many as fit the token budget at that width
            width = waiting[-1][0]
            count = max(1, self.prefill_tokens // width)
            group, waiting = [slot for _, slot in waiting[-count:]], waiting[:-count]
            ids = torch.zeros(len(group), width, dtype=torch.int64)
            for i, slot in enumerate(group):
                prompt = self.active[slot].prompt_ids[:-1]
                ids[i, : len(prompt)] = torch.tensor(prompt)
            last_hidden(self.model, ids.to(self.device), slot_step=Prefill(self.cache, torch.tensor(group, device=self.device)))

    @torch.no_grad()
    def step(self) -> list[Rollout]:
        """One token for every active slot; returns the rollouts that it finished."""
        n = len(self.active)
        if n == 0:
            return []
        length = max(len(r.prompt_ids) + len(r.weight_version) for r in self.active)
        if self.device.type == "cuda":
            self._replay(n, length)
        else:
            self._decode(n, length)
        finished = []
        tokens = self.last_token[:n].tolist()
        for slot in reversed(range(n)):  # from the back: what moves into a hole has had its turn
            rollout = self.active[slot]
            rollout.weight_version.append(self.version)
            if tokens[slot] in self.stops or len(rollout.weight_version) == self.max_new:
                rollout.finish = STOP if tokens[slot] in self.stops else LENGTH
                self._release(slot)
                finished.append(rollout)
        return finished

    def _decode(self, n: int, length: int):
        """The step on the device: no synchronisation, all shapes from (n, length)."""
        slots, index, position = torch.arange(n, device=self.device), self.index[:n], self.position[:n]
        attention = Decode(self.cache, position, length)
        hidden = last_hidden(self.model, self.last_token[:n, None], position_ids=position[:, None], slot_step=attention)[:, 0]
        logits = head_logits(hidden, head_weight(self.model)[: self.vocab], self.scale)
        ids, logp = propose(logits, self.uniforms[slots, index], self.loss, self.top_k)
        self.candidate_ids[slots, index] = ids
        self.behavior_logp[slots, index] = logp
        self.last_token[:n] = ids[:, 0]
        position.add_(1).clamp_(max=self.cache.max_len - 1)  # idle slots of a padded graph must stay in range
        index.add_(1).clamp_(max=self.max_new - 1)

    def _replay(self, n: int, length: int):
        """`_decode` as a CUDA graph, one per (slots rounded up to a power of two, length to a multiple of 256)."""
        n = min(self.slots, 1 << (n - 1).bit_length())
        length = min(self.cache.max_len, -(-length // 256) * 256)
        if (n, length) not in self.graphs:
            state = [t.clone() for t in self.per_slot[:3]]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set up, cache allocated; what it wrote is written again below
                self._decode(n, length)
            torch.cuda.current_stream().wait_stream(stream)
            for tensor, saved in zip(self.per_slot, state):
                tensor.copy_(saved)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self._decode(n, length)
            self.graphs[n, length] = graph
        self.graphs[n, length].replay()

    def _release(self, slot: int):
        """Copy the rollout out and move the last active slot into its place."""
        rollout, last = self.active[slot], len(self.active) - 1
        count = len(rollout.weight_version)
        rollout.candidate_ids = self.candidate_ids[slot, :count].to("cpu", copy=True)
        rollout.behavior_logp = self.behavior_logp[slot, :count].to("cpu", copy=True)
        moved = self.active.pop()
        if slot != last:
            self.active[slot] = moved
            for tensor in self.per_slot:
                tensor[slot] = tensor[last]
            self.cache.move(last, slot, len(moved.prompt_ids) + len(moved.weight_version))
        self.position[last] = self.index[last] = 0

    def generate(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Finish all `rollouts`, refilling slots as they fall free; returns them in the order given."""
        waiting = deque(rollouts)
        while waiting or self.active:
            self.add([waiting.popleft() for _ in range(min(self.room, len(waiting)))])
            self.step()
        return rollouts


# ---- the process --------------------------------------------------------------------------------------


def write_rollout(channel: Channel, rollout: Rollout):
    """Fill in the generator's columns of the rollout's row."""
    row, count, start = rollout.row, len(rollout.weight_version), len(rollout.prompt_ids)
    columns = rollout.candidate_ids.shape[1]
    channel.tokens[row, start : start + count] = rollout.candidate_ids[:, 0]
    channel.length[row] = start + count
    channel.finish[row] = rollout.finish
    channel.weight_version[row, :count] = torch.tensor(rollout.weight_version, dtype=torch.int32)
    channel.candidate_ids[row, :count, :columns] = rollout.candidate_ids  # for forward_kl column 0; the teacher adds its own
    channel.behavior_logp[row, :count, :columns] = rollout.behavior_logp


def new_generator(config: Config, model, stops: set[int], vocab: int, loss: str, at_most: int) -> Generator:
    return Generator(
        model, stops, slots=min(config.slots, at_most), max_prompt=config.max_prompt_tokens, max_new=config.max_new_tokens, loss=loss,
        top_k=config.top_k, num_samples=config.num_samples, temperature=config.temperature, vocab=vocab, seed=config.seed,
        prefill_tokens=config.micro_batch_tokens,
    )  # fmt: skip


def evaluate(greedy: Generator, prompts, tokenizer) -> float:
    """Fraction of `prompts` that a greedy generator answers correctly with its model's present weights."""
    rollouts = greedy.generate([Rollout(prompt.ids) for prompt in prompts])
    texts = [tokenizer.decode(rollout.response_ids, skip_special_tokens=True) for rollout in rollouts]
    return sum(is_correct(text, prompt.answer) for text, prompt in zip(texts, prompts)) / len(prompts)


def run(config: Config, channel: Channel, index: int, device: torch.device, held: list[Prompt], trace: Path):
    """A generation process, until rank 0 says stop or is gone. Generator 0 evaluates on the prompts `held`.

    1. take rows (tickets) for the free slots          4. start the tickets that the inequality admits
    2. pick up new weights, if refresh allows it now   5. decode one token for every active slot
    3. evaluate, if rank 0 waits for it (generator 0)  6. write finished rollouts to their rows, pass them on
    """
    tokenizer, stops, vocab, _ = shared_vocabulary(config)
    model = load_model(config.student_path, compute_dtype(config, device), device, attention="kv_slots")
    flat = flatten_parameters(model)
    share = -(-config.table_rows // config.generators)  # of the rollouts in flight: no generator takes its neighbour's
    generator = new_generator(config, model, stops, vocab, config.loss, share)
    greedy = new_generator(config, model, stops, vocab, "greedy", max(1, len(held)))
    timeline = Timeline(channel.busy[index : index + 1], trace, index, f"generator {index}")
    generator.version = -1
    pending: deque[int] = deque()
    while channel.running():
        idle = not generator.active and not pending
        while len(pending) < generator.room and (row := channel.to_generator.get(0.02 if idle else 0.0)) is not None:
            pending.append(row)
            idle = False
        if int(channel.version) > generator.version and (config.refresh == "in_flight" or not generator.active):
            with timeline.span("pick up weights"):
                generator.version = channel.pick_up(flat)
        if index == 0 and int(channel.eval_done) < int(channel.eval_due) <= generator.version + 1:
            with timeline.span("evaluate"):
                channel.eval_accuracy.fill_(evaluate(greedy, held, tokenizer))
                channel.eval_done.copy_(channel.eval_due)
        batch = []
        while pending and may_start(int(channel.ticket[pending[0]]), generator.version, config):
            row = pending.popleft()
            prompt = channel.tokens[row, : channel.prompt_len[row]].tolist()
            batch.append(Rollout(prompt, int(channel.ticket[row]), row))
        if batch:
            with timeline.span("prefill"):
                generator.add(batch)
        if generator.active:
            with timeline.span("decode"):
                for rollout in generator.step():
                    write_rollout(channel, rollout)
                    channel.to_teacher.put([rollout.row])
        else:
            timeline.flush()
    timeline.flush()


def main():
    about = "Sample from a checkpoint; one JSON object per prompt on stdout, accuracy where there are answers on stderr."
    parser = argparse.ArgumentParser("generate.py", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory or hub id; builtin: the shipped student")
    parser.add_argument("--prompts", required=True, help="JSONL: `prompt` text or `messages` list, optional `answer`")
    parser.add_argument("--temperature", type=float, default=1.0, help="softmax temperature; 0: greedy")
    parser.add_argument("--max-prompt-tokens", type=int, default=2048, help="longest prompt, tokens")
    parser.add_argument("--drop-long-prompts", action="store_true", help="leave out prompts above --max-prompt-tokens")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest response, tokens")
    parser.add_argument("--slots", type=int, default=64, help="sequences decoded at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    args = parser.parse_args()
    least = min(args.max_prompt_tokens, args.max_new_tokens, args.slots)
    if least < 1 or not 0 <= args.temperature < float("inf") or not 0 <= args.seed < 2**32:
        parser.error("--max-prompt-tokens, --max-new-tokens and --slots are at least 1, --temperature and --seed at least 0 and finite")
    device, path = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Config(student=args.model).student_path
    try:
        tokenizer = load_tokenizer("--model", path)
        prompts = read_jsonl(args.prompts, tokenizer, args.max_prompt_tokens, args.drop_long_prompts)
        stops = stop_ids(path, tokenizer)
        model = load_model(path, torch.bfloat16 if device.type == "cuda" else torch.float32, device, attention="kv_slots")
    except ValueError as error:
        sys.exit(f"generate.py: {error}")
    sampling = {"loss": "sampled_reverse_kl", "temperature": args.temperature} if args.temperature > 0 else {}
    longest = max(len(prompt.ids) for prompt in prompts)
    generator = Generator(model, stops, slots=args.slots, max_prompt=longest, max_new=args.max_new_tokens, seed=args.seed, **sampling)
    rollouts, correct = [Rollout(prompt.ids, ticket=i) for i, prompt in enumerate(prompts)], []
    for prompt, rollout in zip(prompts, generator.generate(rollouts)):
        response = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        result = {"prompt": prompt.text, "response": response, "tokens": len(rollout.response_ids)}
        result["finish"] = "stop" if rollout.finish == STOP else "length"
        if prompt.answer is not None:
            correct.append(is_correct(response, prompt.answer))
            result |= {"answer": prompt.answer, "correct": correct[-1]}
        print(json.dumps(result, ensure_ascii=False))
    if correct:
        print(f"{sum(correct)} of {len(correct)} answers correct ({sum(correct) / len(correct):.1%})", file=sys.stderr)


if __name__ == "__main__":
    main()
