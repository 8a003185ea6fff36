"""The tokenizer of the built-in task. make_assets.py saves it beside the models."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from assets.task import NAMES

SYNONYMS = 16  # tokens that decode to one digit: "7", "7A", ... "7O"


def build_tokenizer():
    """One token per digit synonym, name and sign, and two specials (V = 173)."""
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
