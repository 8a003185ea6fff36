"""Hidden tests of exercise 3."""

import torch

import tiny
from claims import check, worth
from test_03_cache import check_decode, check_prefill, check_rollouts
from test_03_cache import positions_seen, random_prompts


@worth(1)
def test_masks_of_every_position_and_window(student):
    """may_see and mask are right for every position, length and window; layers may ask by turns,
    and a mask is computed once."""
    windows = [None, 8, *range(1, 12)]
    for length in range(1, 11):
        position = torch.arange(length)
        found = student.mask_of(position, [*windows, *windows], torch.float32)
        for window, mask in zip([*windows, *windows], found, strict=True):
            what = f"length {length}, window {window}"
            check(
                tuple(mask.shape) == (length, 1, 1, length) and mask.dtype == torch.float32,
                f"{what}: the mask is {tuple(mask.shape)} and {mask.dtype}",
            )
            seen = student.visible(position, length, window)
            for at in range(length):
                right = positions_seen(at, length, window)
                check(seen[at] == right, f"{what}: {at} sees {seen[at]}; {right} is right")
                expected = [0.0 if other in right else float("-inf") for other in range(length)]
                row = mask[at, 0, 0].tolist()
                check(row == expected, f"{what}: the mask of position {at} is {row}")
    kept = student.mask_is_kept(torch.tensor([0, 4, 2]), (8, None, 2))
    check(all(kept), "mask computes the mask of a window again when another layer asks for it")


@worth(1)
def test_the_mask_ends_with_the_longest_slot(student):
    """The mask covers as many positions as the longest slot holds, in whichever place it stands."""
    for position in ([9, 2, 5], [2, 9, 0], [0, 4, 9]):
        windows = (None, 8, 1)
        found = student.mask_of(torch.tensor(position), windows, torch.float32)
        for window, mask in zip(windows, found, strict=True):
            what = f"slots at positions {position}, window {window}"
            shape = tuple(mask.shape)
            check(shape == (3, 1, 1, 10), f"{what}: the mask is {shape}, not (3, 1, 1, 10)")
            for slot, at in enumerate(position):
                seen = (mask[slot, 0, 0] == 0).nonzero().flatten().tolist()
                right = positions_seen(at, 10, window)
                check(seen == right, f"{what}: slot {slot} sees {seen}; {right} is right")


@worth(1)
def test_every_number_of_heads(student):
    """Any number of query heads may share a key-value head; prompts are longer than the window."""
    for seed, (heads, kv_heads) in enumerate([(6, 1), (6, 2), (6, 3), (3, 3)]):
        for window in (None, 1, 2, 5, 9):
            check_decode(student, heads, kv_heads, window, seed)
        for window, length in ((None, 1), (1, 1), (1, 6), (4, 3), (4, 4), (4, 5), (4, 9)):
            check_prefill(student, heads, kv_heads, window, length, seed)


@worth(1)
def test_slots_are_used_again_and_moved(student):
    """Short rollouts after long ones, in any slot, see nothing of what was there before them."""
    prompts = random_prompts(2, [20, 1, 9, 1, 18, 2, 11, 1, 8, 3, 20, 1])
    for family in ("qwen3", "llama", "gemma3"):
        for slots in (1, 5):
            check_rollouts(student, family, prompts, slots, max_new_tokens=20)


@worth(1)
def test_greedy_responses_are_those_of_generate(student):
    """Greedy responses are token by token those of `generate` of transformers."""
    prompts = random_prompts(8, [1, 6, 14, 1, 3])
    for family in ("qwen3", "llama", "gemma3"):
        model = tiny.random_model(family)
        found = student.rollouts(family, prompts, 2, 16, (1,), True)
        for prompt, (response, _) in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt])
            options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": 1}
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            right = out[0, len(prompt) :].tolist()
            check(response == right, f"{family}: {prompt} gives {response}; {right} is right")
