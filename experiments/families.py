"""Which model families work: `python -m experiments.families --out docs/families.md`, some minutes.

For every causal language model that transformers knows (`model_type`), a tiny one with random
weights is loaded as train.py loads it. What is accepted must then be exact: three prompts of
different lengths are sampled through two slots, and the log-probability of every token must be what
a plain forward pass of the whole sequence gives, within 1e-4. What is refused must be refused by an
InputError. Sequences are longer than the sliding window.
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
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

from channel import Rollout
from experiments.heal import response_logits
from generate import Generator
from kv_cache import switch_to_slots
from losses import Proposal
from model import head_weight
from support.config import Config, InputError, builtin
from support.load import check_config, load_model

CPU = torch.device("cpu")
VOCAB = 64
LAYERS = 4
LARGEST = 20_000_000  # parameters: what is larger with SIZES has other names for its sizes
PROMPTS = ([5, 6, 7], [9, 3, 8, 4, 11, 12, 13, 2, 6, 7], [3])
NEW_TOKENS = 12
TOLERANCE = 1e-4  # nats
ANSWERS = ("exact", "refused", "wrong", "crash", "not tried")
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
}  # fmt: skip


def tiny_config(kind: str, **changes):
    """The configuration of a family with SIZES, without those that it does not let us set."""
    known = AutoConfig.for_model(kind)
    sizes = {
        name: size
        for name, size in (SIZES | changes).items()
        if name in known.to_dict() or name in known.attribute_map
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


def build(kind: str):
    """A tiny model of a family, with a forward pass that works. Raises whatever its code raises."""
    for changes in ({}, {"num_key_value_heads": 4}):  # some have as many as heads
        try:
            config = tiny_config(kind, **changes)
            with torch.device("meta"):
                count = sum(
                    p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()
                )
            if count > LARGEST:
                raise ValueError(f"{count:,} parameters")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            model(input_ids=torch.tensor(PROMPTS[1:2]))
            return model
        except Exception:
            if changes:
                raise


def verdict(kind: str) -> tuple[str, str]:
    """(one of ANSWERS, why)."""
    directory = Path(tempfile.mkdtemp())
    config = builtin(
        student=str(directory),
        teacher=str(directory),
        max_prompt_tokens=16,
        max_new_tokens=NEW_TOKENS,
    )
    try:
        try:
            build(kind).save_pretrained(directory)
        except Exception as error:
            return "not tried", " ".join(str(error).split())[:100]
        check_config(config)
        reference = load_model(str(directory), torch.float32, CPU, length=config.max_sequence)
        model = load_model(str(directory), torch.float32, CPU, length=config.max_sequence)
        switch_to_slots(model, config.max_sequence)
        return check(model, reference, config)
    except InputError as error:
        reason = str(error).replace(str(directory), "").removeprefix(" is not supported: ")
        return "refused", reason.lstrip(": ")
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(directory)


@torch.no_grad()
def check(model, reference, config: Config) -> tuple[str, str]:
    generator = Generator(model, Proposal(), config, set(), len(head_weight(model)), slots=2)
    error = 0.0
    for rollout in generator.generate([Rollout(ids, ticket) for ticket, ids in enumerate(PROMPTS)]):
        logp = response_logits(reference, rollout).log_softmax(-1).gather(1, rollout.candidate_ids)
        error = max(error, float((logp - rollout.behavior_logp).abs().max()))
    return ("exact", "") if error < TOLERANCE else ("wrong", f"{error:.2g} nats")


def table(verdicts: dict[str, tuple[str, str]]) -> str:
    """Markdown: the families of each verdict, those that were refused by the sentence."""
    families: dict[tuple[str, str], list[str]] = {}
    for kind, (answer, why) in sorted(verdicts.items()):
        reason = ""
        if answer in ("refused", "wrong", "crash"):
            reason = ": " + re.sub(r"^\w+ (?=wants|does)", "its attention layer ", why)
        families.setdefault((answer, reason), []).append(kind)

    def order(item):
        (answer, _), kinds = item
        return ANSWERS.index(answer), -len(kinds)

    lines = ["| verdict | families (`model_type`) |", "|---|---|"]
    for (answer, reason), kinds in sorted(families.items(), key=order):
        lines.append(f"| {answer} ({len(kinds)}){reason} | {', '.join(kinds)} |")
    return "\n".join(lines)


PAGE = """# Which model families work

What a run does with every causal language model of transformers {version}, tried on tiny ones with
random weights (`python -m experiments.families`, torch {torch}, CPU).

- *exact*: sampled through the KV slots, every token has the log-probability of a plain forward
  pass, within 1e-4.
- *refused*: the run ends at its start with this sentence, after "... is not supported:".
- *not tried*: no tiny model could be made from the sizes that most families share. Most of these
  have images or sound beside text, or layers without attention.

A family that is not in the table is refused if transformers does not know it as a causal language
model.

{table}
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
        help="model types; default: all that transformers has",
    )
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    args = parser.parse_args()
    if unknown := set(args.families) - set(KINDS):
        parser.error(
            f"{', '.join(sorted(unknown))}: transformers knows no such causal language model"
        )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    verdicts = {}
    for kind in args.families or KINDS:
        said = io.StringIO()  # by the libraries
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            verdicts[kind] = verdict(kind)
        print(f"{kind:24s} {': '.join(filter(None, verdicts[kind]))}", flush=True)
    found = [answer for answer, _ in verdicts.values()]
    print(", ".join(f"{found.count(answer)} {answer}" for answer in ANSWERS))
    if args.out:
        versions = {"version": transformers.__version__, "torch": torch.__version__.split("+")[0]}
        args.out.write_text(PAGE.format(table=table(verdicts), **versions))


if __name__ == "__main__":
    main()
