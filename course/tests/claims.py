"""How the tests of the exercises say what is wrong.

A test is a function `test_...(student)` whose docstring is the claim that it checks. `student` has
the functions of probes.py. They call your code, here or in another process.
"""

import torch


def worth(points: int, gpu: bool = False, compiled: bool = False):
    """How many points a test is worth.

    `compiled`: it needs Triton's compiler, not its interpreter. `gpu`: it needs a GPU as well.
    """

    def mark(test):
        test.points = points
        test.gpu = gpu
        test.compiled = compiled or gpu
        return test

    return mark


def check(condition, message: str):
    """Raise AssertionError with `message` unless `condition` holds."""
    if not condition:
        raise AssertionError(message)


def close(found, expected, what: str, tolerance: float = 1e-5):
    """Both tensors agree in shape, and in every entry to `tolerance`, relative to the largest."""
    found = torch.as_tensor(found).double()
    expected = torch.as_tensor(expected).double()
    check(
        found.shape == expected.shape,
        f"{what} has the shape {tuple(found.shape)}, not {tuple(expected.shape)}",
    )
    if not expected.numel():
        return
    check(bool(found.isfinite().all()), f"{what} has entries that are not finite numbers")
    error = (found - expected).abs()
    worst = int(error.argmax())
    scale = max(1e-12, float(expected.abs().max()))
    index = torch.unravel_index(torch.tensor(worst), expected.shape)
    place = f"entry [{', '.join(str(int(one)) for one in index)}]" if index else "it"
    check(
        float(error.max()) <= tolerance * scale,
        f"{what} is wrong: {place} is {float(found.flatten()[worst]):.6g}, "
        f"{float(expected.flatten()[worst]):.6g} is right",
    )
