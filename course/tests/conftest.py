"""`python -m pytest tests`: the same tests, with tracebacks."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import probes  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def student(request):
    """Your code, called in this process."""
    if request.function.gpu and not torch.cuda.is_available():
        pytest.skip("it needs a GPU")
    if request.function.compiled and os.environ["TRITON_INTERPRET"] == "1":
        pytest.skip(
            "it needs Triton's compiler: run `TRITON_INTERPRET=0 python -m pytest -k compile tests`"
        )
    return probes
