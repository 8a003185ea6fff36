"""How many kernels does a GPU launch, and how many bytes do they move? Counted without a GPU:

    python -m experiments.count --student org/small --teacher org/large

The project's own code runs on fake tensors: they have shapes and dtypes, and no data. Every
operator that is no view counts as one kernel, which reads its inputs and writes its outputs. What a
GPU does in one kernel is one here: attention, RMSNorm, the loss, products that sum in float32.
The keys and values that a decode step reads depend on the lengths, and are left out.

What it cannot see: how fast a kernel is, what caches save, kernels of libraries behind one
operator (a cumulative sum of a long row is two, for one), and mixtures of experts, whose shapes
depend on data: they are counted as the dense model of the same width.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

import kv_cache  # noqa: F401, it registers the attention
from generate import Generator
from kernels.head import candidate_loss
from losses import make_loss
from model import fuse_norms, head_weight, is_rms_norm, last_hidden
from support.config import Config, InputError, parse
from teacher import Teacher

TOKENS = 512  # of the forward passes that are counted
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
SPARSE = {"embedding", "index", "gather", "index_put_", "_index_put_impl_", "scatter_"}
NO_KERNEL = (
    "empty",
    "new_empty",
    "_unsafe_view",
    "detach",
    "device",
    "sym_size",
    "lift_fresh",
    "promote",
)


@dataclass(frozen=True)
class Kernels:
    """`launches` in all. `bytes`: of kernels that are no matrix products."""

    launches: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Counted:
    """What a model's kernels are."""

    step: Kernels  # of decoding, launches a step; bytes a slot, keys and values left out
    forward: Kernels  # without the head, launches a pass; bytes a token
    scoring: Kernels  # forward and look-up, launches a pass; bytes a token
    training: Kernels  # forward and backward, launches a pass; bytes a token


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name.startswith(NO_KERNEL)):
            self.kernel(name, (args, kwargs, out))
        return out

    def kernel(self, name, tensors):
        """One kernel, which reads and writes `tensors` once."""
        found = {id(x): x for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)}
        sizes = [x.numel() * x.element_size() for x in found.values()]
        self.launches += 1
        self.names[name] += 1
        if name in SPARSE:  # of the table, the largest, it touches as much as the next holds
            sizes.remove(max(sizes))
            sizes.append(max(sizes))
        if name not in PRODUCTS:
            self.bytes += sum(sizes)


def one_kernel(shape_of):
    """A function that stands for one kernel, and for one more in the backward pass.

    `shape_of`: its tensor arguments -> its result, empty.
    """

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            out = shape_of(*tensors)
            current.kernel("", (tensors, out))
            return out

        @staticmethod
        def backward(ctx, grad):
            tensors = ctx.saved_tensors
            grads = [torch.empty_like(x) for x in tensors]
            current.kernel("", (tensors, grad, grads))
            return tuple(grads)

    return Kernel.apply


def attention(query, key, value, mask=None, **options):
    return FUSED(query, key, value)


FUSED = one_kernel(lambda query, key, value: query.new_empty(*query.shape[:3], value.shape[3]))
NORM = one_kernel(lambda x, weight: torch.empty_like(x))


def decode_attention(query, keys, values, position, scale, window):
    out = query.new_empty(*query.shape[:3], values.shape[3])
    current.kernel("", (query, out))  # and the keys and values of the slots
    return out


def fused_loss(terms, logits, ids, t, b, dtype, first, first_draw):
    grad = logits.view(dtype)[:, : logits.shape[1]]
    current.kernel("", (logits, grad, ids, t, b))
    current.bytes += logits.nbytes  # which it reads twice
    return logits.new_empty(len(logits)), torch.empty_like(t), grad


def head_logits(hidden, weight, scale=1.0):
    logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    current.kernel("mm", ())
    return logits if scale == 1.0 else logits.mul_(scale)


def add_product(total, a, b, scale):
    current.kernel("addmm", ())


current = Count()


@contextmanager
def counting():
    """Operators on fake tensors are counted. Yields the Count."""
    global current
    current = Count()
    functional = "torch.nn.functional."
    patches = {
        functional + "scaled_dot_product_attention": attention,
        functional + "rms_norm": lambda x, shape, weight, eps: NORM(x, weight),
        "kv_cache.decode_attention": decode_attention,
        "kernels.head.fused_loss": fused_loss,
        "kernels.head.head_logits": head_logits,
        "kernels.head.add_product": add_product,
        "generate.head_logits": head_logits,
        "kernels.head.uses_triton": lambda tensor: True,
        "kv_cache.uses_triton": lambda tensor: True,
    }
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(current)
        yield current


AttentionInterface.register(
    "counted", lambda module, q, k, v, mask, **kwargs: (attention(q, k, v).transpose(1, 2), None)
)


# ---- what a role launches ---------------------------------------------------------------------


@cache
def counted(path: str, config: Config) -> Counted:
    """The kernels of the model at `path`: as a student that decodes and trains, as a teacher."""
    plain = plain_norms(settings_of(path))
    with FakeTensorMode(allow_non_fake_inputs=True):
        return Counted(
            of_step(build(path, plain, "kv_slots"), config),
            of_forward(build(path, plain, "counted")),
            of_scoring(build(path, plain, "counted"), config),
            of_training(build(path, plain, "counted"), config),
        )


def settings_of(path: str):
    """A mixture of experts as the dense model that a token sees."""
    settings = AutoConfig.from_pretrained(path).get_text_config()
    if hasattr(settings, "mlp_only_layers"):
        settings.mlp_only_layers = list(range(settings.num_hidden_layers))
        settings.intermediate_size = settings.num_experts_per_tok * settings.moe_intermediate_size
    return settings


def plain_norms(settings):
    """The classes of norms that model.fuse_norms fuses. It compares numbers, so it needs some."""
    modules = empty_model(settings, "meta").modules()
    found = {type(m) for m in modules if type(m).__name__.endswith("RMSNorm")}
    return {kind for kind in found if is_rms_norm(drawn(kind))}


def empty_model(settings, device):
    with torch.device(device), no_init_weights():
        return AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)


def drawn(kind):
    norm = kind(16)
    if getattr(norm, "weight", None) is not None:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm


def build(path: str, plain: set, attention: str):
    """The model in bfloat16, without data, with fused norms."""
    model = empty_model(settings_of(path), "cpu")
    model.set_attn_implementation(attention)
    model.eval().requires_grad_(False)
    with mock.patch("model.is_rms_norm", lambda norm: type(norm) in plain):
        fuse_norms(model)
    return model


def of_step(model, config: Config):
    """One decode step. Two numbers of slots tell what grows with them."""
    vocab, found = len(head_weight(model)), []
    for slots in (32, 64):
        generator = Generator(model, make_loss(config), config, set(), vocab, slots)
        with counting(), torch.no_grad():
            generator.decode(slots)  # makes the cache
        with counting() as count, torch.no_grad():
            generator.decode(slots)
        found.append(count)
    few, many = found
    return Kernels(many.launches, (many.bytes - few.bytes) / 32)


def of_forward(model):
    """One forward pass without the head: a prefill, or recomputing."""
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    with counting() as count, torch.no_grad():
        last_hidden(model, ids)
    return Kernels(count.launches, count.bytes / TOKENS)


def of_scoring(model, config: Config):
    """One forward pass of the teacher, with what it looks up."""
    teacher = Teacher(model, config, len(head_weight(model)))
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    wanted = torch.zeros(TOKENS, config.num_candidates, dtype=torch.int32)
    with counting() as count, torch.no_grad():
        teacher.look_up(last_hidden(model, ids)[0], wanted)
    return Kernels(count.launches, count.bytes / TOKENS)


def of_training(model, config: Config):
    """One forward and backward pass of the learner, as on several ranks: all in bfloat16."""
    model.requires_grad_(True)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    shape = TOKENS, config.num_candidates
    wanted = torch.zeros(shape, dtype=torch.int64)
    logp = torch.zeros(shape)
    with counting() as count:
        hidden = last_hidden(model, ids)[0]
        settings = make_loss(config), 1.0, config.head_chunk
        candidate_loss(hidden, head_weight(model), wanted, logp, logp, *settings)[0].backward()
    return Kernels(count.launches, count.bytes / TOKENS)


# ---- the command line -------------------------------------------------------------------------


def main():
    try:
        config = parse(["--prompts=builtin", *sys.argv[1:]])
        paths = {"student": config.path("student")}
        paths |= {f"teacher {name}".strip(): path for name, path in config.teacher_paths.items()}
        for name, path in paths.items():
            found = counted(path, config)
            print(f"{name}, {path}:")
            for what, kernels in vars(found).items():
                item = "slot" if what == "step" else "token"
                mega = kernels.bytes / 1e6
                print(f"  {what:8s} {kernels.launches:6,.0f} launches, {mega:.2f} MB a {item}")
    except InputError as error:
        sys.exit(f"experiments.count: error: {error}")


if __name__ == "__main__":
    main()
