"""Run the public tests of an exercise: `python grade.py 7`, or of all: `python grade.py`.

Each test runs in a process of its own, for a minute at most. The tests that decide your points are
the instructor's: these ones, and others that you do not see. `python -m pytest tests/test_07_*.py`
runs the same tests, with tracebacks.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]
if __name__ == "__main__":  # a child that compiles must not have it
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else no forked process could use the GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402

import probes  # noqa: E402
from grading import Outcome, claim_of, judge, tests_of  # noqa: E402

LIMIT = 60.0  # seconds a test


def run_in_child(connection, path, name):
    torch.set_num_threads(1)
    connection.send(judge(tests_of(path)[name], probes))


def outcome(path, name, test):
    """Run one test in a process of its own."""
    if test.gpu and not torch.cuda.is_available():
        return Outcome(name, claim_of(test), "blocked", "it needs a GPU")
    ours, its = multiprocessing.Pipe(duplex=False)
    # Whether Triton compiles is settled when it is imported: that takes a new interpreter.
    start = multiprocessing.get_context("spawn" if test.compiled else "fork")
    os.environ["TRITON_INTERPRET"] = str(int(not test.compiled))
    began = time.monotonic()
    process = start.Process(target=run_in_child, args=(its, path, name))
    process.start()
    its.close()
    try:
        status, message = ("timeout", f"not done after {LIMIT:.0f} s")
        if ours.poll(LIMIT):
            status, message = ours.recv()
    except EOFError:
        process.join()
        status, message = "failed", f"the process ended (exit code {process.exitcode})"
    process.kill()
    process.join()
    return Outcome(name, claim_of(test), status, message, time.monotonic() - began)


def grade(path: Path):
    """Print what came of every test of an exercise; the points of those that passed, and of all."""
    _, number, *words = path.stem.split("_")
    print(f"exercise {int(number)}: {' '.join(words)}")
    got = total = 0
    for name, test in tests_of(path).items():
        result = outcome(path, name, test)
        passed = result.status == "passed"
        got += test.points * passed
        total += test.points * (result.status != "blocked")
        print(f"  {result.status:8s}{result.claim}")
        if not passed:
            message = result.message.replace("NotImplementedError:", "not written yet:")
            print(f"          why: {message}")
    print(f"  {got} of {total} points in the public tests\n", flush=True)
    return got, total


def main():
    wanted = [f"{int(word):02d}" for word in sys.argv[1:] if word.isdigit()]
    if len(wanted) < len(sys.argv) - 1:
        sys.exit("grade.py: error: give the numbers of exercises: python grade.py 7")
    paths = sorted((HERE / "tests").glob("test_*.py"))
    chosen = [path for path in paths if not wanted or path.stem[5:7] in wanted]
    if not chosen:
        sys.exit(f"grade.py: error: no exercise {' '.join(sys.argv[1:])}; see handouts/")
    results = [grade(path) for path in chosen]
    got, total = map(sum, zip(*results))
    if len(results) > 1:
        print(f"{got} of {total} points in all public tests")
    sys.exit(got < total)


if __name__ == "__main__":
    main()
