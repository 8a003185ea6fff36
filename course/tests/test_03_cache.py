"""Public tests of exercise 3. What is right comes from single queries and from transformers."""

import torch

import tiny
from claims import check, close, worth

STOPS = (1, 5, 9, 60, 61, 62, 63, 70, 71)


def positions_seen(at: int, length: int, window):
    """The positions below `length` that the query at `at` sees, one by one."""
    seen = []
    for other in range(length):
        is_recent = window is None or at - other < window
        if other <= at and is_recent:
            seen.append(other)
    return seen


def one_query(query, keys, values, scaling: float):
    """The attention of one query [E] over keys and values [n,E], float64."""
    weights = (scaling * (keys.double() @ query.double())).softmax(-1)
    return weights @ values.double()


def tensors(seed: int, *shapes):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=random) for shape in shapes]


def check_prefill(student, heads: int, kv_heads: int, window, length: int = 7, seed: int = 0):
    """Prefill.attend on prompts of `length` tokens, in slots 2 and 0 of a used cache."""
    of_cache = (3, kv_heads, 10, 8)
    of_query, of_key = (2, heads, length, 8), (2, kv_heads, length, 8)
    *cached, query, key, value = tensors(seed, of_cache, of_cache, of_query, of_key, of_key)
    slots = [2, 0]
    found = student.attend_prefill(cached, torch.tensor(slots), query, key, value, 0.7, window)
    of = f"{length} tokens, {heads} heads on {kv_heads}, window {window}, scale 0.7"
    what = f"Prefill ({of})"
    caches = zip(("key", "value"), cached, (key, value), found[1:], strict=True)
    for name, before, new, after in caches:
        close(after[1], before[1], f"{what}: the {name} cache of slot 1, which has no prompt,")
        for row, slot in enumerate(slots):
            close(after[slot, :, :length], new[row], f"{what}: the {name} cache of slot {slot}")
    shape = tuple(found[0].shape)
    check(shape == (2, length, heads, 8), f"{what}: it returns the shape {shape}")
    for row in range(2):
        for at in range(length):
            seen = positions_seen(at, length, window)
            for head in range(heads):
                shared = head // (heads // kv_heads)
                keys, values = key[row, shared, seen], value[row, shared, seen]
                right = one_query(query[row, head, at], keys, values, 0.7)
                close(found[0][row, at, head], right, f"{what}: head {head} at position {at}")


def check_decode(student, heads: int, kv_heads: int, window, seed: int = 0):
    """Decode.attend on slots of different ages, in a cache that is full of older rollouts."""
    position = [4, 0, 8, 5]
    of_cache = (5, kv_heads, 12, 8)
    of_query, of_key = (4, heads, 1, 8), (4, kv_heads, 1, 8)
    *cached, query, key, value = tensors(seed, of_cache, of_cache, of_query, of_key, of_key)
    found = student.attend_decode(cached, torch.tensor(position), query, key, value, 0.7, window)
    what = f"Decode ({heads} heads on {kv_heads}, window {window}, scale 0.7)"
    caches = zip(("key", "value"), cached, (key, value), found[1:], strict=True)
    for name, before, new, after in caches:
        close(after[4], before[4], f"{what}: the {name} cache of slot 4, which is idle,")
        for slot, at in enumerate(position):
            before[slot, :, at] = new[slot, :, 0]
            one, right = after[slot, :, : at + 1], before[slot, :, : at + 1]
            close(one, right, f"{what}: the {name} cache of slot {slot} up to position {at}")
    shape = tuple(found[0].shape)
    check(shape == (4, 1, heads, 8), f"{what}: it returns the shape {shape}")
    for slot, at in enumerate(position):
        seen = positions_seen(at, 9, window)
        for head in range(heads):
            keys, values = (tensor[slot, head // (heads // kv_heads), seen] for tensor in cached)
            right = one_query(query[slot, head, 0], keys, values, 0.7)
            where = f"head {head} at position {at} of slot {slot}"
            close(found[0][slot, 0, head], right, f"{what}: {where}")


def random_prompts(seed: int, lengths):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 101, (length,), generator=random).tolist() for length in lengths]


@torch.no_grad()
def check_rollouts(student, family, prompts, slots, max_new_tokens=24, stops=STOPS, greedy=False):
    """Every token has the log-probability that a forward pass over the whole sequence gives it."""
    model = tiny.random_model(family)
    found = student.rollouts(family, prompts, slots, max_new_tokens, stops, greedy)
    for number, (prompt, (response, logp)) in enumerate(zip(prompts, found, strict=True)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        what = f"{family}, {slots} slots, rollout {number} (a prompt of {len(prompt)})"
        ends = [at + 1 for at, token in enumerate(response) if token in stops]
        count = ends[0] if ends else max_new_tokens
        check(len(response) == count, f"{what} has {len(response)} tokens, not {count}")
        best = logits.argmax(-1).tolist()
        for at, (token, right) in enumerate(zip(response, best)):
            check(
                token == right or not greedy,
                f"{what}: token {at} is {token}; {right} is the most probable",
            )
        right = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        check(logp.shape == right.shape, f"{what} has {tuple(logp.shape)} log-probabilities")
        error = (logp - right).abs()
        for at in (~(error < 1e-4)).nonzero().flatten().tolist():
            raise AssertionError(
                f"{what}: token {at} has the log-probability {float(logp[at]):.6g}, "
                f"{float(right[at]):.6g} is right"
            )


@worth(1)
def test_a_query_sees_itself_and_the_past(student):
    """may_see: a query sees its own position and those before it, `window` of them at most."""
    now = [0, 3, 4, 7]
    for window in (None, 1, 4):
        found = student.visible(torch.tensor(now), 8, window)
        for at, one in zip(now, found, strict=True):
            right = positions_seen(at, 8, window)
            check(one == right, f"with window {window} position {at} sees {one}; {right} is right")


@worth(1)
def test_prefill_attends_and_fills_the_cache(student):
    """Prefill writes whole prompts into their slots, and every token sees what it may."""
    for window in (None, 3):
        check_prefill(student, heads=4, kv_heads=2, window=window)


@worth(1)
def test_decode_attends_to_its_own_rollout(student):
    """Decode writes the new token at its position and sees its own rollout, nothing older. The mask
    of a step is computed once for each window."""
    for window in (None, 3):
        check_decode(student, heads=4, kv_heads=2, window=window)
    kept = student.mask_is_kept(torch.tensor([3, 5]), (None, 3))
    check(all(kept), "mask computes the mask of a window again when another layer asks for it")


@worth(1)
def test_greedy_tokens_are_those_of_full_forward_passes(student):
    """Greedy rollouts, more than there are slots, are those of a model without a cache."""
    prompts = random_prompts(5, [5, 12, 3, 20, 2, 9, 15])
    for family in ("qwen3", "llama"):
        check_rollouts(student, family, prompts, slots=3, greedy=True)


@worth(1)
def test_sliding_windows(student):
    """The same holds where every second layer sees 8 positions, for prompts of up to 20 tokens."""
    prompts = random_prompts(1, [12, 4, 20, 8, 9, 17, 2])
    check_rollouts(student, "gemma3", prompts, slots=4)
