"""One training run in one process whose rollouts come from the weights exactly `lag` updates ago.

The pipeline's own Generator, Teacher, Learner, Channel and Tickets, called in turn; only the delay is made here, by
keeping the last `lag + 1` versions of the parameters. With lag 0 this is a synchronous run of train.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from channel import Channel, Tickets
from config import Config
from data import Prompt
from generate import Rollout, evaluate, new_generator, write_rollout
from kernels.head import head_logits
from learner import Learner
from model import flatten_parameters, head_weight, load_model, shared_vocabulary
from teacher import Teacher, response_hidden

CPU = torch.device("cpu")


def flat(model) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@dataclass
class Divergence:
    """Exact means over the response positions of fresh rollouts, nats."""

    forward_kl: float  # KL(teacher || student)
    reverse_kl: float  # KL(student || teacher)


class Lagged:
    """`config` as for train.py (max_staleness is ignored: the lag is exact); `prompts` and `held` as from load_prompts."""

    def __init__(self, config: Config, lag: int, prompts: list[Prompt], held: list[Prompt], keep: int = 0):
        """`keep`: versions of the parameters to remember beside those that the lag needs."""
        self.config = config = replace(config, max_staleness=0, teacher_cache_mb=0, order="batch")
        self.tokenizer, stops, self.vocab, _ = shared_vocabulary(config)
        self.held = held
        self.learner = Learner(load_model(config.student_path, torch.float32, CPU), config, self.vocab, torch.float32)
        self.teacher = Teacher(load_model(config.teacher_path, torch.float32, CPU), config, self.vocab)
        sampler = load_model(config.student_path, torch.float32, CPU, attention="kv_slots")
        self.weights = flatten_parameters(sampler)
        self.channel = Channel(config, len(self.weights), torch.float32)
        self.tickets = Tickets(config, self.channel, prompts, 0, [])
        self.generator = new_generator(config, sampler, stops, self.vocab, config.loss, config.batch_size)
        self.greedy = new_generator(config, sampler, stops, self.vocab, "greedy", max(1, len(held)))
        self.plain = new_generator(replace(config, num_samples=1), sampler, stops, self.vocab, "sampled_reverse_kl", max(1, len(held)))
        self.lag, self.versions = lag, deque([flat(self.learner.model)], maxlen=max(lag, keep) + 1)

    def rollouts(self) -> list[int]:
        """Rows with the next batch, sampled by the version of `lag` updates ago and scored by the teacher."""
        self.tickets.issue(self.learner.version)
        rows = []
        while (row := self.channel.to_generator.get()) is not None:
            rows.append(row)
        behind = min(self.lag, self.learner.version)
        self.weights.copy_(self.versions[-1 - behind])
        self.generator.version = self.learner.version - behind
        prompts = [self.channel.tokens[row, : self.channel.prompt_len[row]].tolist() for row in rows]
        started = [Rollout(ids, int(self.channel.ticket[row]), row) for ids, row in zip(prompts, rows)]
        for rollout in self.generator.generate(started):
            write_rollout(self.channel, rollout)
            self.tickets.scored[rollout.ticket] = rollout.row
        self.teacher.score(self.channel, rows)
        return rows

    def update(self) -> dict[str, float]:
        """One update on rollouts that are `lag` updates old (fewer in the first ones); its metrics."""
        rows = self.rollouts()
        metrics = self.learner.update(self.channel, rows)
        self.tickets.trained(rows)
        self.versions.append(flat(self.learner.model))
        return metrics

    def accuracy(self) -> float:
        """Greedy exact match of the newest weights on the held-out prompts."""
        self.weights.copy_(self.versions[-1])
        return evaluate(self.greedy, self.held, self.tokenizer)

    def fresh_rows(self, weights: Tensor, prompts: list[Prompt], ticket: int = 0) -> list[int]:
        """The first rows of the table with one rollout of `weights` for each prompt: tokens and lengths, nothing else."""
        self.weights.copy_(weights)
        rollouts = self.plain.generate([Rollout(prompt.ids, ticket + row, row) for row, prompt in enumerate(prompts)])
        for rollout in rollouts:
            ids = rollout.prompt_ids + rollout.response_ids
            self.channel.tokens[rollout.row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.channel.prompt_len[rollout.row], self.channel.length[rollout.row] = len(rollout.prompt_ids), len(ids)
        return list(range(len(prompts)))

    def logits(self, model, rows: list[int]) -> Tensor:
        """At every response position of `rows`: [sum n, V]."""
        return head_logits(response_hidden(model, self.channel, rows), head_weight(model)[: self.vocab], 1.0 / self.config.temperature)

    @torch.no_grad()
    def divergence(self) -> Divergence:
        """Exact KLs between the newest student and the teacher on one fresh sampled rollout of each held-out prompt."""
        sums, positions, size = torch.zeros(2, dtype=torch.float64), 0, self.config.batch_size
        for first in range(0, len(self.held), size):
            rows = self.fresh_rows(self.versions[-1], self.held[first : first + size], ticket=first)
            s, t = (self.logits(model, rows).log_softmax(-1) for model in (self.learner.model, self.teacher.model))
            sums += torch.stack([(t.exp() * (t - s)).sum(dtype=torch.float64), (s.exp() * (s - t)).sum(dtype=torch.float64)])
            positions += s.shape[0]
        return Divergence(*(sums / positions).tolist())

    def save(self, directory: Path):
        """A student to start other runs from."""
        self.learner.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
