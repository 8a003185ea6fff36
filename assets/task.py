"""The built-in task, running sums, and a second one for another teacher, sums of neighbours.

The prompt `a47+b58+c91=` asks for the running totals. Each total is named after the last addend in
it and has three digits, least significant first: `b501,c691`. `a47,b58,c91=` asks for the sum of
each number and the one before it, written in the same way: `b501,c941`. Every response digit may be
written with any of 16 synonym tokens, which the tokenizer decodes to the same digit. The teacher
draws them from a Zipf law. So there is arithmetic to learn, and a style with entropy, which is what
makes top-k supports, sampling and staleness matter.
"""

import zlib

import torch

ADDENDS, NAMES = range(2, 9), "abcdefgh"
ADDEND_DECAY = 0.85  # P(n addends) is proportional to 0.85^n: many short responses, a long tail
EVALUATION_SEED = 12345  # every run has the same evaluation prompts, so that runs compare


def running_sums(count: int, seed: int, heldout: bool) -> list[tuple[str, str]]:
    """`count` distinct (prompt, answer) pairs.

    The checksum of a prompt says whether it is held out, so the two halves are disjoint.
    """
    return pairs_of(count, seed, heldout, "+", lambda numbers: numbers.cumsum(0))


def neighbour_sums(count: int, seed: int, heldout: bool) -> list[tuple[str, str]]:
    """The same for the second task."""
    return pairs_of(count, seed, heldout, ",", lambda numbers: numbers + numbers.roll(1))


def pairs_of(count, seed, heldout, sign, values_of):
    """`values_of`: what the answer names after each number but the first, int64 [n] -> [n]."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([ADDEND_DECAY**n for n in ADDENDS])
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        size = ADDENDS[int(torch.multinomial(weights, 1, generator=generator))]
        numbers = torch.randint(10, 100, (size,), generator=generator)
        terms = [name + str(number) for name, number in zip(NAMES, numbers.tolist())]
        prompt = sign.join(terms) + "="
        if (zlib.crc32(prompt.encode()) % 16 == 0) == heldout:
            values = zip(NAMES[1:], values_of(numbers)[1:].tolist())
            # 47 + 58 = 105 is written b501: the least significant digit first.
            pairs[prompt] = ",".join(name + f"{value:03d}"[::-1] for name, value in values)
    return list(pairs.items())
