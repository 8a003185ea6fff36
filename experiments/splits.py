"""Shapes of the models that `python -m experiments.simulate --plan` knows."""

from pathlib import Path

from transformers import Qwen3Config, Qwen3MoeConfig

from support.config import InputError

VOCAB = 151_936
# The models' own config.json: hidden, layers, MLP, query heads, key-value heads, head size, tied.
SHAPES = {
    "0.5B": (896, 24, 4864, 14, 2, 64, True),  # Qwen2.5; the others are Qwen3
    "1.5B": (1536, 28, 8960, 12, 2, 128, True),  # Qwen2.5
    "0.6B": (1024, 28, 3072, 16, 8, 128, True),
    "1.7B": (2048, 28, 6144, 16, 8, 128, True),
    "4B": (2560, 36, 9728, 32, 8, 128, True),
    "8B": (4096, 36, 12288, 32, 8, 128, False),
    "32B": (5120, 64, 25600, 64, 8, 128, False),
    "30B-A3B": (2048, 48, 768, 32, 4, 128, False),  # a mixture of experts
}
EXPERTS, USED = 128, 8  # of 30B-A3B


def write_config(directory, name):
    """Write the config.json of a model of that name; returns its directory."""
    if name not in SHAPES:
        raise InputError(f"{name}: one of {', '.join(SHAPES)} is needed")
    hidden, layers, mlp, heads, groups, head, tied = SHAPES[name]
    common = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40_960,
    }
    config = Qwen3Config(intermediate_size=mlp, **common)
    if name == "30B-A3B":
        experts = {"num_experts": EXPERTS, "num_experts_per_tok": USED}
        config = Qwen3MoeConfig(moe_intermediate_size=mlp, **experts, **common)
    path = Path(directory) / name
    config.save_pretrained(path)
    return str(path)


def idle_parameters(name):
    """Parameters that a token does not use."""
    hidden, layers, mlp, *_ = SHAPES[name]
    return layers * (EXPERTS - USED) * 3 * hidden * mlp if name == "30B-A3B" else 0
