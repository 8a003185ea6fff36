"""Compile every kernel ahead of time, without a GPU: `python tests/compile_kernels.py`.

One line each: kernel, target, shape, registers, spilled bytes and, for the decode kernel, bytes of
shared memory. Exits with 1 if anything but WIDE spills, or if a decode kernel wants more than
SHARED.
What it compiles is what `launch_shape` launches.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import decode_attention  # noqa: E402
from kernels.fused_loss import launch_shape, loss_kernel  # noqa: E402
from kernels.terms import TERMS, given, sampled_reverse_kl  # noqa: E402

POINTERS = {
    "ids": "*i64",
    **dict.fromkeys(("teacher_logp", "behavior_logp", "loss", "student_logp", "c"), "*fp32"),
}
SCALARS = dict.fromkeys(("V", "C", "first", "first_draw", "grad_stride"), "i32")
FUNCTIONS = [*dict.fromkeys(TERMS.values()), given]
CONSTANTS = [{"TERMS": terms} for terms in FUNCTIONS]
# A launch makes constants of integers that are 1: the first top column of a loss with one draw, one
# candidate in all.
SPECIAL = [
    {"TERMS": sampled_reverse_kl} | ones
    for ones in ({"first": 1}, {"C": 1}, {"C": 1, "first_draw": 1, "first": 1})
]
SPECIAL += [{"TERMS": terms, "first": 1} for terms in FUNCTIONS[:2]]
SPECIAL += [{"TERMS": given, "C": 1}]
# Logits, gradient, V, C
CASES = [
    ("*fp32", "*bf16", 151936, 64),
    ("*bf16", "*bf16", 151936, 256),
    ("*fp32", "*fp32", 151936, 256),
]
CASES += [("*bf16", "*bf16", 173, 256), ("*fp32", "*bf16", 173, 1)]


# The decode kernel: group, size of a key, of a value.
HEADS = [(1, 64, 64), (2, 128, 128), (16, 128, 128), (4, 80, 80), (16, 256, 256), (16, 192, 128)]
WIDE = [(8, 512, 512), (48, 128, 128), (24, 256, 256)]  # like Gemma 4 and StarCoder
SHARED = 101_376  # bytes of shared memory that a program may have on sm_86 and sm_89


def compile_kernel(arch: int, logits: str, grad: str, vocab: int, columns: int, constants: dict):
    shape = launch_shape(vocab, columns)
    types = POINTERS | SCALARS | {"logits": logits, "grad": grad}
    by_16 = ("V", "grad_stride") if vocab % 16 == 0 else ()
    return compile_for(arch, loss_kernel, types, by_16, shape | constants)


def compile_decode(arch: int, kind: str, heads, constants: dict):
    dtype = {"*fp32": torch.float32, "*bf16": torch.bfloat16}[kind]
    shape = decode_attention.launch_shape(*heads, dtype)
    types = dict.fromkeys(("query", "keys", "values", "out"), kind) | {"position": "*i64"}
    types |= {"scale": "fp32", "window": "i32", "L": "i32"}
    return compile_for(arch, decode_attention.decode_kernel, types, ("L",), shape | constants)


def compile_for(arch: int, kernel, types: dict, by_16, constants: dict):
    """`types` of the arguments, those that are divisible by 16, constants with num_warps."""
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    names = kernel.arg_names
    types = types | dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if types[name].startswith("*") or name in by_16]
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in aligned
            if types[name] != "constexpr"
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled, arch: int) -> tuple[int, int]:
    """(registers a thread, bytes spilled), as ptxas reports them."""
    name = "ptxas-blackwell" if arch >= 100 else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", target, file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", report)))


def compiled_line(job) -> tuple[str, int]:
    """What `main` prints of one of `jobs`, and how many bytes are too many in it."""
    name, arch, case, number = job
    if name == "loss_kernel":
        constants = (CONSTANTS + SPECIAL)[number]
        registers, spilled = resources(compile_kernel(arch, *case, constants), arch)
        words = [getattr(x, "__name__", f"{key}=1") for key, x in constants.items()]
        return " ".join(map(str, (name, *words, f"sm_{arch}", *case, registers, spilled))), spilled
    heads, kind = case
    # A window of 1 becomes a constant, and so does a cache of one position.
    ones = ({}, {"window": 1}, {"window": 1, "L": 1})[number]
    compiled = compile_decode(arch, kind, heads, ones)
    registers, spilled = resources(compiled, arch)
    shared = compiled.metadata.shared
    words = (name, *heads, *ones, f"sm_{arch}", kind, registers, spilled, shared)
    # Wide float32 heads do spill.
    return " ".join(map(str, words)), spilled * (heads in HEADS) + max(0, shared - SHARED)


def jobs(wanted: list[int]) -> list[tuple]:
    """(kernel, architecture, its case, number of its constants) of everything to compile."""
    cases = [(80, case) for case in CASES[:2]] + [(90, case) for case in CASES]
    cases += [(100, case) for case in CASES[:2]]
    found = []
    for arch, case in [(arch, case) for arch, case in cases if arch in wanted]:
        special = len(SPECIAL) if arch == 90 and case[-1] == 64 else 0
        numbers = range(len(CONSTANTS) + special)
        found += [("loss_kernel", arch, case, number) for number in numbers]
    for arch, kind, heads in itertools.product(wanted, ("*bf16", "*fp32"), HEADS + WIDE):
        numbers = range(3 if heads == HEADS[1] else 1)
        found += [("decode_kernel", arch, (heads, kind), number) for number in numbers]
    return found


def main():
    wanted = [int(name) for name in sys.argv[1:]] or [80, 90, 100]  # architectures
    too_many = 0
    with ProcessPoolExecutor() as pool:
        for line, more in pool.map(compiled_line, jobs(wanted)):
            print(line)
            too_many += more
    sys.exit(too_many > 0)


if __name__ == "__main__":
    main()
