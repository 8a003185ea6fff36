"""serial.Serial with what the studies measure: exact divergences, fresh rollouts, older weights."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from channel import Rollout
from kernels.head import head_logits
from losses import Proposal
from model import flat_parameters as flat
from model import head_weight, response_hidden
from serial import CPU, Serial
from support.config import Config
from support.data import Prompt
from support.load import head_factor

__all__ = ["CPU", "Divergence", "Lagged", "flat"]


@dataclass
class Divergence:
    """Exact means over the response positions of fresh rollouts, nats."""

    forward_kl: float  # KL(teacher || student)
    reverse_kl: float  # KL(student || teacher)


class Lagged(Serial):
    """A serial run without the teacher's cache."""

    def __init__(
        self, config: Config, lag: int, prompts: list[Prompt], held_out: list[Prompt], keep: int = 0
    ):
        """`keep`: versions of the parameters to remember beside those that the lag needs."""
        super().__init__(replace(config, teacher_cache_mb=0), lag, prompts, held_out)
        self.versions = deque(self.versions, maxlen=max(lag, keep) + 1)
        self.plain = replace(self.sampler.greedy, proposal=Proposal())

    def fresh_rows(self, weights: Tensor, prompts: list[Prompt], ticket: int = 0) -> list[int]:
        """The first rows of the table with one rollout of `weights` for each prompt:
        tokens and lengths, nothing else."""
        self.sampler.weights.copy_(weights)
        rollouts = self.plain.generate(
            [Rollout(prompt.ids, ticket + row, row) for row, prompt in enumerate(prompts)]
        )
        for rollout in rollouts:
            ids = rollout.prompt_ids + rollout.response_ids
            self.channel.tokens[rollout.row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            self.channel.prompt_len[rollout.row] = len(rollout.prompt_ids)
            self.channel.length[rollout.row] = len(ids)
        return list(range(len(prompts)))

    def logits(self, model, rows: list[int]) -> Tensor:
        """At every response position of `rows`: [T,V]."""
        hidden = response_hidden(model, self.channel, rows)
        return head_logits(
            hidden,
            head_weight(model)[: self.teachers[0].vocab],
            head_factor(model) / self.config.temperature,
        )

    @torch.no_grad()
    def divergence(self) -> Divergence:
        """Exact KLs between the newest student and the teacher on one fresh rollout of each
        held-out prompt."""
        sums, positions, size = torch.zeros(2, dtype=torch.float64), 0, self.config.batch_size
        for first in range(0, len(self.sampler.held_out), size):
            rows = self.fresh_rows(
                self.versions[-1], self.sampler.held_out[first : first + size], ticket=first
            )
            s, t = (
                self.logits(model, rows).log_softmax(-1)
                for model in (self.learner.model, self.teachers[0].model)
            )
            forward = (t.exp() * (t - s)).sum(dtype=torch.float64)
            reverse = (s.exp() * (s - t)).sum(dtype=torch.float64)
            sums += torch.stack([forward, reverse])
            positions += s.shape[0]
        return Divergence(*(sums / positions).tolist())

    def curve(self, steps: int, every: int, metrics: tuple[str, ...]) -> list[dict]:
        """Train for `steps` updates. Returns a line per evaluation, `every` so many: exact
        divergences, accuracy (None where prompts have no answers), means of `metrics` since the
        last.
        """
        lines, since = [], []
        for step in range(1, steps + 1):
            since.append(self.update())
            if step % every == 0:
                has_answers = any(prompt.answer for prompt in self.sampler.held_out)
                divergence = vars(self.divergence())
                accuracy = self.accuracy() if has_answers else None
                means = {key: sum(m[key] for m in since) / len(since) for key in metrics}
                lines.append({"update": step, "accuracy": accuracy, **divergence, **means})
                since = []
        return lines

    def save(self, directory: Path):
        """A student to start other runs from."""
        self.learner.model.save_pretrained(directory)
        self.sampler.tokenizer.save_pretrained(directory)
