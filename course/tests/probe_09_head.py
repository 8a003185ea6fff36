"""Exercise 9: the chunked head. The loss here, sum_k e^b (s - t)^2, is that of no exercise."""

import weakref
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SQUARES = SimpleNamespace(value=lambda s, t, b: ((s - t).square() * b.exp()).sum(-1))
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "addmv_")


def chunk_loss(logits, ids, t, b, dtype: str):
    """unfused_loss on one chunk.

    `in_place`: the gradient stands where the logits were. `has_graph`: which results have one.
    """
    from kernels.head import unfused_loss

    logits = logits.clone()
    value, s, gradient = unfused_loss(SQUARES, logits, ids, t, b, getattr(torch, dtype))
    in_place = gradient.data_ptr() == logits.data_ptr()
    found = {"value": value, "s": s, "gradient": gradient}
    has_graph = [name for name, one in found.items() if one.requires_grad]
    found = {name: one.detach() for name, one in found.items()}
    return found | {"in_place": in_place, "has_graph": has_graph}


def head_loss(hidden, weight, ids, t, b, scale, chunk, factor=1.0, times=1):
    """candidate_loss, and the gradients of `factor` times its total, computed `times` times."""
    from kernels.head import candidate_loss

    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, logp = candidate_loss(hidden, weight, ids, t, b, SQUARES, scale, chunk)
    for _ in range(times):
        both = torch.autograd.grad(factor * total, (hidden, weight), retain_graph=True)
    return {
        "total": total.detach(),
        "student_logp": logp.detach(),
        "grad_hidden": both[0],
        "grad_weight": both[1],
        "logp_has_graph": logp.requires_grad,
    }


class Work(TorchDispatchMode):
    """Watches all operations for tables: tensors that have a column for each of `vocab` ids.

    `multiplications`: of all matrix products. `largest`: rows of the largest table. `held`: the
    most rows that existed at one time, in all tables together.
    """

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.vocab = vocab
        self.width = width
        self.multiplications = 0
        self.largest = 0
        self.held = 0
        self.alive = {}  # address -> (its storage, rows)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in PRODUCTS:
            factors = [one for one in args if isinstance(one, torch.Tensor)]
            self.multiplications += result.numel() * factors[-2].shape[-1]
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.look_at(one)
        return result

    def look_at(self, tensor):
        if self.vocab not in tensor.shape or self.width in tensor.shape:
            return  # the weight, or no table
        rows = tensor.numel() // self.vocab
        self.largest = max(self.largest, rows)
        storage = tensor.untyped_storage()
        self.alive[storage.data_ptr()] = (weakref.ref(storage), rows)
        del storage
        self.alive = {at: one for at, one in self.alive.items() if one[0]() is not None}
        self.held = max(self.held, sum(rows for _, rows in self.alive.values()))


def head_work(hidden, weight, ids, t, b, chunk):
    """What candidate_loss and its backward pass take, as Work counts it."""
    from kernels.head import candidate_loss

    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with Work(*weight.shape) as work:
        total, _ = candidate_loss(hidden, weight, ids, t, b, SQUARES, 1.0, chunk)
        total.backward()
    names = ("multiplications", "largest", "held")
    return {name: getattr(work, name) for name in names}
