"""Hidden tests of exercise 12."""

import torch
from claims import check, worth
from test_12_decode import check_compiled, check_decode, problem, seen_by


@worth(1)
def test_windows(student):
    """A window may begin at, before and behind the edge of a block, and be longer than the slot."""
    for window in (1, 2, 16, 63, 64, 65, 100, 1000):
        lengths = [1, 64, 65, 80, 129, 200]
        inputs = problem(lengths, heads=1, group=2, seed=window)
        check_decode(student, inputs, f"slots of {lengths} keys, window {window}", window)


@worth(1)
def test_what_is_seen_is_read_once_and_nothing_else(student):
    """Keys and values that a slot does not see are not loaded, those that it sees once: they may be
    NaN. Its neighbours change no bit of what it gets."""
    lengths = [3, 64, 150]
    for window in (1000, 40):
        query, keys, values, position = problem(lengths, 2, 3, (80, 48), seed=4)
        seen = seen_by(position, window, keys.shape[2])
        for slot in range(len(keys)):
            hidden = ~seen[slot] if slot < len(seen) else slice(None)
            keys[slot, :, hidden] = values[slot, :, hidden] = torch.nan
        what = f"slots of {lengths} keys, window {window}, NaN elsewhere"
        found = check_decode(student, (query, keys, values, position), what, window)
        for name in ("key", "value"):
            loads = found[f"{name}_loads"]
            right = torch.zeros_like(loads)
            right[: len(seen)] = seen[:, None, :, None].expand(right[: len(seen)].shape).long()
            wrong = (loads != right).nonzero().tolist()
            if wrong:
                slot, head, at, entry = wrong[0]
                check(
                    False,
                    f"{what}: entry {entry} of {name} {at} of slot {slot}, head {head}, is loaded "
                    f"{int(loads[slot, head, at, entry])} times, not "
                    f"{int(right[slot, head, at, entry])}",
                )
        check(found["atomics"] == 0, f"{what}: there are atomics")
        for slot in range(len(lengths)):
            one = slice(slot, slot + 1)
            alone = student.decoded(
                query[one], keys[one], values[one], position[one], 0.125, window
            )["out"][0]
            check(
                torch.equal(alone, found["out"][slot]),
                f"{what}: slot {slot} gets other bits if it is alone",
            )


@worth(1)
def test_any_heads_sizes_and_dtypes(student):
    """1, 3, 16 or 20 queries a key-value head, 1 to 3 key-value heads, sizes that are no powers of
    two, values of another size than keys, float32 and bfloat16, and another scale."""
    for group, heads, sizes in [
        (1, 3, (64, 64)),
        (3, 2, (80, 80)),
        (16, 1, (128, 128)),
        (20, 1, (16, 16)),
        (2, 2, (96, 64)),
        (3, 1, (64, 80)),
    ]:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = problem([37, 150], heads, group, sizes, group, dtype)
            what = f"{group} queries on each of {heads} heads, sizes {sizes}, {dtype}"
            check_decode(student, inputs, what, 100, scale=0.2)
    # Sums are float32: bfloat16 would round sixteen times.
    query, keys, values, position = problem([500], 1, 2, (256, 256), 0, torch.bfloat16)
    inputs = query, keys, values + 3, position
    check_decode(student, inputs, "500 keys of size 256, torch.bfloat16", scale=1e-3)


@worth(1)
def test_large_scores(student):
    """Scores of 1000 and -1000 neither overflow nor vanish, wherever the best key stands, and
    whatever the scores of the other queries are."""
    query, keys, values, position = problem([200], heads=1, group=2, seed=5)
    for best in (0, 100, 199):
        for sign in (1, -1):
            loud = keys.clone()
            loud[:, :, best] = sign * 30 * query[0, 0, 0]
            what = f"key {best} is {sign * 30} times the first query"
            check_decode(student, (query, loud, values, position), what)
    # One query's scores lie near 1000, the other's near -1000.
    query[:, :, 0, 0], query[:, :, 1, 0] = 100.0, -100.0
    keys[..., 0] = 80.0
    what = "scores near 1000 and near -1000"  # which float32 keeps to 0.0001
    check_decode(student, (query, keys, values, position), what, tolerance=1e-3)


@worth(1, compiled=True)
def test_the_compiler_takes_every_size(student):
    """The compiler accepts the kernel for all groups, sizes and dtypes."""
    for group, key_size, value_size in ((1, 64, 64), (3, 80, 80), (16, 256, 256), (20, 192, 128)):
        for dtype in ("float32", "bfloat16"):
            check_compiled(student, group, key_size, value_size, dtype)
