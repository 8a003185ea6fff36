"""The chunked LM head and its kernel against the alternatives.

    python -m benchmarks.kernels [--json FILE]

Letters of shapes: serial.py. Forward + backward of one loss over T positions, hidden states
bfloat16 on a GPU (float32 without one), float32 master weight:

  ours         kernels/head.py, with the Triton kernel on a GPU
  products     the three matrix products alone, unchunked, with the true gradient of the logits:
               the reference
  full logits  plain torch: [T,V] logits, log_softmax, autograd
  recompute    plain torch in chunks that are computed again in the backward pass
               (torch.utils.checkpoint)
  liger ...    Liger's fused linear JSD and cross entropy, where liger-kernel is installed:
               other losses, same products

Times are medians; memory is the peak above what the inputs take (on a CPU: of the resident size).
On a GPU also the kernel alone: bytes of one read of the logits and one write of the gradient over
its time, as a fraction of the copy bandwidth measured beside it. --rounding compares the errors of
float32 and bfloat16 logits instead, in plain torch, with the GPU's dtypes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import triton
from torch.utils.checkpoint import checkpoint

from kernels import head
from kernels.head import candidate_loss
from kernels.terms import TERMS
from losses import LOSSES, make_loss
from support.config import builtin

# T, F, V, C
SHAPES = [
    (8192, 1024, 151936, 64),
    (8192, 2048, 151936, 64),
    (16384, 4096, 128256, 64),
    (4096, 896, 49152, 32),
]
CPU_SHAPES = [(1024, 128, 8192, 32), (2048, 64, 4096, 16)]
GPU = torch.cuda.is_available()


def problem(T: int, F: int, V: int, C: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden states and candidates of a nearby model.

    The hidden states point at a token with varying decision, so that entropies vary.
    """
    torch.manual_seed(0)
    device = "cuda" if GPU else "cpu"
    weight = torch.randn(V, F, device=device) * (2.5 / F**0.5)
    hidden = (
        torch.randn(T, F, device=device)
        + (3 * torch.rand(T, 1, device=device)) * weight[torch.randint(V, (T,), device=device)]
    ).to(dtype)
    ids, t, b = (
        torch.empty(T, C, dtype=kind, device=device)
        for kind in (torch.int64, torch.float32, torch.float32)
    )
    for rows, logits in head.logit_chunks(hidden, weight.to(dtype), 1.0, 512):
        behavior = (logits + 0.1 * torch.randn_like(logits)).log_softmax(-1)
        ids[rows] = torch.multinomial(behavior.exp(), C, replacement=True)
        b[rows] = behavior.gather(1, ids[rows])
        t[rows] = b[rows] + 0.3 * torch.randn_like(b[rows])
    return [hidden.requires_grad_(), weight.requires_grad_(), ids, t, b]


def ours(config, chunk):
    loss = make_loss(config)
    return lambda *tensors: candidate_loss(*tensors, loss, 1.0, chunk)[0].backward()


def products(config, chunk):
    """The gradient of the logits is made once, in the first call:
    most of it is tiny, which matters to a GPU's clock."""
    kept = {}

    def run(hidden, weight, *candidates):
        h, w = hidden.detach(), weight.detach().to(hidden.dtype)
        if not kept:
            kept["g"] = torch.empty(len(h), len(w), dtype=h.dtype, device=h.device)
            for rows, logits in head.logit_chunks(h, w, 1.0, chunk):
                kept["g"][rows] = head.unfused_loss(
                    make_loss(config), logits, *(x[rows] for x in candidates), h.dtype
                )[2]
        h @ w.t()
        kept["g"] @ w
        if GPU:
            torch.mm(kept["g"].t(), h, out_dtype=torch.float32)
        else:
            kept["g"].t() @ h

    return run


def on_logits(config, hidden, weight, ids, t, b):
    logits = (hidden @ weight.t()).float()
    return make_loss(config).value(logits.log_softmax(-1).gather(1, ids), t, b).sum()


def full_logits(config, chunk):
    return lambda hidden, weight, *candidates: on_logits(
        config, hidden, weight.to(hidden.dtype), *candidates
    ).backward()


def recompute(config, chunk):
    def run(hidden, weight, *candidates):
        parts, w = range(0, len(hidden), chunk), weight.to(hidden.dtype)
        total = sum(
            checkpoint(
                on_logits,
                config,
                hidden[i : i + chunk],
                w,
                *(x[i : i + chunk] for x in candidates),
                use_reentrant=False,
            )
            for i in parts
        )
        total.backward()

    return run


def liger_jsd(config, chunk):
    from liger_kernel.transformers import LigerFusedLinearJSD

    def run(hidden, weight, *_):
        w = weight.to(hidden.dtype)
        LigerFusedLinearJSD(jsd_beta=1.0)(
            hidden, w, hidden.detach() * 0.9, w.detach(), None
        ).backward()

    return run


def liger_cross_entropy(config, chunk):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return lambda hidden, weight, ids, *_: LigerFusedLinearCrossEntropyLoss()(
        weight.to(hidden.dtype), hidden, ids[:, 0].contiguous()
    ).backward()


VARIANTS = {
    "ours": ours,
    "products": products,
    "full logits": full_logits,
    "recompute": recompute,
    "liger JSD": liger_jsd,
    "liger cross entropy": liger_cross_entropy,
}


def seconds(call, repeats: int, before=lambda: None) -> float:
    """Median seconds of `call`, each after `before`, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        before()
        if GPU:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def peak_mib(call) -> float:
    """Highest memory during `call` above that before it: allocated on a GPU, resident on a CPU."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library keeps would hide the peak
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    call()
    return (int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 2**10


def kernel_alone(config, inputs, chunk: int, repeats: int) -> dict:
    """The fused kernel on one chunk of logits, and a copy of the same buffer:
    bytes moved per second."""
    hidden, weight, ids, t, b = (
        x.detach()[:chunk] if i != 1 else x.detach() for i, x in enumerate(inputs)
    )
    source = head.head_logits(hidden, weight.to(hidden.dtype), 1.0)
    buffer, loss = torch.empty_like(source), make_loss(config)
    copy = seconds(lambda: buffer.copy_(source), repeats)
    kernel = lambda: head.loss_and_gradient(loss, buffer, ids, t, b, hidden.dtype)  # noqa: E731
    alone = seconds(kernel, repeats, before=lambda: buffer.copy_(source))
    bandwidth = 2 * source.nbytes / copy
    moved = source.nbytes + source.numel() * hidden.element_size()
    return {
        "kernel_ms": alone * 1e3,
        "copy_gb_per_s": bandwidth / 1e9,
        "kernel_of_copy_bandwidth": moved / alone / bandwidth,
    }


def measure(shape, config, chunk: int, repeats: int) -> list[dict]:
    T, F, V, C = shape
    inputs = problem(*shape, torch.bfloat16 if GPU else torch.float32)
    rows, gradients = [], {}
    for name, variant in VARIANTS.items():
        row = {"tokens": T, "hidden": F, "vocab": V, "candidates": C, "variant": name}
        try:
            run = variant(config, chunk)
        except ImportError:
            print(f"{name:20s} not measured: liger-kernel is not installed")
            continue

        def call():
            inputs[0].grad = inputs[1].grad = None
            run(*inputs)

        try:
            call()
            # Or the peak would be counted from above what a call starts with.
            inputs[0].grad = inputs[1].grad = None
            row["peak_mib"] = peak_mib(call)
            if name in ("ours", "full logits"):
                gradients[name] = inputs[1].grad
            row["ms"] = 1e3 * seconds(call, repeats)
        except torch.cuda.OutOfMemoryError:
            row["out_of_memory"] = True
        except RuntimeError as error:  # of somebody else's kernels
            if not name.startswith("liger"):
                raise
            print(f"{name:20s} failed: {error}")
            continue
        rows.append(row)
    if len(gradients) == 2:
        rows[0]["gradient_against_full_logits"] = float(
            (gradients["ours"] - gradients["full logits"]).norm() / gradients["full logits"].norm()
        )
    del gradients
    floor = next(row["ms"] for row in rows if row["variant"] == "products")
    for row in rows:
        figures = "out of memory"
        if "ms" in row:
            figures = (
                f"{row['ms']:9.2f} ms  {row['ms'] / floor:5.2f} of the products  "
                f"{row['peak_mib']:9.0f} MiB"
            )
        print(f"{row['variant']:20s} {figures}", flush=True)
    if GPU and type(make_loss(config)) in TERMS:
        rows[0] |= kernel_alone(config, inputs, chunk, repeats)
        print(
            f"the kernel alone: {rows[0]['kernel_of_copy_bandwidth']:.0%} of the copy bandwidth, "
            f"{rows[0]['copy_gb_per_s']:.0f} GB/s",
            flush=True,
        )
    return rows


def rounding(config, shape=(64, 512, 151936, 64)) -> list[dict]:
    """Errors that the dtype of the logits and of their gradient add,
    against float64 on the same bfloat16 inputs.

    In plain torch: the logits are rounded as a GPU's product would round them,
    the rest is as in kernels/head.py.
    """
    hidden, weight, ids, t, b = (x.detach() for x in problem(*shape, torch.bfloat16))
    weight = weight.bfloat16()
    z = (hidden.double() @ weight.double().t()).requires_grad_()
    s = z.log_softmax(-1).gather(1, ids)
    (g,) = torch.autograd.grad(make_loss(config).value(s, t.double(), b.double()).sum(), z)
    exact = s.detach(), g @ weight.double(), g.t() @ hidden.double()
    results = []
    for logits_dtype, gradient_dtype in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ):
        logits = (hidden.float() @ weight.float().t()).to(logits_dtype).float()
        _, student_logp, gradient = head.unfused_loss(
            make_loss(config), logits, ids, t, b, gradient_dtype
        )
        gradient = gradient.double()
        actual = student_logp.double(), gradient @ weight.double(), gradient.t() @ hidden.double()
        error = [float((a - e).norm() / e.norm()) for a, e in zip(actual, exact)]
        logp_error = actual[0] - exact[0]
        row = {
            "logits": str(logits_dtype)[6:],
            "gradient": str(gradient_dtype)[6:],
            "logp_error_max_nats": float(logp_error.abs().max()),
            "logp_error_rms_nats": float(logp_error.square().mean().sqrt()),
            "grad_hidden_error": error[1],
            "grad_weight_error": error[2],
        }
        results.append(row)
        print(
            "  ".join(
                f"{k} {v:.2e}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            ),
            flush=True,
        )
    return results


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", choices=LOSSES, default="sampled_reverse_kl")
    parser.add_argument(
        "--chunk",
        type=int,
        default=builtin().head_chunk,
        help="positions whose logits exist at once",
    )
    parser.add_argument(
        "--logits",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the logits of `ours` on a GPU",
    )
    parser.add_argument("--repeats", type=int, default=20 if GPU else 5)
    parser.add_argument(
        "--rounding",
        action="store_true",
        help="errors of float32 and bfloat16 logits instead of times",
    )
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    head.LOGITS_DTYPE = getattr(torch, args.logits)
    device = (
        torch.cuda.get_device_name()
        if GPU
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(
        f"{device}; torch {torch.__version__}, triton {triton.__version__}; "
        f"{args.loss}, chunk {args.chunk}, {args.logits} logits"
    )
    if args.rounding:
        results = rounding(builtin(loss=args.loss, top_k=64, num_samples=64))
    else:
        results = []
        for shape in SHAPES if GPU else CPU_SHAPES:
            print("\ntokens {}, hidden {}, vocabulary {}, candidates {}".format(*shape))
            # The candidates are the emitted token, a top-K and tail draws.
            one = args.loss == "stratified_reverse_kl"
            top_k = shape[3] - (9 if one else args.loss != "sampled_reverse_kl")
            config = builtin(loss=args.loss, top_k=top_k, num_samples=8 if one else shape[3])
            chunk = args.chunk if GPU else args.chunk // 4
            results += measure(shape, config, chunk, args.repeats)
        if not GPU:
            print(
                "\nno GPU: small shapes, plain torch, float32; "
                "the Triton kernels and Liger were not measured"
            )
    if args.json:
        record = {
            "device": device,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "loss": args.loss,
            "chunk": args.chunk,
            "logits": args.logits,
        }
        Path(args.json).write_text(json.dumps(record | {"results": results}, indent=1))


if __name__ == "__main__":
    main()
