"""The learner: rollouts in, updated weights out.

Letters of shapes: serial.py. Parameters are float32 masters. On a GPU the forward pass runs in
bfloat16 autocast; log-probabilities and losses stay in float32. The head runs in chunks
(kernels/head.py), so logits [T,V] never exist.

With several ranks each trains its share of the rows, and gradients are summed. There is one
denominator, the response tokens of the whole update. So the result does not depend on micro-batches
and ranks.

Dropout is off: the student that trains is the student that sampled. Left out: FSDP, gradient
checkpointing, LoRA.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_, vector_to_parameters

from channel import LENGTH, Channel
from config import Config
from kernels.head import candidate_logp, candidate_loss
from losses import make_loss
from model import flat_parameters, head_weight, response_hidden, row_batches

BETAS = (0.9, 0.95)
# Metrics that are summed over positions, in the order that Learner.backward returns.
SUMMED = ("loss", "reverse_kl", "drift_kl", "support_mass_student", "support_mass_teacher")


@dataclass
class Learner:
    """One learner rank: the student, its optimiser, the number of updates made (`version`)."""

    model: nn.Module  # float32 parameters
    config: Config
    vocab: int
    dtype: torch.dtype  # of the forward pass
    rank: int = 0
    world: int = 1
    version: int = 0

    def __post_init__(self):
        self.device = self.model.device
        self.loss = make_loss(self.config)
        self.scale = 1.0 / self.config.temperature
        self.parameters = list(self.model.requires_grad_(True).parameters())
        matrices = [p for p in self.parameters if p.dim() >= 2]
        vectors = [p for p in self.parameters if p.dim() < 2]
        decayed = {"params": matrices, "weight_decay": self.config.weight_decay}
        groups = [decayed, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS)

    # ---- one update ---------------------------------------------------------------------------

    def update(self, table: Channel, rows: list[int]):
        """Train on `rows`, the whole update's and the same on every rank; return its metrics.

        Raises FloatingPointError, before any parameter changes, if the gradient is not finite.
        """
        tokens = int((table.length[rows] - table.prompt_len[rows]).sum())
        batches = self.micro_batches(table, rows)
        if self.loss.needs_log_ratios:
            self.loss.use_log_ratios(self.log_ratios(table, batches))
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=self.device)
        for batch in batches:
            sums += self.backward(table, batch, tokens)
        for p in self.parameters:  # a rank may have no rows
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.sum_over_ranks(sums)
        metrics = dict(zip(SUMMED, (sums / tokens).tolist()))
        metrics |= self.step()
        metrics |= self.describe(table, rows)
        self.version += 1
        return metrics

    def micro_batches(self, table, rows):
        """This rank's share of the rows, in groups for one forward pass each."""
        by_length = sorted(rows, key=lambda row: -table.length[row])
        mine = by_length[self.rank :: self.world]  # similar work for every rank
        return row_batches(table, mine, self.config.micro_batch_tokens)

    def backward(self, table, rows, tokens):
        """Add the gradient of one micro-batch; return sums over its positions: SUMMED, float64."""
        ids, t, b = self.candidates(table, rows)
        hidden = self.hidden(table, rows)
        total, s = candidate_loss(
            hidden, self.head(), ids, t, b, self.loss, self.scale, self.config.head_chunk
        )
        (total / tokens).backward()
        summed = (
            self.loss.reverse_kl(s, t, b),
            b[:, 0] - s[:, 0],  # k1 estimate of KL(sampler || student)
            self.loss.support_probs(ids, s),
            self.loss.support_probs(ids, t),
        )
        return torch.stack([total.detach(), *(x.sum(dtype=torch.float64) for x in summed)])

    def hidden(self, table, rows):
        """Hidden states that predict the responses of `rows`: [T,D]."""
        is_mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=is_mixed):
            return response_hidden(self.model, table, rows).to(self.dtype)

    def head(self):
        """[V,D]"""
        weight = head_weight(self.model)
        return weight if len(weight) == self.vocab else weight[: self.vocab]

    def candidates(self, table, rows):
        """candidate_ids int64, teacher_logp and behavior_logp float32 of the rows, [T,C] each."""
        fields = (table.candidate_ids, table.teacher_logp, table.behavior_logp)
        ids, t, b = (of_responses(table, rows, field).to(self.device) for field in fields)
        return ids.long(), t, b

    @torch.no_grad()
    def log_ratios(self, table, batches):
        """s - b of every sample of the whole update, over all ranks: one more forward pass."""
        parts = [torch.zeros(0)]
        for rows in batches:
            ids, _, b = self.candidates(table, rows)
            head = self.head().to(self.dtype)
            hidden = self.hidden(table, rows)
            s = candidate_logp(hidden, head, ids, self.scale, self.config.head_chunk)
            parts.append((s - b).flatten().cpu())
        local = torch.cat(parts)
        if self.world == 1:
            return local
        parts = [None] * self.world
        dist.all_gather_object(parts, local)
        return torch.cat(parts)

    def sum_over_ranks(self, sums):
        """Sum gradients and metrics. A rank without rows takes part with zeros."""
        if self.world == 1:
            return
        gradients = [p.grad for p in self.parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        vector_to_parameters(flat, gradients)
        dist.all_reduce(sums)

    def step(self):
        """Clip the gradient and change the parameters."""
        warmup = (self.version + 1) / max(1, self.config.warmup_steps)
        lr = self.config.lr * min(1.0, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = float(clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if not norm < float("inf"):
            raise FloatingPointError(
                f"update {self.version + 1}: gradient norm is {norm}: "
                "lower --lr, or resume from the last checkpoint"
            )
        self.optimizer.step()
        return {"grad_norm": norm, "lr": lr}

    def describe(self, table, rows):
        """Lengths and lags of an update's rows."""
        lag = self.version - of_responses(table, rows, table.weight_version)
        truncated = table.finish[rows] == LENGTH
        return {
            "tokens": len(lag),
            "response_tokens_mean": len(lag) / len(rows),
            "truncated_fraction": float(truncated.double().mean()),
            "lag_mean": float(lag.double().mean()),
            "lag_max": int(lag.max()),
        }

    # ---- weights out --------------------------------------------------------------------------

    def publish(self, channel: Channel):
        """Put the weights into the mailbox, in the generator's dtype; returns the seconds."""
        started = time.monotonic()
        flat = flat_parameters(self.model, channel.weights.dtype)
        channel.publish(flat, self.version)
        return time.monotonic() - started

    def save(self, output: Path, tokenizer, trained_ahead: list[int]):
        """Write step_N: a Hugging Face model (float32) with what `load` needs.

        The directory is complete or absent, never half.
        """
        target = output / f"step_{self.version}"
        partial = output / f".partial_step_{self.version}"
        shutil.rmtree(partial, ignore_errors=True)
        self.model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        state = {
            "version": self.version,
            "optimizer": self.optimizer.state_dict(),
            "trained_ahead": trained_ahead,
        }
        torch.save(state, partial / "training_state.pt")
        for path in partial.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that only the owner can read
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    def load(self, checkpoint: Path):
        """Restore the rest of what `save` wrote; the model was loaded from the same directory.

        Returns `trained_ahead`: tickets of later batches that arrival order has trained already.
        """
        # On the CPU: Adam's step counts stay there, and its moments are moved by torch.
        state = torch.load(checkpoint / "training_state.pt", map_location="cpu")
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["weight_decay"] = self.config.weight_decay
        self.version = state["version"]
        return state["trained_ahead"]


def of_responses(table, rows, field):
    """The part of `field` [R,M,...] that belongs to the response tokens of `rows`: [T,...]."""
    counts = (table.length[rows] - table.prompt_len[rows]).tolist()
    return torch.cat([field[row, :count] for row, count in zip(rows, counts)])
