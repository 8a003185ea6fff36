"""The learner: rollouts in, updated weights out.

Letters of shapes: serial.py. Parameters are float32 masters. On a GPU the forward pass runs in
bfloat16; log-probabilities and losses stay in float32. The head runs in chunks (kernels/head.py),
so logits [T,V] never exist.

Several ranks share parameters, gradients and optimiser state (FSDP2), and each trains its share of
the rows. There is one denominator, the response tokens of the whole update. So the result depends
on micro-batches and ranks by rounding alone.

Dropout is off: the student that trains is the student that sampled. Left out: LoRA, tensor and
pipeline parallelism, several nodes.
"""

import shutil
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from channel import LENGTH, Channel
from config import Config
from kernels.head import candidate_loss
from losses import make_loss
from model import compile_layers, head_weight, layers_of, response_hidden, row_batches

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


def shard(student: Student, world: int):
    """Split parameters, gradients and optimiser state over the ranks (FSDP2, `fully_shard`).

    Each layer is gathered for its own forward and backward pass. Embedding, norm and head are one
    group: they may share a weight.
    """
    mesh = init_device_mesh(student.model.device.type, (world,))
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
    rank: int = 0
    world: int = 1
    recompute: bool = False  # layers in the backward pass, to save memory
    version: int = 0

    def __post_init__(self):
        self.device = self.model.device
        self.model.requires_grad_(True)
        self.student = Student(self.model, self.config, self.vocab, self.dtype)
        self.loss = self.student.loss
        compile_layers(self.model, self.config.compile)  # before `checkpoint`, which hides them
        for layer in layers_of(self.model) if self.recompute else ():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if self.world > 1:
            shard(self.student, self.world)
        self.parameters = list(self.model.parameters())
        matrices = [p for p in self.parameters if p.dim() >= 2]
        vectors = [p for p in self.parameters if p.dim() < 2]
        decayed = {"params": matrices, "weight_decay": self.config.weight_decay}
        groups = [decayed, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    # ---- one update ---------------------------------------------------------------------------

    def update(self, table: Channel, rows: list[int]):
        """Train on `rows`, the whole update's and the same on every rank; return its metrics.

        Raises FloatingPointError, before any parameter changes, if the gradient is not finite.
        """
        tokens = int((table.length[rows] - table.prompt_len[rows]).sum())
        batches = self.micro_batches(table, rows)
        tables = (self.student(table, batch)[1:] for batch in batches)
        self.loss.look_ahead(tables, partial(from_every_rank, world=self.world))
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=self.device)
        for batch in batches:
            sums += self.backward(table, batch, tokens)
        if self.world > 1:
            dist.all_reduce(sums)
        metrics = dict(zip(SUMMED, (sums / tokens).tolist()))
        metrics |= self.step() | self.describe(table, rows)
        self.version += 1
        return metrics

    def micro_batches(self, table, rows):
        """This rank's share of the rows, in groups for one forward pass each.

        All ranks have equally many groups, or they would wait for each other for ever. So some
        may be empty.
        """
        by_length = sorted(rows, key=lambda row: -int(table.length[row]))
        budget = self.config.micro_batch_tokens
        shares = [row_batches(table, by_length[i :: self.world], budget) for i in range(self.world)]
        mine = shares[self.rank]
        return mine + [[]] * (max(map(len, shares)) - len(mine))

    def backward(self, table, rows, tokens):
        """Add the gradient of one micro-batch; return sums over its positions: SUMMED, float64."""
        total, s, ids, t, b = self.student(table, rows)
        # Sharding averages over the ranks. One denominator for all asks for a sum.
        (total * (self.world / tokens)).backward()
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
            "lag_mean": float(lag.double().mean()),
            "lag_max": int(lag.max()),
        }

    # ---- weights out --------------------------------------------------------------------------

    def publish(self, channel):
        """Put the weights into the mailbox, in the generator's dtype; returns the seconds.

        Every rank takes part, one parameter after the other. Rank 0 writes.
        """
        started = time.monotonic()
        dtype = channel.weights.dtype
        parts = (whole(p.detach().to(dtype)) for p in self.parameters)
        if self.rank == 0:
            channel.publish(parts, self.version)
        else:
            for _ in parts:
                pass
        return time.monotonic() - started

    def save(self, output, tokenizer, progress):
        """Write step_N: a Hugging Face model (float32) with what `load` needs.

        Every rank takes part, and rank 0 writes. `progress`: what checks.read_progress returns.
        """
        weights = state_dict.get_model_state_dict(self.model, options=WHOLE)
        both = (self.model, self.optimizer)
        optimizer = state_dict.get_optimizer_state_dict(*both, options=WHOLE)
        if self.rank > 0:
            return
        state = {"version": self.version, "optimizer": optimizer}
        self.write(output / f"step_{self.version}", weights, tokenizer, (state, progress))

    def write(self, target, weights, tokenizer, resumable=()):
        """Write a Hugging Face model, with (state, progress). It is whole or absent, never half.

        Raises OSError if it cannot be written.
        """
        once = dict(self.model.named_parameters())
        tied = dict(self.model.named_parameters(remove_duplicate=False)).keys() - once.keys()
        unfinished = target.with_name(f".partial_{target.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            weights = {name: value for name, value in weights.items() if name not in tied}
            self.model.save_pretrained(unfinished, state_dict=weights)
            tokenizer.save_pretrained(unfinished)
            if resumable:
                state, progress = resumable
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

    def rescue(self, channel, output, tokenizer):
        """Write published_N: the weights in the mailbox, without the ranks that have the masters.

        `load` cannot continue from it. It is a model to evaluate, or to start a new run from.
        """
        version = int(channel.version)
        flat = channel.weights[version % 2].split([p.numel() for p in self.parameters])
        weights = self.model.state_dict()  # for its buffers, which are whole
        for (name, p), part in zip(self.model.named_parameters(), flat):
            weights[name] = part.view(p.shape)
        self.write(output / f"published_{version}", weights, tokenizer)

    def load(self, directory):
        """Restore the rest of what `save` wrote; the model was loaded from the same directory.

        Another number of ranks may have saved it.
        """
        path = directory / "training_state.pt"
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        both = (self.model, self.optimizer)
        state_dict.set_optimizer_state_dict(*both, state["optimizer"], options=WHOLE)
        self.optimizer.param_groups[0]["weight_decay"] = self.config.weight_decay
        self.version = state["version"]


def from_every_rank(value, world):
    """The values of all ranks, in their order."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def whole(tensor):
    """The tensor itself; a sharded one is gathered, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def of_responses(table, rows, field):
    """The part of `field` [R,M,...] that belongs to the response tokens of `rows`: [T,...]."""
    counts = (table.length[rows] - table.prompt_len[rows]).tolist()
    parts = [field[row, :count] for row, count in zip(rows, counts)]
    return torch.cat([field[0, :0], *parts])
