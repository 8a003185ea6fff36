"""The first half hour with a GPU, unattended: `python -m benchmarks.first_gpu_day`.

Runs what has never run on a GPU, in order of worth. Each step is a process of its own with a limit
of time, so a hang or a crash costs one step. After every step results.json and results.md in --out
are written anew. `--pretend` runs every step here on a GPU that is not there
(tests/pretended_gpu.py, Triton's interpreter), on tiny models: its times mean nothing.

    tests             tests/test_gpu.py, and the kernels' tests on compiled kernels
    decode attention  the Triton kernel against attention over a mask: time, bytes, bits
    decode step       a step of a 0.6B model: CUDA graph or eager, norms fused or not, launches
    generation        the slot generator against model.generate on long-tailed lengths
    built-in task     train.py as shipped: accuracy, tokens/s; synchronous twice: equal bits?
    loss kernel       benchmarks.kernels
    model pair        0.6B student, 1.7B teacher, random weights: synchronous, staleness 1 and 4

docs/gpu-checklist.md says what to look at in the results, and what needs more than one GPU.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
import triton

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
LIMITS = {  # seconds
    "tests": 420,
    "decode attention": 120,
    "decode step": 180,
    "generation": 180,
    "built-in task": 300,
    "loss kernel": 240,
    "model pair": 360,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/first_gpu_day"))
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--minutes", type=float, default=30.0, help="no step begins after them")
    parser.add_argument("--pretend", action="store_true", help="without a GPU")
    parser.add_argument("--step", choices=LIMITS, help=argparse.SUPPRESS)  # in its own process
    args = parser.parse_args()
    if args.step:
        print(json.dumps(run_step(args.step, args.pretend)))
        return
    if not (args.pretend or torch.cuda.is_available()):
        sys.exit("first_gpu_day: error: no GPU is here: --pretend runs the steps without one")
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    record = {"machine": machine(), "steps": {}}
    for name in args.steps:
        left = 60 * args.minutes - (time.monotonic() - began)
        record["steps"][name] = watched(name, args.pretend, min(LIMITS[name], left))
        (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "results.md").write_text(as_markdown(record))
        print(f"{name}: {record['steps'][name]}", flush=True)
    failed = [name for name, found in record["steps"].items() if "error" in found]
    print(f"{args.out}/results.md; {len(failed)} of {len(args.steps)} steps failed {failed or ''}")
    sys.exit(bool(failed))


def machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (pretended)"
    names = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    names |= {"transformers": transformers.__version__, "python": platform.python_version()}
    return names | {"date": time.strftime("%Y-%m-%d")}


def watched(name: str, pretend: bool, limit: float):
    """One step in a process of its own: what it found, or {"error": ...}."""
    if limit <= 0:
        return {"error": "no time was left"}
    command = [sys.executable, "-m", "benchmarks.first_gpu_day", "--step", name]
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if pretend else None
    began = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    step = subprocess.Popen(
        command + ["--pretend"] * pretend,
        cwd=ROOT,
        env=environment,
        start_new_session=True,  # with all that it starts
        **pipes,
    )
    try:
        out, err = step.communicate(timeout=limit)
        found = json.loads(out.splitlines()[-1])
    except subprocess.TimeoutExpired:
        os.killpg(step.pid, signal.SIGKILL)
        _, err = step.communicate()
        found = {"error": f"not done after {limit:.0f} s. {err[-1000:]}".strip()}
    except (IndexError, ValueError):
        found = {"error": err[-1500:]}
    return found | {"seconds": round(time.monotonic() - began)}


def as_markdown(record):
    lines = ["# The first day on a GPU", ""]
    lines += [", ".join(f"{key} {value}" for key, value in record["machine"].items()), ""]
    lines += ["| step | what | value |", "|---|---|---|"]
    for name, found in record["steps"].items():
        for key, value in found.items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            shown = shown.replace("|", "/").replace("\n", "<br>")
            lines.append(f"| {name} | {key} | {shown} |")
    return "\n".join(lines) + "\n"


# ---- the steps --------------------------------------------------------------------------------


def run_step(name: str, pretend: bool):
    """What the step found: {name: number or text}."""
    sys.path.insert(0, str(ROOT / "tests"))
    function = {
        "tests": tests,
        "decode attention": decode_attention,
        "decode step": decode_step,
        "generation": generation,
        "built-in task": builtin_task,
        "loss kernel": loss_kernel,
        "model pair": model_pair,
    }[name]
    return function(pretend)


@contextmanager
def device(pretend: bool):
    """The pretended GPU, or the one that is there."""
    if pretend:
        from pretended_gpu import pretended_gpu
    with pretended_gpu() if pretend else nullcontext():
        yield


def milliseconds(call, repeats: int):
    """Of one call: the median of `repeats` groups of ten, so that starting one costs nothing."""
    is_real = torch.cuda.is_available()
    wait, group = (torch.cuda.synchronize, 10) if is_real else (lambda: None, 1)
    times = []
    for _ in range(repeats + 2):
        wait()
        began = time.perf_counter()
        for _ in range(group):
            call()
        wait()
        times.append(1e3 * (time.perf_counter() - began) / group)
    return statistics.median(times[2:])


def run(*command):
    """A command of the project; its output. Raises RuntimeError with the end of what it printed."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-1200:]}")
    return done.stdout


def tests(pretend):
    files = ["tests/test_decode_attention.py", "tests/test_kernels.py", "tests/test_gpu.py"]
    command = ["-m", "pytest", "-q", "-m", "gpu or not slow", *files]
    if pretend:
        command = ["-m", "pytest", "-q", "tests/test_pretended_gpu.py", "-k", "bfloat16 or missing"]
    return {"pytest": run(*command).strip().splitlines()[-1]}


def decode_attention(pretend):
    cases = [(64, 850, 2100), (128, 850, 2100), (4, 1500, 2100), (32, 6000, 14_000)]
    found = {}
    for case in [(3, 20, 40)] if pretend else cases:
        with device(pretend):
            slots, mean, longest = case
            for name, value in attention_case(slots, mean, longest, 2 if pretend else 8).items():
                found[f"{slots} slots of {mean}, longest {longest}: {name}"] = value
    return found


def attention_case(slots, mean, longest, heads):
    """One layer of Qwen3-0.6B: two query heads for each key-value head of size 128."""
    import kv_cache  # tests/pretended_gpu.py replaces its decode_attention
    from test_decode_attention import attention

    position = (torch.rand(slots) * 2 * (mean - 1)).long().clamp(max=longest - 1).to(CUDA)
    keys, values = (
        torch.randn(slots, heads, longest, 128, dtype=torch.bfloat16).to(CUDA) for _ in "12"
    )
    query = torch.randn(slots, heads, 2, 128, dtype=torch.bfloat16).to(CUDA)
    seen = (torch.arange(longest)[None] <= position.cpu()[:, None])[:, None, None].to(CUDA)

    def own():
        return kv_cache.decode_attention(query, keys, values, position, 0.09, None)

    def masked():
        return F.scaled_dot_product_attention(query, keys, values, seen, scale=0.09)

    first, again = own().cpu(), own().cpu()
    few = [x[:3].cpu() for x in (query, keys, values, position)]  # in float64, on the CPU
    error = first[:3].double() - attention(*few, 0.09, None)
    time_of_own, time_of_masked = milliseconds(own, 10), milliseconds(masked, 10)
    moved = 4 * 128 * heads * float(position.sum().cpu())
    return {
        "ms": time_of_own,
        "ms over a mask": time_of_masked,
        "GB/s of keys and values": moved / time_of_own / 1e6,
        "largest error": float(error.abs().max()),
        "equal bits": torch.equal(first, again),
    }


def save_model(path, hidden, layers, mlp, vocab=151_936):
    """A random Qwen3 with the tokenizer of the built-in task, whose ids it knows."""
    from assets.tokenizer import build_tokenizer

    torch.manual_seed(0)
    settings = transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=16 if hidden > 64 else 4,
        num_key_value_heads=8 if hidden > 64 else 2,
        head_dim=128 if hidden > 64 else 16,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.Qwen3ForCausalLM(settings).bfloat16()
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def small(pretend, path):
    """A model like Qwen3-0.6B."""
    sizes = (32, 2, 48, 173) if pretend else (1024, 28, 3072, 151_936)
    return save_model(path, *sizes)


def new_generator(path, config, pretend, slots):
    from generate import Generator
    from kv_cache import switch_to_slots
    from losses import make_loss
    from support.load import load_model

    model = load_model(path, torch.float32 if pretend else torch.bfloat16, CUDA)
    switch_to_slots(model, config.max_sequence)
    vocab = model.config.vocab_size
    return Generator(model, make_loss(config), config, set(), vocab, slots)


def decode_step(pretend):
    """Seconds of a full step, and what the profiler counts against experiments/count.py."""
    from channel import Rollout
    from support.config import builtin

    found = {}
    longest, slots = (24, 3) if pretend else (2100, 64)
    config = builtin(
        max_prompt_tokens=longest // 3, max_new_tokens=longest, micro_batch_tokens=2 * longest
    )
    with tempfile.TemporaryDirectory() as directory:
        path = small(pretend, directory)
        for norms in ("fused", "transformers'"):
            patch = mock.patch("support.load.fuse_norms") if norms != "fused" else nullcontext()
            with device(pretend), patch:
                generator = new_generator(path, config, pretend, slots)
                prompt = [5 + i % 100 for i in range(longest // 3)]
                generator.add([Rollout(prompt, ticket) for ticket in range(slots)])
                repeats = 3 if pretend else 5
                found[f"ms, graph, norms {norms}"] = milliseconds(generator.step, repeats)
                eager = milliseconds(lambda g=generator: g.decode(slots), repeats)
                found[f"ms, eager, norms {norms}"] = eager
                found[f"graphs, norms {norms}"] = len(generator.graphs)
                if not pretend:
                    found[f"kernels, norms {norms}"] = launches(lambda g=generator: g.decode(slots))
        if not pretend:
            from experiments.count import counted

            found["kernels, counted"] = counted(path, config).step.launches
    return found


def launches(call):
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.key_averages()  # also of the runtime, which launches them
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.count for e in on_gpu if not e.key.startswith(("Memcpy", "Memset")))


def generation(pretend):
    from benchmarks import generation as benchmark

    count, slots, longest = (6, 3, 12) if pretend else (256, 64, 512)
    drawn = torch.Generator().manual_seed(1)
    lengths = (40 * torch.randn(count, generator=drawn).exp()).long().clamp(1, longest).tolist()
    prompts = torch.randint(5, 100, (count, 9), generator=drawn).tolist()
    with tempfile.TemporaryDirectory() as directory:
        path = small(pretend, directory)
        with device(pretend):
            models = benchmark.load_models(path, CUDA, torch.float32 if pretend else torch.bfloat16)
            # The first time compiles, records graphs and sets libraries up.
            ours = benchmark.run_ours(models[0], prompts, slots, lengths, times=2)
            if pretend:  # model.generate looks at its tensors all the time
                return {"tokens/s": ours}
            benchmark.run_generate(models[1], prompts[:slots], slots, lengths[:slots])
            theirs = benchmark.run_generate(models[1], prompts, slots, lengths)
    return {"tokens/s": ours, "tokens/s of model.generate": theirs, "ratio": ours / theirs}


def train(*flags):
    """The records of a run of train.py."""
    with tempfile.TemporaryDirectory() as directory:
        run("train.py", f"--output-dir={directory}/run", *flags)
        text = Path(directory, "run", "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def tokens_per_second(records, skip):
    seconds = records[-1]["wall_seconds"] - records[skip - 1]["wall_seconds"]
    return sum(one["tokens"] for one in records[skip:]) / seconds


def builtin_task(pretend):
    steps = 2 if pretend else 200
    records = train(f"--steps={steps}")
    one, two = (train("--steps=2", "--max-staleness=0", "--eval-every=0") for _ in "12")
    return {
        "accuracy": records[-1]["eval_accuracy"],
        "tokens/s": tokens_per_second(records, 1),
        "drift_k3 of the first update": records[0]["drift_k3"],
        "publish, ms": 1e3 * records[-1]["publish_seconds"],
        "synchronous runs are equal": [r["reverse_kl"] for r in one]
        == [r["reverse_kl"] for r in two],
    }


def loss_kernel(pretend):
    with tempfile.TemporaryDirectory() as directory:
        file = f"{directory}/kernels.json"
        run(
            "-m", "benchmarks.kernels", "--repeats=3" if pretend else "--repeats=10", "--json", file
        )
        return {"figures": json.loads(Path(file).read_text())}


def model_pair(pretend):
    """Random models: what is measured is speed, and that sampler and learner agree."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        student = small(pretend, f"{directory}/student")
        sizes = (48, 2, 64, 173) if pretend else (2048, 28, 6144, 151_936)
        teacher = save_model(f"{directory}/teacher", *sizes)
        longest, batch, steps = (16, 4, 3) if pretend else (512, 128, 8)
        flags = [
            f"--student={student}",
            f"--teacher={teacher}",
            "--prompts=builtin",
            f"--max-new-tokens={longest}",
            f"--batch-size={batch}",
            f"--steps={steps}",
            "--eval-every=0",
            "--lr=1e-9",
            f"--slots={batch}",
        ]
        for staleness in (0, 1, 4):
            records = train(*flags, f"--max-staleness={staleness}")
            name = f"staleness {staleness}"
            found[f"{name}: tokens/s"] = tokens_per_second(records, 2)
            found[f"{name}: drift_k3"] = records[-1]["drift_k3"]
            for role in ("generator", "teacher", "learner"):
                found[f"{name}: {role} busy"] = records[-1][f"{role}_busy"]
    return found


if __name__ == "__main__":
    main()
