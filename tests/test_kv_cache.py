"""Claims about the KV slots: which models they serve, what a query sees."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from conftest import FAMILIES, load, load_with_slots, new_generator
from test_generate import prompts

import kv_cache
from channel import Rollout
from kv_cache import Decode, Prefill, last_through_slots, switch_to_slots
from model import last_hidden
from support.config import InputError

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
MIXED = ["linear_attention", "full_attention"]
CAPPED = {"final_logit_softcapping": None, "attn_logit_softcapping": 50.0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED = [
    (transformers.Gemma2Config(**SIZES, **CAPPED, head_dim=8), "wants attention with softcap"),
    (transformers.GptOssConfig(**SIZES, **EXPERTS, head_dim=8), "wants attention with s_aux"),
    (transformers.StableLmConfig(**SIZES), "does not pass on what the KV slots need"),
    (
        transformers.RecurrentGemmaConfig(**SIZES | {"num_hidden_layers": 3}, head_dim=8),
        "the KV slots do not hold all that it remembers of earlier tokens",
    ),
    (
        transformers.MiniMaxConfig(**SIZES, **EXPERTS, head_dim=8, layer_types=MIXED),
        "its code does not fit the KV slots: .*get_linear_cache",
    ),
    (
        transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),
        "its attention is its own, the KV slots cannot take its place",
    ),
]


@pytest.mark.parametrize("config, reason", REFUSED, ids=lambda x: getattr(x, "model_type", None))
def test_a_model_whose_memory_the_slots_do_not_hold_is_refused(config, reason, tmp_path):
    """Only where slots are needed: such a model may well be a teacher."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(str(tmp_path))
    with pytest.raises(InputError, match=f"^{tmp_path} is not supported: .*{reason}"):
        switch_to_slots(model, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_slots_gives_its_own_hidden_states(family, model_dir):
    """Which is what the switch compares, here for every length up to 20."""
    reference, model = load(model_dir(family)), load_with_slots(model_dir(family))
    ids = torch.arange(20)[None] + 30
    with torch.no_grad():
        expected = last_hidden(reference, ids)[0]
        found = torch.stack([last_through_slots(model, ids[:, :n])[0] for n in range(2, 21)])
    torch.testing.assert_close(found, expected[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length, is_seen", [(8, False), (9, True)])
def test_the_switch_looks_at_as_many_tokens_as_the_run_has(length, is_seen, model_dir, monkeypatch):
    """Slots that forget the sliding window of 8 are wrong from the 9th token on."""
    attend = {step: step.attend for step in (Prefill, Decode)}
    for step, original in attend.items():

        def without_window(self, *arguments, original=original):
            return original(self, *arguments[:-1], None)

        monkeypatch.setattr(step, "attend", without_window)
    model = load(model_dir("gemma3"))
    with pytest.raises(InputError, match="do not hold all") if is_seen else nullcontext():
        switch_to_slots(model, length)


def test_decoding_does_not_rely_on_the_memory_layout_of_the_attention_kernel(
    model_dir, monkeypatch
):
    """On a GPU the memory-efficient kernel returns its result transposed, the CPU's does not."""
    path = model_dir()
    expected = new_generator(load_with_slots(path)).generate([Rollout(ids) for ids in prompts(5)])
    plain = kv_cache.F.scaled_dot_product_attention
    monkeypatch.setattr(
        kv_cache.F,
        "scaled_dot_product_attention",
        lambda *a, **k: plain(*a, **k).transpose(1, 2).contiguous().transpose(1, 2),
    )
    for a, b in zip(
        expected,
        new_generator(load_with_slots(path)).generate([Rollout(ids) for ids in prompts(5)]),
    ):
        assert a.response_ids == b.response_ids


def test_a_slot_that_waits_beyond_the_length_of_a_graph_sees_something():
    """Softmax over nothing would be NaN, and a NaN in an idle slot's cache would stay there."""
    step = Decode(None, torch.tensor([3, 40]), length=16)
    for window in (None, 8):
        assert (step.mask(window, torch.float32) == 0).any(-1).all()
