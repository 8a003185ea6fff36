"""Drive Triton's own launch with a driver that is not there: `python tests/launch_kernels.py`.

Everything from kernels/head.py and kv_cache.py down to the driver is real: Triton binds the
arguments, specialises them, compiles for sm_90 and assembles the code. What the driver is handed
goes no further. It needs no GPU. Prints an object of JSON for each loss and for each decode step,
with what was launched.
"""

import json
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kv_cache
from kernels import head
from losses import make_loss
from support.config import builtin

ROWS, VOCAB = 3, 151_936
CONFIGS = {
    "forward_kl": builtin(loss="forward_kl"),
    "sparse_reverse_kl": builtin(loss="sparse_reverse_kl"),
    "sampled_reverse_kl": builtin(loss="sampled_reverse_kl"),
    "one sample": builtin(loss="sampled_reverse_kl", num_samples=1),
    "stratified_reverse_kl": builtin(),
    "given": builtin(loss="sampled_rollout_ppo", plugin="experiments.corrections", num_samples=4),
}
# Decode steps: dtype, query heads of a key-value head, sizes of key and value, positions, window.
STEPS = {
    "bfloat16": (torch.bfloat16, 2, 128, 128, 2560, None),
    "float32": (torch.float32, 2, 128, 128, 2560, None),
    "odd sizes": (torch.bfloat16, 3, 80, 80, 2561, 100),
    "window of 16s": (torch.bfloat16, 4, 256, 256, 2560, 1024),
    "window of 1": (torch.bfloat16, 4, 256, 256, 2560, 1),
    "narrow values": (torch.bfloat16, 16, 192, 128, 2560, None),
}
HEADS, SLOTS = 8, 4


class Utils:
    """Loading a binary says which registers it wants. Nothing is loaded."""

    binaries = []

    def load_binary(self, name, binary, shared, device):
        self.binaries.append(binary)
        module, function, registers, spills, most_threads = 1, 2, 40, 0, 1024
        return module, function, registers, spills, most_threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    """In the place of the C function that calls cuLaunchKernel."""

    launches = []

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, grid_0, grid_1, grid_2, stream, function, *rest):
        names = self.source.fn.arg_names
        arguments = dict(zip(names, rest[-len(names) :]))
        self.launches.append(((grid_0, grid_1, grid_2), self, arguments))


class Driver:
    """What triton.runtime.JITFunction.run asks of a driver."""

    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def launch(loss):
    """One chunk through head.loss_and_gradient: its tensors, and what it launched."""
    C = loss.num_columns
    logits = torch.zeros(ROWS, VOCAB)
    ids, x = torch.zeros(ROWS, C, dtype=torch.int64), torch.full((ROWS, C), -1.0)
    before = len(Launcher.launches)
    gradient = head.loss_and_gradient(loss, logits, ids, x, x, torch.bfloat16)[2]
    (launched,) = Launcher.launches[before:]
    return launched, {"logits": logits, "ids": ids, "grad": gradient}


def step(dtype, group, key_size, value_size, length, window):
    """One layer of a decode step through kv_cache.Decode: its cache, and what it launched."""
    cache = kv_cache.KVCache(SLOTS, length)
    decode = kv_cache.Decode(cache, torch.tensor([length - 1, 0, 1]))
    query = torch.zeros(3, HEADS * group, 1, key_size, dtype=dtype)
    key, value = (torch.zeros(3, HEADS, 1, size, dtype=dtype) for size in (key_size, value_size))
    before = len(Launcher.launches)
    decode.attend(0, query, key, value, 0.1, window)
    (launched,) = Launcher.launches[before:]
    keys, values = cache.layers[0]
    return launched, {"keys": keys, "values": values, "position": decode.position}


def describe(launch, *arguments):
    """Launch twice. What the driver was handed, and whether the second launch compiled again."""
    (grid, launcher, passed), tensors = launch(*arguments)
    binaries = len(Utils.binaries)
    launch(*arguments)
    names = launcher.source.fn.arg_names
    return {
        "kernel": launcher.source.fn.__name__,
        "grid": grid,
        "target": launcher.metadata.target.arch,
        "warps": launcher.metadata.num_warps,
        "terms": getattr(passed.get("TERMS"), "__name__", None),
        "numbers": {key: x for key, x in passed.items() if isinstance(x, int)},
        "constants": [names[i] for (i,) in launcher.source.constants],
        "binary": Utils.binaries[-1][:4].hex(),
        "compiled_again": len(Utils.binaries) - binaries,
        "same_memory": [passed[key].data_ptr() == x.data_ptr() for key, x in tensors.items()],
    }


if __name__ == "__main__":
    driver.set_active(Driver())
    head.uses_triton = kv_cache.uses_triton = lambda tensor: True
    for name, config in CONFIGS.items():
        print(json.dumps({"name": name} | describe(launch, make_loss(config))))
    for name, sizes in STEPS.items():
        print(json.dumps({"name": name} | describe(step, *sizes)))
