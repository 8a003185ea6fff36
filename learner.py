"""The learner: rollouts in, updated weights out.

Letters of shapes: serial.py. Parameters are float32 masters. On a GPU the forward pass runs in
bfloat16; log-probabilities and losses stay in float32. The head runs in chunks (kernels/head.py),
so logits [T,V] never exist.

The ranks of a node share parameters, gradients and optimiser state (FSDP2), and each trains its
share of the rows. There is one denominator, the response tokens of the whole update. So the result
depends on micro-batches, ranks and nodes by rounding alone.

Dropout is off: the student that trains is the student that sampled. Left out: LoRA, tensor and
pipeline parallelism, torch.compile.
"""

import shutil
import time
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from channel import LENGTH, Channel
from config import Config
from kernels.head import candidate_loss
from losses import make_loss
from model import head_weight, layers_of, response_hidden, row_batches
from nodes import Nodes, from_every_rank

# Metrics that are summed over positions, in the order that Learner.backward returns.
SUMMED = (
    "loss",
    "reverse_kl",
    "drift_kl",
    "drift_k3",
    "support_mass_student",
    "support_mass_teacher",
)
WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


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

    def forward(self, table, rows):
        """(sum of the loss, student_logp, candidate_ids, teacher_logp, behavior_logp) of the
        responses of `rows`; the last four are [T,C].
        """
        fields = (table.candidate_ids, table.teacher_logp, table.behavior_logp)
        ids, t, b = (of_responses(table, rows, x).to(self.model.device) for x in fields)
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = response_hidden(self.model, table, rows).to(self.dtype)
        head = head_weight(self.model)
        head = head if len(head) == self.vocab else head[: self.vocab]
        settings = (1.0 / self.config.temperature, self.config.head_chunk)
        total, s = candidate_loss(hidden, head, ids.long(), t, b, self.loss, *settings)
        return total, s, ids, t, b


def shard(student: Student, group):
    """Split parameters, gradients and optimiser state over a node's ranks (FSDP2, `fully_shard`).

    Each layer is gathered for its own forward and backward pass. Embedding, norm and head are one
    group: they may share a weight.
    """
    mesh = DeviceMesh.from_group(group, student.model.device.type)
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
    nodes: Nodes = field(default_factory=Nodes)
    recompute: bool = False  # layers in the backward pass, to save memory
    version: int = 0

    def __post_init__(self):
        self.device = self.model.device
        self.model.requires_grad_(True)
        self.student = Student(self.model, self.config, self.vocab, self.dtype)
        self.loss = self.student.loss
        for layer in layers_of(self.model) if self.recompute else ():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if self.nodes.world > 1:
            shard(self.student, self.nodes.ranks)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.95), weight_decay=0.0)

    # ---- one update ---------------------------------------------------------------------------

    def update(self, table: Channel, rows: list[int]):
        """Train on `rows`, the whole update's and the same on every rank; return its metrics."""
        return self.apply([self.accumulate(table, rows)])

    def accumulate(self, table: Channel, rows: list[int]):
        """Compute the gradient of the node's `rows`, the same on every rank.

        Returns sums over the response tokens and over the rows, for `apply`.
        """
        tokens = int((table.length[rows] - table.prompt_len[rows]).sum())
        batches = self.micro_batches(table, rows)
        tables = (self.student(table, batch)[1:] for batch in batches)
        self.loss.look_ahead(tables, from_every_rank)
        self.optimizer.zero_grad()
        sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=self.device)
        for batch in batches:
            sums += self.backward(table, batch, tokens)
        if self.nodes.world > 1:
            dist.all_reduce(sums, group=self.nodes.ranks)
        return dict(zip(SUMMED, sums.tolist())) | self.describe(table, rows)

    @torch.no_grad()
    def apply(self, parts: list[dict]):
        """Change the parameters by the mean gradient of all nodes; return the update's metrics.

        `parts`: what `accumulate` has returned on each. Raises FloatingPointError, before any
        parameter changes, if the gradient is not finite, and RoleDied if a node is gone.
        """
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        tokens = total["tokens"]
        if len(parts) > 1:
            for p in self.parameters:  # an expert that no token has used
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            gradients = [local(p.grad) for p in self.parameters]
            mean = parameters_to_vector(gradients)
            mean *= parts[self.nodes.node]["tokens"] / tokens
            self.nodes.add_up(mean)
            vector_to_parameters(mean, gradients)
        metrics = {name: total[name] / tokens for name in SUMMED}
        metrics |= self.step()
        self.version += 1
        return metrics | {
            "tokens": tokens,
            "truncated_fraction": total["truncated_fraction"] / len(parts),
            "lag_mean": total["lag"] / tokens,
            "lag_max": max(part["lag_max"] for part in parts),
        }

    def micro_batches(self, table, rows):
        """This rank's share of the rows, in groups for one forward pass each.

        All ranks have equally many groups, or they would wait for each other for ever. So some
        may be empty.
        """
        by_length = sorted(rows, key=lambda row: -int(table.length[row]))
        budget = self.config.micro_batch_tokens
        world = self.nodes.world
        shares = [row_batches(table, by_length[i::world], budget) for i in range(world)]
        mine = shares[self.nodes.rank]
        return mine + [[]] * (max(map(len, shares)) - len(mine))

    def backward(self, table, rows, tokens):
        """Add the gradient of one micro-batch; return sums over its positions: SUMMED, float64."""
        total, s, ids, t, b = self.student(table, rows)
        # Sharding averages over the ranks. One denominator for all asks for a sum.
        (total * (self.nodes.world / tokens)).backward()
        drift = b[:, 0] - s[:, 0]
        summed = (
            self.loss.reverse_kl(s, t, b),
            drift,  # k1 estimate of KL(sampler || student)
            (-drift).expm1() + drift,  # k3 estimate: no term is negative
            self.loss.support_probs(ids, s),
            self.loss.support_probs(ids, t),
        )
        return torch.stack([total.detach(), *(x.sum(dtype=torch.float64) for x in summed)])

    def step(self):
        """Clip the gradient and change the parameters."""
        warmup = (self.version + 1) / max(1, self.config.warmup_steps)
        lr = self.config.lr * min(1.0, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = float(whole(clip_grad_norm_(self.parameters, self.config.max_grad_norm)))
        if not norm < float("inf"):
            raise FloatingPointError(
                f"update {self.version + 1}: gradient norm is {norm}: "
                "lower --lr; --resume takes the checkpoint before, if there is one"
            )
        self.optimizer.step()
        return {"grad_norm": norm, "lr": lr}

    def describe(self, table, rows):
        """Lengths and lags of an update's rows."""
        lag = self.version - of_responses(table, rows, table.weight_version)
        truncated = table.finish[rows] == LENGTH
        return {
            "tokens": len(lag),
            "truncated_fraction": float(truncated.double().mean()),
            "lag": int(lag.sum()),
            "lag_max": int(lag.max()),
        }

    # ---- weights out --------------------------------------------------------------------------

    def publish(self, channel):
        """Put the weights into the mailbox, in the generator's dtype; returns the seconds.

        Every rank of the node takes part, one parameter after the other. Rank 0 writes.
        """
        started = time.monotonic()
        dtype = channel.weights.dtype
        parts = (whole(p.detach().to(dtype)) for p in self.parameters)
        if self.nodes.rank == 0:
            channel.publish(parts, self.version)
        else:
            for _ in parts:
                pass
        return time.monotonic() - started

    def save(self, output, tokenizer, progress):
        """Write step_N: a Hugging Face model (float32) with what `load` needs.

        Every rank of node 0 takes part, and rank 0 writes. `progress`: what checks.read_progress
        returns. A checkpoint is whole or absent, never half. Raises OSError if that fails.
        """
        both = (self.model, self.optimizer)
        weights, optimizer = state_dict.get_state_dict(*both, options=WHOLE)
        if self.nodes.rank == 0:
            state = {"version": self.version, "optimizer": optimizer}
            self.write(output / f"step_{self.version}", weights, tokenizer, state, progress)

    def write(self, target, weights, tokenizer, state, progress):
        """Rank 0's part of `save`."""
        once = dict(self.model.named_parameters())
        tied = dict(self.model.named_parameters(remove_duplicate=False)).keys() - once.keys()
        unfinished = target.with_name(f".partial_{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            weights = {name: value for name, value in weights.items() if name not in tied}
            self.model.save_pretrained(unfinished, state_dict=weights)
            tokenizer.save_pretrained(unfinished)
            torch.save(state, unfinished / "training_state.pt")
            (unfinished / "progress.yaml").write_text(yaml.safe_dump(progress))
            usual = (unfinished / "config.json").stat().st_mode
            for path in unfinished.glob("*.safetensors"):  # which only the owner could read
                path.chmod(usual)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
        except Exception as error:  # torch and safetensors have their own for a full disk
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"{target} cannot be written: {error}") from error

    def load(self, directory):
        """Restore the rest of what `save` wrote; the model was loaded from the same directory.

        Another number of ranks may have saved it.
        """
        path = directory / "training_state.pt"
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        both = (self.model, self.optimizer)
        state_dict.set_optimizer_state_dict(*both, state["optimizer"], options=WHOLE)
        self.version = state["version"]


def whole(tensor):
    """The tensor itself; a sharded one is gathered, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """The tensor itself; of a sharded one this rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def of_responses(table, rows, field):
    """The part of `field` [R,M,...] that belongs to the response tokens of `rows`: [T,...]."""
    counts = (table.length[rows] - table.prompt_len[rows]).tolist()
    parts = [field[row, :count] for row, count in zip(rows, counts)]
    return torch.cat([field[0, :0], *parts])
