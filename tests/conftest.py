"""Tiny random models, a tiny rollout table in plain tensors, the built-in tokenizer.

Nothing here needs the network or a GPU.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

# Read by Triton when a kernel is defined; no effect on the children's plain torch path.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import (  # noqa: E402
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from assets.tokenizer import build_tokenizer  # noqa: E402
from channel import STOP, Channel, write_prompt, write_rollout  # noqa: E402
from experiments.corrections import CORRECTIONS, SIGNALS  # noqa: E402
from generate import Generator  # noqa: E402
from kv_cache import switch_to_slots  # noqa: E402
from losses import Greedy, Proposal, make_loss  # noqa: E402
from model import head_weight  # noqa: E402
from support.config import Config, builtin  # noqa: E402
from support.load import load_model  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")
FAMILIES = ("qwen3", "llama", "gemma3", "qwen3_5", "lfm2")


def build_model(family: str, seed: int = 0, vocab: int = 173, hidden: int = 32, layers: int = 2):
    """A random model of a few thousand parameters.

    gemma3 has a sliding window of 8 in every second layer. qwen3_5 has a convolution and a
    recurrent state in every second layer, lfm2 a convolution.
    """
    torch.manual_seed(seed)
    common = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
    )
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common, tie_word_embeddings=True)).eval()
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False)).eval()
    if family in ("qwen3_5", "lfm2"):
        return build_hybrid(family, common, layers).eval()
    windows = dict(
        sliding_window=8, layer_types=["sliding_attention", "full_attention"] * (layers // 2)
    )
    return Gemma3ForCausalLM(Gemma3TextConfig(**common, **windows, query_pre_attn_scalar=8)).eval()


def build_hybrid(family, common, layers):
    if family == "lfm2":
        types = ["conv", "full_attention"] * (layers // 2)
        sizes = dict(layer_types=types, conv_L_cache=4, block_auto_adjust_ff_dim=False)
        model = Lfm2ForCausalLM(Lfm2Config(**common, **sizes))
    else:
        types = ["linear_attention", "full_attention"] * (layers // 2)
        heads = dict(linear_num_key_heads=2, linear_num_value_heads=4)
        sizes = dict(linear_key_head_dim=8, linear_value_head_dim=8, layer_types=types)
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**common, **heads, **sizes))
    with torch.no_grad():  # as they start, these decide nothing
        for name, value in model.named_parameters():
            if "conv" in name or name.endswith(("A_log", "dt_bias")):
                value.normal_(std=1.0)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    """model_dir(family, seed, **sizes) -> a saved tiny model with the built-in tokenizer."""
    made = {}

    def get(family="qwen3", seed=0, **sizes):
        key = (family, seed, *sorted(sizes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}{seed}")
            build_model(family, seed, **sizes).save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return str(made[key])

    return get


@pytest.fixture(scope="session")
def pair(model_dir):
    """Flags that name a tiny student and another tiny teacher, for the built-in task."""
    models = [f"--student={model_dir('qwen3', 0)}", f"--teacher={model_dir('qwen3', 1, hidden=40)}"]
    return [f"--config={ROOT / 'assets' / 'builtin.yaml'}", *models]


SYNC = ["--max-staleness=0", "--steps=6", "--eval-every=3"]


@pytest.fixture(scope="session")
def sync_run(pair, tmp_path_factory):
    """Output directory and text of a synchronous run of the pair by torchrun, with SYNC."""
    from runs import finish, start  # they import this file

    output = tmp_path_factory.mktemp("sync") / "run"
    return output, finish(start(output, *pair, *SYNC, "--save-every=3", ranks=1))


def load(path: str, dtype: torch.dtype = torch.float32):
    return load_model(path, dtype, CPU)


def load_with_slots(path: str, dtype: torch.dtype = torch.float32, length: int = 24):
    """A generator's model, for sequences of at least `length` tokens."""
    model = load_model(path, dtype, CPU)
    switch_to_slots(model, length)
    return model


def new_generator(
    model,
    stops=(1,),
    slots=4,
    max_prompt=20,
    max_new=24,
    vocab=None,
    proposal: Proposal | None = None,
    cls=Generator,
    **settings,
):
    """A generator that draws what the loss in `settings` wants, greedy if they name none."""
    config = builtin(max_prompt_tokens=max_prompt, max_new_tokens=max_new, **settings)
    proposal = proposal or (make_loss(config) if "loss" in settings else Greedy())
    vocab = vocab or len(head_weight(model))
    return cls(
        model=model, proposal=proposal, config=config, stops=set(stops), vocab=vocab, slots=slots
    )


class Table(SimpleNamespace):
    as_teacher_reads = Channel.as_teacher_reads


def make_table(rollouts, columns: int, max_new: int, max_prompt: int = 64):
    """The fields of a Channel that teacher and learner use, filled from finished Rollouts."""
    rows, total = len(rollouts), max_prompt + max_new
    table = Table(
        tokens=torch.zeros(rows, total, dtype=torch.int32),
        prompt_len=torch.zeros(rows, dtype=torch.int32),
        length=torch.zeros(rows, dtype=torch.int32),
        ticket=torch.arange(rows),
        teacher_tokens=torch.zeros(rows, total, dtype=torch.int32),
        teacher_prompt_len=torch.zeros(rows, dtype=torch.int32),
        teacher=torch.zeros(rows, dtype=torch.int32),
        finish=torch.full((rows,), STOP, dtype=torch.int32),
        weight_version=torch.zeros(rows, max_new, dtype=torch.int32),
        candidate_ids=torch.zeros(rows, max_new, columns, dtype=torch.int32),
        behavior_logp=torch.zeros(rows, max_new, columns),
        teacher_logp=torch.zeros(rows, max_new, columns),
        top_overlap=torch.zeros(rows),
    )
    for row, rollout in enumerate(rollouts):
        rollout.row = row
        write_prompt(table, row, rollout.prompt_ids, rollout.prompt_ids)
        write_rollout(table, rollout)
    return table


CORRECTED = [f"sampled_{signal}_{correction}" for signal in SIGNALS for correction in CORRECTIONS]


def corrected(name: str, **settings):
    """The settings of a loss of experiments/corrections.py."""
    return builtin(loss=name, plugin="experiments.corrections", **settings)


LOSS_CONFIGS = [
    builtin(loss="forward_kl", top_k=6),
    builtin(loss="sparse_reverse_kl", top_k=6),
    *[builtin(loss="sampled_reverse_kl", num_samples=n) for n in (1, 4)],
    *[corrected(name, num_samples=n) for n in (1, 4) for name in CORRECTED],
    builtin(loss="stratified_reverse_kl", top_k=5, num_samples=3),
]
SHIPPED = [config for config in LOSS_CONFIGS if not config.plugin]


def label(config: Config) -> str:
    return f"{config.loss}-{config.num_samples}" if "sampled" in config.loss else config.loss
