"""The learner: rollouts in, updated weights out.

    B  rollouts of an update     N  response positions of a micro-batch     C  candidates     D  hidden size
    V  vocabulary                P  parameters

Parameters are float32 masters; on a GPU the forward pass runs in bfloat16 autocast, log-probabilities and losses
stay in float32. The head runs in chunks (kernels/head.py), so [N,V] logits never exist. With several ranks each
trains its share of the rows and gradients are summed; one denominator, the response tokens of the whole update,
makes the result independent of micro-batches and ranks.

Dropout is off: the student that trains is the student that sampled. Left out: FSDP, gradient checkpointing, LoRA.
"""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from channel import LENGTH, Channel
from config import Config
from kernels.head import candidate_logp, candidate_loss, fused_loss
from losses import make_loss, reverse_kl_estimate, second_moment_threshold
from model import head_weight
from teacher import response_hidden, token_batches

BETAS = (0.9, 0.95)


class Learner:
    """One learner rank: `model` with float32 parameters, its optimiser, the number of updates made (`version`)."""

    def __init__(self, model: nn.Module, config: Config, vocab: int, dtype: torch.dtype, rank: int = 0, world: int = 1):
        self.model, self.config, self.dtype, self.rank, self.world = model, config, dtype, rank, world
        self.device, self.version, self.vocab = model.device, 0, vocab
        self.parameters = list(model.requires_grad_(True).parameters())
        decay = [p for p in self.parameters if p.dim() >= 2]
        rest = [p for p in self.parameters if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=BETAS)

    # ---- one update -----------------------------------------------------------------------------

    def update(self, table: Channel, rows: list[int]) -> dict[str, float]:
        """Train on `rows` (the whole update's, the same list on every rank) and return its metrics.

        Raises FloatingPointError, before any parameter changes, when the gradient is not finite.
        """
        lengths = [int(table.length[row]) for row in rows]
        by_length = sorted(range(len(rows)), key=lambda i: -lengths[i])
        mine = by_length[self.rank :: self.world]  # similar work for every rank
        batches = [[rows[mine[i]] for i in group] for group in token_batches([lengths[i] for i in mine], self.config.micro_batch_tokens)]
        tokens = sum(lengths) - sum(int(table.prompt_len[row]) for row in rows)
        threshold = self._m2_threshold(table, batches)
        losses = make_loss(self.config, threshold), fused_loss(self.config, threshold)
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            for name, value in self._backward(table, batch, losses, tokens).items():
                sums[name] = sums.get(name, 0) + value
        sums = self._sum_over_ranks(sums)
        lr = self.config.lr * min(1.0, (self.version + 1) / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if not grad_norm < float("inf"):
            raise FloatingPointError(f"update {self.version + 1}: gradient norm is {grad_norm}: lower --lr, or resume from the last checkpoint")
        self.optimizer.step()
        lag = self.version - torch.cat([self._versions(table, row) for row in rows])
        self.version += 1
        return {name: float(value) / tokens for name, value in sums.items()} | {
            "tokens": tokens, "lag_mean": float(lag.double().mean()), "lag_max": int(lag.max()), "grad_norm": grad_norm, "lr": lr,
            "truncated_fraction": sum(int(table.finish[row]) == LENGTH for row in rows) / len(rows),
            "response_tokens_mean": tokens / len(rows),
        }  # fmt: skip

    def _backward(self, table: Channel, rows: list[int], losses: tuple, tokens: int) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch; return sums over its positions.

        A position's candidates, left to right: the emitted token (the first of the draws), the top-K, the tail draws.
        """
        ids, teacher_logp, behavior_logp = self._candidates(table, rows)
        total, student_logp = candidate_loss(
            self._hidden(table, rows), self._head(), ids, teacher_logp, behavior_logp, *losses,
            1.0 / self.config.temperature, self.config.head_chunk,
        )  # fmt: skip
        (total / tokens).backward()
        columns = self.config.columns
        support = columns["top"] if self.config.loss != "sampled_reverse_kl" else columns["drawn"]
        counted_once = torch.ones_like(ids[:, support], dtype=torch.bool)
        if self.config.loss == "sampled_reverse_kl":  # draws may repeat
            counted_once = ~(ids[:, support, None] == ids[:, None, support]).tril(-1).any(-1)
        estimate = reverse_kl_estimate(self.config.loss, columns, student_logp, teacher_logp, behavior_logp)
        return {
            "loss": total.detach(),
            "reverse_kl": estimate.sum(dtype=torch.float64),
            "drift_kl": (behavior_logp[:, 0] - student_logp[:, 0]).sum(dtype=torch.float64),  # k1 of KL(sampler || student)
            "support_mass_student": (student_logp[:, support].exp() * counted_once).sum(dtype=torch.float64),
            "support_mass_teacher": (teacher_logp[:, support].exp() * counted_once).sum(dtype=torch.float64),
        }

    def _hidden(self, table: Channel, rows: list[int]) -> Tensor:
        """Hidden states [N,D] at the response positions of `rows`."""
        mixed = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()
        with mixed:
            return response_hidden(self.model, table, rows).to(self.dtype)

    def _head(self) -> Tensor:
        weight = head_weight(self.model)
        return weight if weight.shape[0] == self.vocab else weight[: self.vocab]

    def _candidates(self, table: Channel, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """candidate_ids int64, teacher_logp and behavior_logp float32 of all response positions, each [N,C]."""
        fields = (table.candidate_ids, table.teacher_logp, table.behavior_logp)
        counts = [int(table.length[row] - table.prompt_len[row]) for row in rows]
        ids, t, b = (torch.cat([f[row, :count] for row, count in zip(rows, counts)]).to(self.device) for f in fields)
        return ids.long(), t, b

    def _versions(self, table: Channel, row: int) -> Tensor:
        return table.weight_version[row, : int(table.length[row] - table.prompt_len[row])]

    def _m2_threshold(self, table: Channel, batches: list[list[int]]) -> float | None:
        """M2PO's second-moment budget is one for the whole update: a pass over all its samples first, no gradient."""
        if self.config.correction != "m2po":
            return None
        log_ratios = []
        with torch.no_grad():
            for rows in batches:
                ids, _, behavior_logp = self._candidates(table, rows)
                hidden, head = self._hidden(table, rows), self._head().to(self.dtype)
                s = candidate_logp(hidden, head, ids, 1.0 / self.config.temperature, self.config.head_chunk)
                log_ratios.append((s - behavior_logp).flatten().cpu())
        local = torch.cat(log_ratios) if log_ratios else torch.zeros(0)
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, local)
            local = torch.cat(parts)
        return second_moment_threshold(local)

    def _sum_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum gradients and metrics over ranks. A rank without rows takes part with zeros."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.world == 1:
            return sums
        flat = torch.cat([p.grad.flatten() for p in self.parameters])
        dist.all_reduce(flat)
        for p, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters])):
            p.grad.copy_(part.view_as(p))
        names = ("loss", "reverse_kl", "drift_kl", "support_mass_student", "support_mass_teacher")
        values = torch.stack([torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=self.device) for name in names])
        dist.all_reduce(values)
        return dict(zip(names, values))

    # ---- weights out ----------------------------------------------------------------------------

    @torch.no_grad()
    def publish(self, channel: Channel) -> float:
        """Put the weights of `version` into the mailbox, in the generator's dtype; returns the seconds it took."""
        started = time.monotonic()
        channel.publish(torch.cat([p.to(channel.weights.dtype).flatten() for p in self.parameters]), self.version)
        return time.monotonic() - started

    def save(self, output_dir: Path, tokenizer, trained_ahead: list[int]) -> Path:
        """Write step_N: a Hugging Face model directory (float32) with what `load` needs. Complete or absent, never half."""
        target = output_dir / f"step_{self.version}"
        partial = output_dir / f".partial_step_{self.version}"
        shutil.rmtree(partial, ignore_errors=True)
        self.model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        state = {"version": self.version, "optimizer": self.optimizer.state_dict(), "trained_ahead": trained_ahead}
        torch.save(state, partial / "training_state.pt")
        for path in partial.glob("*.safetensors"):
            path.chmod(0o644)  # made unreadable for others
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        return target

    def load(self, checkpoint: Path) -> list[int]:
        """Restore optimiser and update counter (the model was loaded from the directory).

        Returns `trained_ahead`: the tickets of later batches that arrival order has trained already.
        """
        state = torch.load(checkpoint / "training_state.pt", map_location="cpu")  # Adam's step counts stay there, moments are moved
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["weight_decay"] = self.config.weight_decay  # of the matrices; every update sets lr
        self.version = state["version"]
        return state["trained_ahead"]
