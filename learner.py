"""The learner: rollouts in, updated weights out.

Letters of shapes: serial.py. Parameters are float32 masters. On a GPU the forward pass runs in
bfloat16; log-probabilities and losses stay in float32. The head runs in chunks (kernels/head.py),
so logits [T,V] never exist.

The ranks of a node share parameters, gradients and optimiser state, and the nodes add their
gradients up: FSDP2 on a mesh [nodes, ranks of a node] (HSDP). Each rank trains its share of its
node's rows. There is one denominator, the response tokens of the whole update. So the result
depends on micro-batches, ranks and nodes by rounding alone.

Dropout is off: the student that trains is the student that sampled. Left out: LoRA, tensor and
pipeline parallelism, torch.compile.
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from channel import LENGTH, Channel
from kernels.head import candidate_loss
from losses import make_loss
from model import head_weight, layers_of, response_hidden, row_batches, trained_part
from support.checkpoint import load_optimizer, save, step_of
from support.config import Config
from support.load import head_factor
from support.ranks import Ranks

# Metrics that are summed over positions, in the order that Learner.backward returns.
SUMMED = """loss reverse_kl drift_kl drift_k3 weight weight_squared
    support_mass_student support_mass_teacher""".split()
SHOWN = 4  # micro-batches whose tables are kept for rollouts.jsonl


class Student(nn.Module):
    """The model with the loss in its forward pass.

    Sharded parameters are whole only during the forward pass that they belong to. The head needs
    its weight, so head and loss are inside.
    """

    def __init__(self, model, config: Config, vocab: int, dtype: torch.dtype):
        """`dtype`: of the forward pass."""
        super().__init__()
        self.model = model
        self.config = config
        self.vocab = vocab
        self.dtype = dtype
        self.loss = make_loss(config)

    def forward(self, channel, rows):
        """(sum of the loss, student_logp, candidate_ids, teacher_logp, behavior_logp) of the
        responses of `rows`; the last four are [T,C].
        """
        fields = (channel.candidate_ids, channel.teacher_logp, channel.behavior_logp)
        ids, t, b = (of_responses(channel, rows, x).to(self.model.device) for x in fields)
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = response_hidden(self.model, channel, rows).to(self.dtype)  # [T,F]
        head = head_weight(self.model)  # [V,F]
        if len(head) > self.vocab:  # rows that only pad it; a slice copies the gradient
            head = head[: self.vocab]
        settings = (head_factor(self.model) / self.config.temperature, self.config.head_chunk)
        total, s = candidate_loss(hidden, head, ids.long(), t, b, self.loss, *settings)
        return total, s, ids, t, b


def shard(student: Student, mesh):
    """Split parameters, gradients and optimiser state over the ranks of a node (`fully_shard`).

    Each layer is gathered for its own forward and backward pass. Embedding, norm and head are one
    group: they may share a weight.
    """
    precision = MixedPrecisionPolicy(param_dtype=student.dtype, reduce_dtype=torch.float32)
    for module in (*layers_of(student), student):
        fully_shard(module, mesh=mesh, mp_policy=precision)


@dataclass
class Learner:
    """One learner rank: the student, its optimiser, the number of updates made (`version`)."""

    model: nn.Module  # float32 parameters
    config: Config
    vocab: int
    dtype: torch.dtype  # of the forward pass
    ranks: Ranks = field(default_factory=Ranks)
    version: int = 0
    shown: tuple = ()  # (rows, s, ids, t, b) of some micro-batches of the last update

    def __post_init__(self):
        trained_part(self.model).requires_grad_(True)
        self.student = Student(self.model, self.config, self.vocab, self.dtype)
        if self.config.checkpoint_activations:
            for layer in layers_of(self.model):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if self.ranks.world_size > 1:
            groups = [self.ranks.across, self.ranks.own_node]  # they have their own patience
            named = {"mesh": self.ranks.numbers, "mesh_dim_names": ("nodes", "ranks")}
            shard(self.student, DeviceMesh.from_group(groups, self.model.device.type, **named))
        self.parameters = list(trained_part(self.model).parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.95), weight_decay=0.0)

    # ---- one update ---------------------------------------------------------------------------

    def update(self, channel: Channel, rows: list[int], parts: list[dict] | None = None):
        """Train on `rows`; return the metrics of the whole update.

        `rows`: the node's, the same on all its ranks. `parts`: what `describe` says of the rows of
        every node; None where there is one. Raises FloatingPointError, before any parameter
        changes, if the gradient is not finite.
        """
        parts = parts or [self.describe(channel, rows)]
        tokens = sum(part["tokens"] for part in parts)
        share_cut = sum(p["truncated"] for p in parts) / sum(len(p["tickets"]) for p in parts)
        # The ranks make equally many passes, because in each they wait for each other.
        passes = max(part["passes"] for part in parts)
        batches = self.micro_batches(channel, rows)[self.ranks.local_rank]
        batches += [[] for _ in range(passes - len(batches))]
        tables = (self.student(channel, batch)[1:] for batch in batches)
        self.student.loss.look_ahead(tables, self.ranks.gather)
        self.optimizer.zero_grad()
        size = len(SUMMED) + 2 * len(self.config.teacher_paths)
        sums = torch.zeros(size, dtype=torch.float64, device=self.model.device)
        self.shown = []
        for number, batch in enumerate(batches, 1):
            if self.ranks.world_size > 1:  # the nodes add their gradients up once, at the end
                self.student.set_requires_all_reduce(number == passes)
            own_sums, tables = self.backward(channel, batch, tokens)
            sums += own_sums
            if number % math.ceil(passes / SHOWN) == 0:
                self.shown.append((batch, *tables))
        sums = sum(self.ranks.gather(sums.numpy(force=True)))
        summed, by_teacher = sums[: len(SUMMED)], sums[len(SUMMED) :].reshape(2, -1)
        metrics = dict(zip(SUMMED, (summed / tokens).tolist()))
        metrics["ess"] = metrics.pop("weight") ** 2 / metrics.pop("weight_squared")
        if self.student.loss.sampler_top:
            metrics["top_overlap"] = sum(part["overlap_sum"] for part in parts) / tokens
        for name, kl, count in zip(self.config.teacher_paths, *by_teacher.tolist()):
            if name and count:
                metrics[f"reverse_kl/{name}"] = kl / count
        metrics |= {
            "tokens": tokens,
            "truncated_fraction": share_cut,
            "lag_mean": sum(part["lag_sum"] for part in parts) / tokens,
            "lag_max": max(part["lag_max"] for part in parts),
        }
        metrics |= self.step()
        self.version += 1
        return metrics

    def describe(self, channel: Channel, rows: list[int]):
        """What the other nodes must know of this node's rows before they train on theirs."""
        lag = self.version - of_responses(channel, rows, channel.weight_version)  # [T]
        counts = channel.length[rows] - channel.prompt_len[rows]
        return {
            "tokens": len(lag),
            "tickets": channel.ticket[rows].tolist(),
            "truncated": int((channel.finish[rows] == LENGTH).sum()),
            "lag_sum": int(lag.sum()),
            "lag_max": int(lag.max()),
            "overlap_sum": float((channel.top_overlap[rows] * counts).sum()),
            "passes": max(map(len, self.micro_batches(channel, rows))),
        }

    def micro_batches(self, channel, rows):
        """For every rank of the node its share of the rows, in groups for a forward pass each."""
        by_length = sorted(rows, key=lambda row: -int(channel.length[row]))
        budget = self.config.micro_batch_tokens
        ranks = self.ranks.local_world_size
        return [row_batches(channel, by_length[i::ranks], budget) for i in range(ranks)]

    def backward(self, channel, rows, tokens):
        """Add the gradient of one micro-batch; return sums and s, ids, t, b of its positions.

        The sums, float64: SUMMED, the reverse KL of each teacher's positions, and their number.
        """
        total, s, ids, t, b = self.student(channel, rows)
        # Sharding averages over the ranks. One denominator for all asks for a sum.
        (total * (self.ranks.world_size / tokens)).backward()
        drift = b[:, 0] - s[:, 0]  # [T], of the emitted tokens
        bounded = drift.clamp(-40, 40)  # their squares are float32, whatever diverged
        reverse_kl = self.student.loss.reverse_kl(s, t, b)  # [T]
        summed = (
            reverse_kl,
            drift,  # k1 estimate of KL(sampler || student)
            (-drift).expm1() + drift,  # k3 estimate: no term is negative
            (-bounded).exp(),  # the importance weight
            (-2 * bounded).exp(),
            self.student.loss.support_probs(ids, s),
            self.student.loss.support_probs(ids, t),
        )
        sums = torch.stack([total.detach(), *(x.sum(dtype=torch.float64) for x in summed)])
        is_of = self.teachers_of(channel, rows).to(s.device)  # [names,T]
        by_teacher = torch.where(is_of, reverse_kl.double(), 0.0).sum(1)
        return torch.cat([sums, by_teacher, is_of.sum(1)]), (s.detach(), ids, t, b)

    def teachers_of(self, channel, rows):
        """Whose each response position of `rows` is: bool [teachers,T]."""
        names = [*self.config.teacher_paths]
        index = [names.index(name) for name in self.config.teacher_processes]
        process = channel.teacher[:, None].expand_as(channel.weight_version)  # [R,M]
        process = of_responses(channel, rows, process)  # [T]
        return F.one_hot(torch.tensor(index)[process], len(names)).T.bool()

    def step(self):
        """Clip the gradient and change the parameters."""
        warmup = (self.version + 1) / max(1, self.config.warmup_steps)
        lr = self.config.lr * min(1.0, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = float(whole(clip_grad_norm_(self.parameters, self.config.max_grad_norm)))
        if not norm < float("inf"):  # nor is NaN
            fix = "lower --lr; if --resume fails in the same way, remove the newest step_N"
            raise FloatingPointError(f"update {self.version + 1}: gradient norm is {norm}: {fix}")
        self.optimizer.step()
        return {"grad_norm": norm, "lr": lr}

    # ---- weights out --------------------------------------------------------------------------

    def publish(self, channel: Channel):
        """Put the weights into the mailbox, in the generator's dtype; returns the seconds.

        Every rank of the node takes part, one parameter after the other. The leader writes.
        """
        started = time.monotonic()
        parts = (whole(p.detach().to(channel.weights.dtype)) for p in self.parameters)
        if self.ranks.local_rank == 0:
            channel.publish(parts, self.version)
        else:
            sum(1 for _ in parts)  # gathering takes all ranks
        return time.monotonic() - started

    def save(self, output, tokenizer, progress):
        """Write step_N. Every rank of node 0 takes part: see support/checkpoint.py."""
        save(output / f"step_{self.version}", self.model, self.optimizer, tokenizer, progress)

    def load(self, directory):
        """Restore the rest of what `save` wrote; the model was loaded from the same directory."""
        load_optimizer(directory, self.model, self.optimizer)
        self.version = step_of(directory)


def whole(tensor):
    """The tensor itself; a sharded one is gathered, on every rank of the node."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def of_responses(channel, rows, field):
    """The part of `field` [R,M,...] that belongs to the response tokens of `rows`: [T,...]."""
    counts = (channel.length[rows] - channel.prompt_len[rows]).tolist()
    parts = [field[row, :count] for row, count in zip(rows, counts)]
    return torch.cat([field[0, :0], *parts])
