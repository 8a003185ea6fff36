"""Generation: KV slots, continuous batching, candidates, weight pickup between decode steps.

Letters of shapes: serial.py. The slots [0, A) are active; r counts the tokens of a response.

`Generator` works in one process: `add` prompts, `step` until they come back finished. `run` is the
process around it. `python -m experiments.sample --model DIR --prompts FILE` samples from a
checkpoint.

Free slots are refilled while others decode, an eighth of them at a time, so no rollout waits for
the longest. Active slots stay at the front, because the last moves into a hole: a step costs what A
costs. Prefill only writes the cache. The decode step takes the last prompt token as its first
input, so the same code samples every token.

New weights are picked up between two decode steps, amid responses, and the keys and values of older
weights stay (PipelineRL, arXiv 2509.19128).

Seed and ticket alone fix a rollout's random numbers. They are made when it starts, so a decode step
draws none itself and a CUDA graph can hold it. A resumed run draws with the same numbers.

Tokens are drawn from softmax(logits / temperature) over the full vocabulary. Left out: top-p and
top-k filters (they make importance weights wrong), paged KV blocks, prefix sharing, speculative
decoding.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from channel import LENGTH, STOP, Channel, Rollout, read_rollout, write_rollout
from kernels.head import head_logits
from kv_cache import Decode, KVCache, Prefill, switch_to_slots
from losses import Greedy, Proposal, make_loss
from model import compute_dtype, flatten_parameters, head_weight, last_hidden
from support.config import Config, judge
from support.load import head_factor, load_model, load_tokenizer, shared_vocabulary, stop_ids
from support.log import Timeline, write_samples
from tickets import may_start

JUDGED = {None: -1, False: 0, True: 1}  # verdicts in shared memory; None: there is no answer


@dataclass
class Generator:
    """Continuous batching over S slots of `model`, which has the attention "kv_slots"."""

    model: nn.Module
    proposal: Proposal  # a Loss, Greedy(), or Proposal() for plain sampling
    config: Config
    stops: set[int]
    vocab: int
    slots: int
    version: int = 0  # of the weights in `model`

    def __post_init__(self):
        self.device = self.model.device
        longest = self.config.max_new_tokens
        columns = self.proposal.num_proposed
        self.cache = KVCache(self.slots, self.config.max_prompt_tokens + longest)
        for name, x in getattr(self.model, "slot_states", {}).items():  # see switch_to_slots
            self.cache.states[name] = x.new_zeros(self.slots, *x.shape[1:])
        self.active: list[Rollout] = []  # slot i holds active[i]
        self.graphs = {}  # slots -> CUDA graph
        self.pool = None  # the memory that the graphs share
        self.last_token = self.per_slot()  # [S]
        self.position = self.per_slot()  # [S], where last_token goes in the sequence
        self.r = self.per_slot()  # [S], of the token to be drawn
        # All that a rollout draws with, and what it has drawn: [S,M,...].
        self.uniforms = self.per_slot(longest, self.proposal.num_uniforms, kind=torch.float64)
        self.candidate_ids = self.per_slot(longest, columns)
        self.behavior_logp = self.per_slot(longest, columns, kind=torch.float32)
        self.counters = (self.last_token, self.position, self.r)  # what a step changes
        self.tables = (self.uniforms, self.candidate_ids, self.behavior_logp)

    def per_slot(self, *shape, kind=torch.int64):
        return torch.zeros(self.slots, *shape, dtype=kind, device=self.device)

    @property
    def room(self):
        """How many rollouts to start now: a prefill costs about as much as a decode step."""
        free = self.slots - len(self.active)
        enough = max(1, self.slots // 8)
        return free if not self.active or free >= enough else 0

    # ---- starting rollouts --------------------------------------------------------------------

    @torch.no_grad()
    def add(self, rollouts: list[Rollout]):
        """Start rollouts in free slots, and prefill all but their last prompt token."""
        first = len(self.active)
        self.active += rollouts
        for slot, rollout in enumerate(rollouts, first):
            random = np.random.default_rng([self.config.seed, rollout.ticket])
            self.uniforms[slot] = torch.from_numpy(random.random(self.uniforms.shape[1:]))
            self.last_token[slot] = rollout.prompt_ids[-1]
            self.position[slot] = len(rollout.prompt_ids) - 1
            self.r[slot] = 0
        for state in self.cache.states.values():
            state[first : len(self.active)] = 0  # keys and values may stay: they are masked
        waiting = [slot for slot in range(first, len(self.active)) if self.prefill_len(slot)]
        waiting.sort(key=self.prefill_len)
        while waiting:  # longest first, as many as fit the token budget at that width
            longest = self.prefill_len(waiting[-1])
            count = max(1, self.config.micro_batch_tokens // longest)
            if self.cache.states:  # a recurrent state would run on through padding
                count = min(count, [*map(self.prefill_len, waiting)].count(longest))
            self.prefill(waiting[-count:])
            del waiting[-count:]

    def prefill_len(self, slot):
        """Tokens to prefill: the last one of the prompt is the first decode step's."""
        return len(self.active[slot].prompt_ids) - 1

    def prefill(self, slots):
        """Write the keys and values of prompts in one forward pass, padded to the longest."""
        prompts = [torch.tensor(self.active[slot].prompt_ids[:-1]) for slot in slots]
        ids = pad_sequence(prompts, batch_first=True).to(self.device)  # [slots,longest]
        step = Prefill(self.cache, torch.tensor(slots, device=self.device))
        last_hidden(self.model, ids, slot_step=step, past_key_values=step)

    # ---- one token for every active slot ------------------------------------------------------

    @torch.no_grad()
    def step(self):
        """Draw one token for every active slot; return the rollouts that it finished."""
        count = self.computed_slots
        self.position[len(self.active) :] = 0  # idle slots that run along read one key
        if self.device.type == "cuda":
            self.replay(count)
        else:
            self.decode(count)
        finished = []
        tokens = self.last_token[: len(self.active)].tolist()
        for slot in reversed(range(len(tokens))):  # what moves into a hole has had its turn
            rollout = self.active[slot]
            rollout.weight_version.append(self.version)
            is_stop = tokens[slot] in self.stops
            if is_stop or len(rollout.weight_version) == self.config.max_new_tokens:
                rollout.finish = STOP if is_stop else LENGTH
                self.release(slot)
                finished.append(rollout)
        return finished

    @property
    def computed_slots(self):
        """How many slots a step computes: the active ones, and idle ones where that is faster.

        On a GPU a power of two, so that few graphs serve all steps. On a CPU matrix products of 7
        to 15 rows take up to twice as long as of 16 (MKL; docs/decisions.md).
        """
        active = len(self.active)
        if self.device.type == "cuda":
            active = 1 << (active - 1).bit_length()  # the next power of two
        elif 7 <= active < 16:
            active = 16
        return min(self.slots, active)

    def decode(self, active):
        """The step on the device: no synchronisation, and `active` fixes all shapes."""
        slots = torch.arange(active, device=self.device)  # [A]
        r = self.r[:active]  # views: adding to them below moves the slots on
        position = self.position[:active]
        step = Decode(self.cache, position)
        tokens = self.last_token[:active, None]  # [A,1]
        memory = {"slot_step": step, "past_key_values": step}
        hidden = last_hidden(self.model, tokens, position_ids=position[:, None], **memory)
        weight = head_weight(self.model)[: self.vocab]
        scale = head_factor(self.model) / self.config.temperature
        logits = head_logits(hidden[:, 0], weight, scale)  # [A,V]
        ids, logp = self.proposal.propose(logits, self.uniforms[slots, r])  # [A,C]
        self.candidate_ids[slots, r] = ids
        self.behavior_logp[slots, r] = logp
        self.last_token[:active] = ids[:, 0]
        position.add_(1)
        # In range also for idle slots, and for a capture behind a last token.
        r.add_(1).clamp_(max=self.config.max_new_tokens - 1)

    def replay(self, active):
        """`decode` as a CUDA graph. One for each number of slots serves all lengths.

        The first step of a shape runs as it is, so that libraries set themselves up. Then the
        graph is recorded, which executes nothing.
        """
        if active in self.graphs:
            self.graphs[active].replay()
            return
        self.decode(active)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool):
            self.decode(active)
        self.pool = graph.pool()
        self.graphs[active] = graph

    def release(self, slot):
        """Copy the rollout out and move the last active slot into its place."""
        rollout = self.active[slot]
        count = len(rollout.weight_version)
        rollout.candidate_ids = self.candidate_ids[slot, :count].to("cpu", copy=True)
        rollout.behavior_logp = self.behavior_logp[slot, :count].to("cpu", copy=True)
        moved = self.active.pop()
        last = len(self.active)
        if slot != last:
            self.active[slot] = moved
            for tensor in self.counters + self.tables:
                tensor[slot] = tensor[last]
            self.cache.move(last, slot, moved.length)

    def generate(self, rollouts: list[Rollout]):
        """Finish all `rollouts`, refilling slots as they fall free; returns them as given."""
        waiting = deque(rollouts)
        while waiting or self.active:
            count = min(self.room, len(waiting))
            self.add([waiting.popleft() for _ in range(count)])
            self.step()
        return rollouts


class Sampler:
    """The student of a generation process: one set of weights for training and for evaluation."""

    def __init__(self, config: Config, device, slots: int, held_out):
        """`slots`: for training, `config.slots` at most. `held_out`: evaluation prompts."""
        path = config.path("student")
        self.tokenizer = load_tokenizer("--student", path)
        self.held_out = held_out
        self.is_correct = judge(config)
        dtype = compute_dtype(config, device)
        model = load_model(path, dtype, device, length=config.max_sequence)
        switch_to_slots(model, config.max_sequence)
        self.weights = flatten_parameters(model)  # [P]
        stops = stop_ids(path, self.tokenizer, config.stop_token)
        vocab = shared_vocabulary(config)
        slots = min(config.slots, slots)
        self.generator = Generator(model, make_loss(config), config, stops, vocab, slots)
        self.greedy = Generator(model, Greedy(), config, stops, vocab, slots)
        self.greedy.cache = self.generator.cache  # they take turns

    def evaluate(self):
        """What the present weights answer to each evaluation prompt, an object of samples.jsonl.

        It takes the slots: no rollout may be active.
        """
        rollouts = [Rollout(prompt.ids, i) for i, prompt in enumerate(self.held_out)]
        responses = [rollout.response_ids for rollout in self.greedy.generate(rollouts)]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return [
            {
                "prompt": prompt.text,
                "response": text,
                "answer": prompt.answer,
                "correct": prompt.answer and bool(self.is_correct(text, prompt.answer)),
                "tokens": len(rollout.weight_version),
                "logp": float(rollout.behavior_logp.mean()),
            }
            for prompt, text, rollout in zip(self.held_out, texts, rollouts)
        ]


# ---- the process ------------------------------------------------------------------------------


def run(config: Config, channel: Channel, device, number: int, held_out):
    """Generation process `number`, until the leader says stop or is gone.

    1. take rows for the free slots   2. pick up new weights, if `refresh` allows it now
    3. if an evaluation was asked for, finish what is active, then evaluate its share of prompts
    4. start the tickets that the inequality admits   5. decode one token for every active slot
    6. write finished rollouts to their rows, pass them on
    """
    # Its share of the rollouts in flight, rounded up: no generator takes its neighbour's.
    share = math.ceil(config.table_rows / config.generators)
    sampler = Sampler(config, device, share, held_out[number :: config.generators])
    generator = sampler.generator
    generator.version = -1  # the first weights have version 0
    channel.pin(device)
    timeline = Timeline(config, channel, number)
    waiting: deque[Rollout] = deque()
    while channel.running():
        take_rows(channel, generator, waiting)
        can_refresh = config.refresh == "in_flight" or not generator.active
        if can_refresh and int(channel.version) > generator.version:
            with timeline.span("pick up weights"):
                generator.version = channel.pick_up(sampler.weights)
        # The leader publishes nothing while it waits, so the newest weights are those it means.
        is_asked = bool(channel.eval_done[number] < channel.eval_asked)
        is_due = is_asked and generator.version == int(channel.version)
        if is_due and not generator.active:
            with timeline.span("evaluate"):
                answers = sampler.evaluate()
                ours = channel.eval_correct[number : len(held_out) : config.generators]
                ours.copy_(torch.tensor([JUDGED[answer["correct"]] for answer in answers]))
                write_samples(config, generator.version, answers)
                channel.eval_done[number] += 1
        started = []
        while waiting and not is_due and may_start(waiting[0].ticket, generator.version, config):
            started.append(waiting.popleft())
        if started:
            with timeline.span("prefill"):
                generator.add(started)
        if generator.active:
            with timeline.span("decode"):
                pass_on(channel, generator.step())
        else:
            timeline.flush()
    timeline.flush()


def take_rows(channel: Channel, generator: Generator, waiting: deque[Rollout]):
    """Rows for the slots that may be filled. Waits a little if there is nothing else to do."""
    while len(waiting) < generator.room:
        row = channel.to_generator.get(0.0 if generator.active or waiting else 0.02)
        if row is None:
            return
        waiting.append(read_rollout(channel, row))


def pass_on(channel: Channel, finished: list[Rollout]):
    """Write finished rollouts to their rows, and the rows to their teachers' queues."""
    for rollout in finished:
        write_rollout(channel, rollout)
        channel.to_teachers[channel.teacher[rollout.row]].put([rollout.row])
