"""Models and rollouts that the tests stand on. Nothing of yours is in them."""

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent


def random_model(family: str, seed: int = 0):
    """A random model with few parameters. gemma3 sees 8 positions in every second layer."""
    torch.manual_seed(seed)
    common = dict(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common)).eval()
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**common)).eval()
    windows = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    return Gemma3ForCausalLM(Gemma3TextConfig(**common, **windows, query_pre_attn_scalar=8)).eval()


def builtin(name: str):
    """The model that ships with the project, "student" or "teacher", in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(HERE.parent / "assets" / name).float().eval()


def frozen_table():
    """Rollouts of the built-in student, scored by the built-in teacher: a rollout table on disk.

    Fields as in channel.Channel. The candidates are those of the stratified loss: column 0 the
    emitted token, then the sampler's top 4, then 4 draws from the rest. The teacher reads what the
    student does.
    """
    table = SimpleNamespace(**load_file(HERE / "rollouts.safetensors"))
    table.teacher_tokens, table.teacher_prompt_len = table.tokens, table.prompt_len
    table.as_teacher_reads = lambda: table
    return table
