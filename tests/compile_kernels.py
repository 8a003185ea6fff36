"""Compile every kernel ahead of time, no GPU needed; one line each:
kernel, target, shape, registers, spilled bytes.

`python tests/compile_kernels.py`. Exits with 1 if anything spills.
What it compiles is what `launch_shape` launches.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import shared  # noqa: E402
from kernels.forward_kl import forward_kl  # noqa: E402
from kernels.sampled_reverse_kl import sampled_reverse_kl  # noqa: E402
from kernels.sparse_reverse_kl import sparse_reverse_kl  # noqa: E402

POINTERS = {
    "ids": "*i64",
    **dict.fromkeys(("teacher_logp", "behavior_logp", "loss", "student_logp", "c"), "*fp32"),
}
SCALARS = dict.fromkeys(("V", "C", "first", "first_draw", "grad_stride"), "i32")
KERNELS = [
    (shared.loss_kernel, {"TERMS": terms})
    for terms in (forward_kl, sparse_reverse_kl, sampled_reverse_kl, shared.given)
]
# A launch makes constants of integers that are 1:
# the first top column of a loss with one draw, one candidate in all.
SPECIAL = [
    (shared.loss_kernel, {"TERMS": sampled_reverse_kl} | ones)
    for ones in ({"first": 1}, {"C": 1}, {"C": 1, "first_draw": 1, "first": 1})
]
SPECIAL += [
    (shared.loss_kernel, {"TERMS": terms, "first": 1}) for terms in (forward_kl, sparse_reverse_kl)
] + [(shared.loss_kernel, {"TERMS": shared.given, "C": 1})]
# Logits, gradient, V, C
CASES = [
    ("*fp32", "*bf16", 151936, 64),
    ("*bf16", "*bf16", 151936, 256),
    ("*fp32", "*fp32", 151936, 256),
]
CASES += [("*bf16", "*bf16", 173, 256), ("*fp32", "*bf16", 173, 1)]


def compile_kernel(
    kernel, arch: int, logits: str, grad: str, vocab: int, candidates: int, constants: dict
):
    shape = shared.launch_shape(vocab, candidates)
    options = {"num_warps": shape.pop("num_warps")}
    constants, names = shape | constants, kernel.arg_names
    types = (
        POINTERS
        | SCALARS
        | {"logits": logits, "grad": grad}
        | dict.fromkeys(constants, "constexpr")
    )
    aligned = [
        name
        for name in names
        if types[name].startswith("*") or name in ("V", "grad_stride") and vocab % 16 == 0
    ]
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(ptx: str, arch: int) -> tuple[int, int]:
    """(registers a thread, bytes spilled), as ptxas reports them."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        report = subprocess.run(
            [ptxas, "-v", target, file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return int(re.search(r"Used (\d+) registers", report)[1]), sum(
        map(int, re.findall(r"(\d+) bytes spill", report))
    )


def main():
    spilled = 0
    for arch, (logits, grad, vocab, candidates) in [(80, case) for case in CASES[:2]] + [
        (90, case) for case in CASES
    ]:
        for kernel, constants in KERNELS + SPECIAL * (candidates in (1, 64) and arch == 90):
            compiled = compile_kernel(kernel, arch, logits, grad, vocab, candidates, constants)
            registers, bytes_spilled = resources(compiled.asm["ptx"], arch)
            spilled += bytes_spilled
            print(
                kernel.__name__,
                *(getattr(value, "__name__", f"{name}=1") for name, value in constants.items()),
                f"sm_{arch}",
                logits,
                grad,
                vocab,
                candidates,
                registers,
                bytes_spilled,
            )
    sys.exit(spilled > 0)


if __name__ == "__main__":
    main()
