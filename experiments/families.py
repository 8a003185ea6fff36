"""Which model families work: `python -m experiments.families --out docs/families.md`, some minutes.

For every causal language model that transformers knows (`model_type`), and for a few models built
like published ones, a tiny one with random weights is loaded as train.py loads it. What a default
config leaves trivial is drawn: biases, norms, scales of logits, embeddings and attention,
convolutions, sinks. What is accepted must then be exact:

1. five prompts of different lengths are sampled through two slots, which are refilled and moved,
   and again after other weights were picked up; the log-probability of every token must be what
   the model's own forward pass of the whole sequence gives, within 1e-4
2. two updates train it, it is saved and loaded, and the third has the gradient that it has without
   the interruption
3. no parameter outside of what is trained has a gradient

What is refused must be refused by an InputError. Sequences are longer than the sliding window.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

from assets.tokenizer import build_tokenizer
from channel import Channel, Rollout, read_rollout, write_prompt, write_rollout
from generate import Generator
from kv_cache import switch_to_slots
from learner import Learner
from losses import Proposal, make_loss
from model import flat_parameters, flatten_parameters, head_weight, trained_part
from support.config import Config, InputError, builtin
from support.load import check_config, load_model
from teacher import Teacher

CPU = torch.device("cpu")
VOCAB = 64
LAYERS = 4
LARGEST = 20_000_000  # parameters: what is larger with SIZES has other names for its sizes
PROMPTS = ([5, 6, 7], [9, 3, 8, 4, 11, 12, 13, 2, 6, 7], [3], [8, 9, 10], [4, 5])
NEW_TOKENS = 12
TOLERANCE = 1e-4  # nats
ANSWERS = ("works", "works plain", "refused", "wrong", "crash", "not tried")
LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
# Every name that a family has for its sizes. A name that it does not have is left out.
SIZES = {
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    "initializer_range": 0.3, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48,
    "d_inner": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "decoder_layers": LAYERS, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 256, "max_seq_len": 256, "n_positions": 256, "sliding_window": 8,
    "query_pre_attn_scalar": 8, "mamba_d_state": 8, "state_size": 8, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
# What default configs leave trivial, with other values. Soft caps stay as the family has them.
LIVELY = {
    "attention_bias": True, "mlp_bias": True, "use_bias": True, "qkv_bias": True,
    "attention_out_bias": True, "use_qkv_bias": True, "conv_bias": True, "mamba_proj_bias": True,
    "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
    "logits_scaling": 4.0, "logit_scale": 0.25, "lm_head_multiplier": 0.5, "key_multiplier": 0.7,
    "attention_out_multiplier": 0.8, "attention_in_multiplier": 1.2, "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.8, "routed_scaling_factor": 2.5, "use_qk_norm": True,
    "qk_layernorm": True,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8}
# What a family needs beside SIZES: its own names for sizes, and its kinds of layers.
OWN = {
    "bamba": MAMBA | {"attn_layer_indices": [1, 3], "mamba_n_groups": 1},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "granitemoehybrid": MAMBA
    | {
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "mamba_n_groups": 1,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "kimi_linear": {
        "layer_types": LINEAR,
        "linear_attn_config": {
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_dim": 32},
    "lfm2_moe": {
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    # With 0.3 the chunked recurrence is rounded by 1e-4 nats.
    "olmo_hybrid": {"layer_types": LINEAR, "initializer_range": 0.2},
    "qwen3_next": {"layer_types": LINEAR},
    "qwen3_5_text": {"layer_types": LINEAR, "initializer_range": 0.2},
    "youtu": {"pad_token_id": None},  # transformers zeroes the row of the pad token when it loads
    "qwen3_5_moe_text": {"layer_types": LINEAR},
}
HEADS = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
VISION = {"depth": 1, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
# Built like published models, as far as their configs are known: (model_type, settings).
LIKE = {
    "like Qwen3.5 (image and mtp weights beside the text)": (
        "qwen3_5",
        {"tie_word_embeddings": True, "layer_types": LINEAR, **HEADS},
    ),
    "like Gemma 3 (an image tower beside the text)": ("gemma3", {}),
    "like Gemma 4 (wider full attention, inputs to every layer, shared keys and values)": (
        "gemma4_text",
        {
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}},
        },
    ),
    "like SmolLM3 (every fourth layer without positions)": (
        "smollm3",
        {"no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * LAYERS},
    ),
    "like Ministral 3 (YaRN, queries scaled by position)": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            }
        },
    ),
    "like Granite 4 (Mamba 2, scaled logits)": ("granitemoehybrid", {"logits_scaling": 8.0}),
}


# ---- a tiny model of a family -------------------------------------------------------------------


def tiny_config(kind: str, lively=True, **changes):
    """The configuration of a family with SIZES and OWN, without those it does not let us set."""
    known = AutoConfig.for_model(kind)
    sizes = SIZES | HEADS | (LIVELY if lively else {}) | OWN.get(kind, {}) | changes
    sizes = {
        name: size
        for name, size in sizes.items()
        if name in known.to_dict() or name in known.attribute_map or name in changes
    }
    while True:
        try:
            return AutoConfig.for_model(kind, **sizes)
        except AttributeError as error:
            name = next(
                (name for name in re.findall(r"'(\w+)'", str(error)) if name in sizes), None
            )
            if name is None:
                raise
            del sizes[name]


def with_images(kind: str, settings):
    """A wrapper's config: the text part, and a small tower beside it."""
    text = {**SIZES, **HEADS, **settings}
    known = AutoConfig.for_model(kind)
    small = {name: size for name, size in VISION.items() if hasattr(known.vision_config, name)}
    heads = "num_heads" if hasattr(known.vision_config, "num_heads") else "num_attention_heads"
    small |= {heads: 2, "out_hidden_size": 32, "patch_size": 4, "image_size": 8}
    return AutoConfig.for_model(kind, text_config=text, vision_config=small)


@torch.no_grad()
def enliven(model):
    """Draw what starts as 0 or 1: biases, norms, convolutions, decays, sinks."""
    for name, value in model.named_parameters():
        if value.ndim == 1 or "conv" in name:
            value.add_(0.2 * torch.randn_like(value))


def build(kind: str, like: dict | None = None, seed: int = 0, lively=True):
    """A tiny model of a family, with a forward pass that works. Raises whatever its code raises."""
    for changes in ({}, {"num_key_value_heads": 4}):  # some have as many as heads
        try:
            if like is not None and hasattr(AutoConfig.for_model(kind), "vision_config"):
                config, factory = with_images(kind, like | changes), AutoModelForImageTextToText
            else:
                config = tiny_config(kind, lively, **(like or {}), **changes)
                factory = AutoModelForCausalLM
            with torch.device("meta"):
                count = sum(p.numel() for p in factory.from_config(config).parameters())
            if count > LARGEST:
                raise ValueError(f"{count:,} parameters")
            torch.manual_seed(seed)
            model = factory.from_config(config).eval()
            enliven(model)
            model(input_ids=torch.tensor(PROMPTS[1:2]))
            return model
        except Exception:
            if changes:
                raise


# ---- what happens to it -------------------------------------------------------------------------


class Wrong(Exception):
    """It was accepted and gives other numbers than it should."""


def hold(condition, message: str):
    if not condition:
        raise Wrong(message)


def verdict(kind: str, like: dict | None = None) -> tuple[str, str]:
    """(one of ANSWERS, why)."""
    answer, why = try_out(kind, like, lively=True)
    if answer == "refused" and try_out(kind, like, lively=False)[0] == "works":
        return "works plain", why
    return answer, why


def try_out(kind: str, like: dict | None, lively: bool) -> tuple[str, str]:
    """The same of one model. `lively`: with the settings of LIVELY."""
    place = Path(tempfile.mkdtemp())
    paths = [str(place / name) for name in ("student", "teacher")]
    config = builtin(
        student=paths[0],
        teacher=paths[1],
        max_prompt_tokens=16,
        max_new_tokens=NEW_TOKENS,
        batch_size=len(PROMPTS),
        max_staleness=0,
        top_k=4,
        num_samples=4,
        output_dir=str(place / "run"),
    )
    try:
        try:
            for seed, path in enumerate(paths):
                build(kind, like, seed, lively).save_pretrained(path)
                if kind == "qwen3_5":
                    add_tensor(Path(path, "model.safetensors"), "mtp.fc.weight")
        except Exception as error:
            return "not tried", " ".join(str(error).split())[:100]
        check_config(config)
        check_sampling(config)
        check_trained_part(load(config.student, config))
        check_training(config)
        return "works", ""
    except InputError as error:
        reason = re.sub(rf"{place}/\w+", "", str(error)).replace(" is not supported: ", "")
        return "refused", reason.lstrip(": ")
    except Wrong as error:
        return "wrong", str(error)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(place)


def add_tensor(path: Path, name: str):
    """Weights that stand beside the text in published files, and that its class ignores."""
    save_file(load_file(path) | {name: torch.ones(3, 3)}, path, {"format": "pt"})


def load(path: str, config: Config):
    return load_model(path, torch.float32, CPU, length=config.max_sequence)


def load_with_slots(path: str, config: Config):
    model = load(path, config)
    switch_to_slots(model, config.max_sequence)
    return model


@torch.no_grad()
def check_sampling(config: Config):
    """Through two slots, and again after the weights of the other model were picked up."""
    model = load_with_slots(config.student, config)
    weights = flatten_parameters(model)
    generator = Generator(model, Proposal(), config, set(), len(head_weight(model)), slots=2)
    for path in (config.student, config.teacher_paths[""]):
        reference = load(path, config)
        weights.copy_(flat_parameters(reference))
        # What is not trained is not published either: the towers of the two models differ.
        rollouts = [Rollout(ids, ticket) for ticket, ids in enumerate(PROMPTS)]
        for rollout in generator.generate(rollouts):
            hold_logp(reference, rollout, rollout.behavior_logp, "sampled")


def hold_logp(model, rollout: Rollout, logp, what: str):
    """`logp` [T,C] of the candidates is what a plain forward pass of the whole model gives."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    expected = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
    error = float((expected.gather(1, rollout.candidate_ids) - logp).abs().max())
    hold(error < TOLERANCE, f"{what}: {error:.2g} nats off")


def check_trained_part(model):
    """No parameter outside of it has a gradient, if all may have one."""
    model.requires_grad_(True)
    model(input_ids=torch.tensor(PROMPTS[1:2]), use_cache=False).logits.square().sum().backward()
    trained = {id(p) for p in trained_part(model).parameters()}
    for name, p in model.named_parameters():
        hold(id(p) in trained or p.grad is None, f"{name} is not trained and has a gradient")


def check_training(config: Config):
    """Two updates, a checkpoint, and a third update with and without it."""
    learner = Learner(load(config.student, config), config, VOCAB, torch.float32)
    count = sum(p.numel() for p in learner.parameters)
    channel = Channel.create(config, count, torch.float32)
    rows = fill_table(config, channel)
    drift = learner.update(channel, rows)["drift_k3"]  # from the weights that sampled
    hold(drift < 1e-8, f"trained: learner and sampler differ by {drift:.2g} nats")
    learner.update(channel, rows)
    learner.save(config.output, build_tokenizer(), {})
    saved = str(config.output / "step_2")
    again = Learner(load(saved, config), config, VOCAB, torch.float32)
    again.load(Path(saved))
    first, second = (
        [(p, *each.optimizer.state.get(p, {}).values()) for p in each.parameters]
        for each in (learner, again)
    )
    equal = [torch.equal(a, b) for own, its in zip(first, second) for a, b in zip(own, its)]
    hold(all(equal), "resumed: its weights or moments are others")
    norms = [each.update(channel, rows)["grad_norm"] for each in (learner, again)]
    hold(abs(norms[0] / norms[1] - 1) < 1e-4, f"resumed: its gradients are others: {norms}")


@torch.no_grad()
def fill_table(config: Config, channel: Channel):
    """Rows of the table: the student's rollouts, scored by the teacher."""
    for row, ids in enumerate(PROMPTS):
        write_prompt(channel, row, ids, ids)
        channel.ticket[row] = row
    rows = list(range(len(PROMPTS)))
    model = load_with_slots(config.student, config)
    generator = Generator(model, make_loss(config), config, set(), VOCAB, slots=2)
    rollouts = generator.generate([read_rollout(channel, row) for row in rows])
    for rollout in rollouts:
        write_rollout(channel, rollout)
    teacher = load(config.teacher_paths[""], config)
    Teacher(teacher, config, VOCAB).score(channel, rows)
    for rollout in rollouts:
        scored = channel.teacher_logp[rollout.row, : len(rollout.response_ids)]
        hold_logp(teacher, rollout, scored, "scored")
    return rows


# ---- the page -----------------------------------------------------------------------------------


def table(verdicts: dict[str, tuple[str, str]]) -> str:
    """Markdown: the families of each verdict, those that were refused by the sentence."""
    families: dict[tuple[str, str], list[str]] = {}
    for kind, (answer, why) in sorted(verdicts.items()):
        reason = ""
        if answer not in ("works", "not tried"):
            reason = ": " + re.sub(r"\b[A-Z]\w+ (?=wants|does)", "its attention layer ", why)
        families.setdefault((answer, reason), []).append(kind)

    def order(item):
        (answer, _), kinds = item
        return ANSWERS.index(answer), -len(kinds)

    lines = ["| verdict | families (`model_type`) |", "|---|---|"]
    for (answer, reason), kinds in sorted(families.items(), key=order):
        lines.append(f"| {answer} ({len(kinds)}){reason} | {', '.join(kinds)} |")
    return "\n".join(lines)


def published(verdicts: dict[str, tuple[str, str]]) -> str:
    """Markdown: the models that are built like published ones."""
    lines = ["| built | verdict |", "|---|---|"]
    for name, (answer, why) in verdicts.items():
        lines.append(f"| {name} | {': '.join(filter(None, (answer, why)))} |")
    return "\n".join(lines)


PAGE = """# Which model families work

What a run does with every causal language model of transformers {version}, tried on tiny ones with
random weights (`python -m experiments.families`, torch {torch}, CPU). What default configs leave at
0 or 1 was drawn: biases, norms, convolutions, sinks, scales of logits, embeddings and attention.

- *works*: sampled through the slots, every token has the log-probability of the model's own forward
  pass, within 1e-4, also after slots were refilled and moved and after other weights were picked
  up. The teacher scores and the learner computes the same numbers. After two updates and a
  checkpoint, weights, moments and the next gradient are what they are without the interruption.
- *works plain*: only with the biases and scales of its default config. With others, which
  published checkpoints may have, it is refused with the sentence.
- *refused*: the run ends at its start with this sentence, after "... is not supported:".
- *not tried*: no tiny model could be made from the sizes that most families share. Most of these
  have images or sound beside text, or layers without attention.

A family that is not in the table is refused if transformers does not know it as a causal language
model.

{table}

## Built like published models

{published}

A wrapper with images works text-only: its image tower lies in the checkpoint as it came. Which
tensors a class ignores (Qwen3.5: `mtp.*`, the image tower) transformers decides. Nothing else may
be missing or left over.

## Layers with a state: Qwen3.5 and other hybrids

Such layers remember a recurrent state, the last inputs of a convolution, or both. The slots hold
them beside keys and values (`kv_cache.Step`, transformers' Cache interface of 5.21 or newer; older
versions are refused).

- **Prompts are prefilled with others of the same length.** A state would run on through padding.
- **On a GPU install their kernels:** `pip install flash-linear-attention causal-conv1d`. Without
  them transformers runs plain torch, and each role says so when it first meets such a layer
  ("falling back to its reference PyTorch implementation"). Nobody has measured here what that
  costs. Estimate: in plain torch a decode step of such a layer makes about 30 small launches
  instead of 2, and training loops over chunks of 64 tokens. For 18 such layers that is 500 launches
  or 2 to 3 ms a step.
- **Nemotron-H is refused.** The plain torch of transformers gives other numbers for a step than
  for a prefill, with its own cache as well (0.004 nats here with one group, more with the eight
  that are published). Whether its kernels for GPUs agree is not known here.
"""


def main():
    parser = argparse.ArgumentParser(
        "python -m experiments.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "families",
        nargs="*",
        metavar="FAMILY",
        help="model types, `like` for those built like published ones; default: all",
    )
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    args = parser.parse_args()
    if unknown := set(args.families) - set(KINDS) - {"like"}:
        parser.error(
            f"{', '.join(sorted(unknown))}: transformers knows no such causal language model"
        )
    if args.out and args.families:
        parser.error("--out needs all families")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    asked = args.families or [*KINDS, "like"]
    like = LIKE if "like" in asked else {}
    jobs = {kind: (kind, None) for kind in asked if kind != "like"} | like
    verdicts = {}
    for name, job in jobs.items():
        said = io.StringIO()  # by the libraries
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            verdicts[name] = verdict(*job)
        print(f"{name:24s} {': '.join(filter(None, verdicts[name]))}", flush=True)
    found = [answer for answer, _ in verdicts.values()]
    print(", ".join(f"{found.count(answer)} {answer}" for answer in ANSWERS))
    if args.out:
        versions = {"version": transformers.__version__, "torch": torch.__version__.split("+")[0]}
        tables = {
            "table": table({name: verdicts[name] for name in verdicts if name not in like}),
            "published": published({name: verdicts[name] for name in like}),
        }
        args.out.write_text(PAGE.format(**tables, **versions))


if __name__ == "__main__":
    main()
