"""A GPU that is not there: tensors on the CPU that claim to be on `cuda:0`.

So the whole GPU path runs in a test.

    with pretended_gpu() as gpu:
        ...     # torch.device("cuda") works: factories, .to, autocast, CUDA graphs, Triton launches
    gpu.waits   # {"file.py:function what": count}: what made the host wait for the device

It refuses operators on tensors of both devices, products in float64, and whatever makes the host
wait while a graph is captured. A capture executes nothing. A replay first overwrites all memory
that captures allocated, so that a tensor made inside a capture and used after it is seen. Triton
kernels run in the interpreter. Not covered: time, memory, races, streams, NCCL, cuBLAS's own
rounding; autocast has the CPU's list of operators.
"""

import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import kv_cache
from kernels import head

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT, *(ROOT / folder for folder in ("kernels", "support", "experiments"))]
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
SYNCHRONISING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
}
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}


class OnGpu(torch.Tensor):
    """A tensor whose numbers lie in `self.host`."""

    @staticmethod
    def __new__(cls, host):
        layout = dict(dtype=host.dtype, strides=host.stride(), storage_offset=host.storage_offset())
        return cls._make_wrapper_subclass(cls, host.shape, **layout)

    def __init__(self, host):
        self.host = host

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return CUDA
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func == torch.Tensor.data.__set__:
            args[0].host = args[1].host
            return None
        if name in ("cpu", "tolist", "numpy"):
            here = current.move(args[0], "cpu")
            return here if name == "cpu" else getattr(here, name)()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return current.dispatch(func, args, kwargs or {})


def host_of(x):
    return x.host if isinstance(x, OnGpu) else x


def storages(tree):
    """{address: storage} of all tensors in a tree."""
    tensors = [host_of(x) for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}


class Gpu:
    def __init__(self):
        self.waits = Counter()
        self.capturing = None  # a Graph
        self.graphs = []

    def wait(self, what):
        frames = [f for f in traceback.extract_stack() if Path(f.filename).parent in SOURCES]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
        assert not self.capturing, f"{place} {what} while a graph is captured"
        self.waits[f"{place} {what}"] += 1

    def move(self, tensor, device):
        to_gpu = torch.device(device).type == "cuda"
        if to_gpu == isinstance(tensor, OnGpu):
            return tensor
        self.wait("to device" if to_gpu else "to host")
        return OnGpu(tensor.detach().clone()) if to_gpu else tensor.detach().host.clone()

    def compute(self, func, args, kwargs):
        """Run on the host, unless a graph records it too."""
        return (
            self.capturing.record(func, args, kwargs) if self.capturing else run(func, args, kwargs)
        )

    def dispatch(self, func, args, kwargs):
        packet = getattr(func, "overloadpacket", None)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        strangers = [x for x in tensors if not isinstance(x, OnGpu)]
        if packet is aten.copy_ and strangers:
            self.wait("to device" if isinstance(args[0], OnGpu) else "to host")
        elif packet in (
            aten.index,
            aten.index_put,
            aten.index_put_,
            aten._index_put_impl_,
        ) and isinstance(args[0], OnGpu):
            indices = [i for i in args[1] if i is not None]
            for _ in (i for i in indices if not isinstance(i, OnGpu)):
                self.wait("index on the host")
            strangers = [x for x in strangers if not any(x is i for i in indices)]
        if packet is not aten.copy_:
            assert all(x.dim() == 0 for x in strangers), f"{func} of tensors on both devices"
        assert packet not in PRODUCTS or not any(x.dtype == torch.float64 for x in tensors), (
            f"{func} in float64"
        )
        if packet in SYNCHRONISING:
            self.wait(packet.__name__)
        out = self.compute(func, tree_map(host_of, args), tree_map(host_of, kwargs))
        known = {id(host_of(x)): x for x in tensors}
        return tree_map_only(
            torch.Tensor, lambda x: known.get(id(x)) if id(x) in known else OnGpu(x), out
        )


def run(func, args, kwargs):
    """An operator on the host.

    Products with another output dtype exist on CUDA alone: summed in float32, rounded once.
    """
    if func is aten.mm.dtype:
        a, b, dtype = args
        assert a.dtype == b.dtype == torch.bfloat16 and dtype in (torch.bfloat16, torch.float32), (
            "dtypes of a product"
        )
        return (a.float() @ b.float()).to(dtype)
    if func is aten.addmm.dtype_out:
        total, a, b, dtype = args
        kinds = (a.dtype, b.dtype, total.dtype, dtype, kwargs["out"].dtype)
        assert kinds == (
            torch.bfloat16,
            torch.bfloat16,
            torch.float32,
            torch.float32,
            torch.float32,
        ), "dtypes of a product"
        return kwargs["out"].copy_(total + kwargs.get("alpha", 1) * (a.float() @ b.float()))
    return func(*args, **kwargs)


class Graph:
    """torch.cuda.CUDAGraph: operators with their host tensors."""

    def __init__(self):
        self.steps, self.made, self.before = [], {}, {}
        current.graphs.append(self)

    def pool(self):
        return self

    def record(self, func, args, kwargs):
        for place, storage in storages((args, kwargs)).items():
            if place not in self.made and place not in self.before:
                # Whatever the operator writes is undone after the capture.
                self.before[place] = storage, storage.clone()
        out = run(func, args, kwargs)
        self.made |= {
            place: storage
            for place, storage in storages(out).items()
            if place not in storages((args, kwargs))
        }
        self.steps.append((func, args, kwargs, out))
        return out

    def replay(self):
        for graph in current.graphs:
            for storage in graph.made.values():
                storage.fill_(0xFF)
        for func, args, kwargs, out in self.steps:
            again = tree_leaves(run(func, args, kwargs))
            for new, old in zip(again, tree_leaves(out)):
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)

    @contextmanager
    def capture(self, pool=None):
        current.capturing = self
        try:
            yield
        finally:
            current.capturing = None
        for storage, content in self.before.values():
            storage.copy_(content)


class Factories(TorchFunctionMode):
    """`device=cuda` in factories, and `.to`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        names = [*args, kwargs.get("device")] if func is torch.Tensor.to else [kwargs.get("device")]
        places = [
            x
            for x in names
            if isinstance(x, torch.device) or x in ("cpu", "cuda") and isinstance(x, str)
        ]
        to_gpu = bool(places) and torch.device(places[0]).type == "cuda"
        if func is torch.Tensor.to and places and (to_gpu or isinstance(args[0], OnGpu)):
            kinds = [x for x in (*args, kwargs.get("dtype")) if isinstance(x, torch.dtype)]
            moved = current.move(args[0], places[0])
            return moved.to(*kinds) if kinds else moved
        if not to_gpu:
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            current.wait("to device")
        return OnGpu(current.compute(func, args, kwargs | {"device": "cpu"}))


def launched(launch):
    """A function that launches a kernel, for tensors on the device. A graph records the launch."""

    def run_kernel(*args):
        assert all(
            isinstance(x, OnGpu) for x in tree_leaves(args) if isinstance(x, torch.Tensor)
        ), "a kernel gets tensors on both devices"
        out = current.compute(launch, tree_map(host_of, args), {})
        return tree_map_only(torch.Tensor, OnGpu, out)

    return run_kernel


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(x, OnGpu) for x in tree_leaves((args, kwargs))):
            return current.dispatch(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


current = Gpu()


@contextmanager
def pretended_gpu():
    global current
    current = Gpu()
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    patches = {
        "torch.autocast": lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs),
        "torch.is_autocast_enabled": lambda kind="cpu": enabled("cpu"),
        "torch.cuda.CUDAGraph": Graph,
        "torch.cuda.graph": Graph.capture,
        "kernels.head.fused_loss": launched(head.fused_loss),
        "kv_cache.decode_attention": launched(kv_cache.decode_attention),
    }
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.enter_context(Dispatch())
        stack.enter_context(Factories())
        yield current
