"""The built-in task: running sums.

The prompt `a47+b58+c91=` asks for the running totals. Each total is named after the last addend in
it and has three digits, least significant first: `b501,c691`. Every response digit may be written
with any of 16 synonym tokens, which the tokenizer decodes to the same digit. The teacher draws them
from a Zipf law. So there is arithmetic to learn, and a style with entropy, which is what makes
top-k supports, sampling and staleness matter.
"""

import zlib

import torch

from checks import require

SYNONYMS = 16  # tokens that decode to one digit: "7", "7A", ... "7O"
ADDENDS, NAMES = range(2, 9), "abcdefgh"
ADDEND_DECAY = 0.85  # P(n addends) is proportional to 0.85^n: many short responses, a long tail


def running_sums(count: int, seed: int, heldout: bool) -> list[tuple[str, str]]:
    """`count` distinct (prompt, answer) pairs.

    The checksum of a prompt says whether it is held out, so the two halves are disjoint.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([ADDEND_DECAY**n for n in ADDENDS])
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        size = ADDENDS[int(torch.multinomial(weights, 1, generator=generator))]
        addends = torch.randint(10, 100, (size,), generator=generator)
        terms = [name + str(addend) for name, addend in zip(NAMES, addends.tolist())]
        prompt = "+".join(terms) + "="
        if (zlib.crc32(prompt.encode()) % 16 == 0) == heldout:
            totals = zip(NAMES[1:], addends.cumsum(0)[1:].tolist())
            pairs[prompt] = ",".join(name + f"{total:03d}"[::-1] for name, total in totals)
    return list(pairs.items())


def load(config, tokenizer):
    """(training prompts, evaluation prompts).

    Every seed has the same evaluation items, so that runs compare.
    """
    train = encode(running_sums(20_000, config.seed, heldout=False), tokenizer)
    held_out = encode(running_sums(config.eval_size, 12345, heldout=True), tokenizer)
    longest = max(len(prompt.ids) for prompt in train + held_out)
    require(
        longest <= config.max_prompt_tokens,
        f"built-in prompts have up to {longest} tokens, "
        f"--max-prompt-tokens is {config.max_prompt_tokens}: raise it",
    )
    return train, held_out


def encode(pairs, tokenizer):
    from data import Prompt  # which imports this module

    ids = tokenizer([text for text, _ in pairs]).input_ids
    return [Prompt(text, ids, answer) for (text, answer), ids in zip(pairs, ids)]


def build_tokenizer():
    """One token per digit synonym, name and sign, and two specials (V = 173)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [""] + [chr(ord("A") + i) for i in range(SYNONYMS - 1)]
    digits = [digit + letter for digit in "0123456789" for letter in letters]
    words = ["<pad>", "<eos>", *"+=,", *NAMES, *digits]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9][A-O]?|[+=,a-h]"), "isolated")
    without_letters = decoders.Replace(Regex("[A-O]"), "")
    tokenizer.decoder = decoders.Sequence([without_letters, decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast
