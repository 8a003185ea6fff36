"""Public tests of exercise 12. Expected values: plain torch in float64, a slot at a time."""

import torch
from claims import check, close, worth

# What rounding to a dtype may change, relative to the largest entry.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
EXACT = ("tf32x3", "ieee")  # precisions that float32 deserves


def problem(lengths, heads=2, group=4, sizes=(64, 64), seed=0, dtype=torch.float32):
    """query, keys, values and positions of slots that hold so many keys.

    `sizes` of a key and of a value. One more slot is idle. An earlier rollout has left its keys and
    values behind those of each slot.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    query = normal(len(lengths), heads, group, sizes[0])
    keys, values = (normal(len(lengths) + 1, heads, max(lengths) + 7, size) for size in sizes)
    return query, keys, values, torch.tensor(lengths) - 1


def seen_by(position, window, length: int):
    """Which of the positions [0, length) each slot sees, bool [A,length]."""
    at = torch.arange(length)
    return (at <= position[:, None]) & (at > position[:, None] - window)


def right_answer(query, keys, values, position, scale, window):
    rows = []
    for slot, seen in enumerate(seen_by(position, window, keys.shape[2])):
        score = scale * query[slot].double() @ keys[slot][:, seen].double().transpose(1, 2)
        rows.append(score.softmax(-1) @ values[slot][:, seen].double())
    return torch.stack(rows)


def check_decode(student, inputs, what, window=None, scale=0.125, tolerance=None):
    """The kernel is right, and stores every entry once, and nothing elsewhere."""
    window = inputs[1].shape[2] if window is None else window  # as decode_attention does
    found = student.decoded(*inputs, scale, window)
    expected = right_answer(*inputs, scale, window)
    tolerance = tolerance or ROUNDING[inputs[0].dtype]
    close(found["out"], expected, f"{what}: out [slot,h,g,d]", tolerance)
    often = int(found["stores"].max())
    check(often == 1, f"{what}: an entry of out is stored {often} times")
    check(
        found["elsewhere"] == 0,
        f"{what}: {found['elsewhere']} loads and stores lie outside of all tensors",
    )
    return found


def check_compiled(student, group, key_size, value_size, dtype):
    loops, products = student.decode_front_end(group, key_size, value_size, dtype)
    what = f"the compiled kernel, {group} queries, sizes {key_size} and {value_size}, {dtype}"
    check(loops >= 1, f"{what}, has no loop")
    check(len(products) >= 2, f"{what}, has {len(products)} matrix products, 2 at least are right")
    for name in products if dtype == "float32" else ():
        check(name in EXACT, f"{what}, multiplies in {name}, which rounds float32 to 11 bits")


# ---- the tests --------------------------------------------------------------------------------


@worth(1)
def test_keys_that_fit_into_a_block(student):
    """One key, a few, and as many as a block holds: out is attention over the slot's own keys."""
    for lengths in ([1], [5, 2], [64, 63]):
        check_decode(student, problem(lengths), f"slots of {lengths} keys")


@worth(1)
def test_blocks_are_joined(student):
    """Slots of several blocks, the last of them partial. Scores grow from block to block, or
    shrink, or neither: the running maximum moves or stays."""
    lengths = [65, 128, 200]
    query, keys, values, position = problem(lengths, seed=1)
    loud = torch.linspace(0.1, 8, keys.shape[2])[:, None]
    for what, factor in (("even", 1), ("growing", loud), ("shrinking", loud.flip(0))):
        inputs = query, keys * factor, values, position
        check_decode(student, inputs, f"slots of {lengths} keys, {what} scores")


@worth(1)
def test_padding_is_neither_read_nor_stored(student):
    """Of 16 rows 3 are queries. Every entry of out is stored once. Nothing outside of the tensors
    is loaded or stored."""
    check_decode(student, problem([70, 9], group=3, seed=2), "3 queries a key-value head")


@worth(1, compiled=True)
def test_the_compiler_takes_it(student):
    """The kernel is a Triton program: the compiler accepts it, too, and not the interpreter alone.
    It has a loop over blocks with two matrix products, which do not cut float32 off."""
    check_compiled(student, 4, 64, 64, "float32")
    check_compiled(student, 4, 64, 64, "bfloat16")


@worth(1, gpu=True)
def test_the_compiled_kernel(student):
    """Compiled for a GPU the kernel is right, too."""
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.bfloat16, 2**-7)):
        inputs = problem([1, 64, 200, 33], seed=3, dtype=dtype)
        found = student.compiled_decode(*inputs, 0.125, 50)
        close(found, right_answer(*inputs, 0.125, 50), f"out in {dtype}", tolerance)
