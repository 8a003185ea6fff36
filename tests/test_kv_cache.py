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
from model import flatten_parameters, last_hidden
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
NO_CAP = {"num_hidden_layers": 3, "logits_soft_cap": 1e4}
MIXED = ["linear_attention", "full_attention"]
CAPPED = {"final_logit_softcapping": None, "attn_logit_softcapping": 50.0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED = [
    (transformers.Gemma2Config(**SIZES, **CAPPED, head_dim=8), "wants attention with softcap"),
    (transformers.GptOssConfig(**SIZES, **EXPERTS, head_dim=8), "wants attention with s_aux"),
    (transformers.StableLmConfig(**SIZES), "does not pass on what the KV slots need"),
    (
        transformers.RecurrentGemmaConfig(**SIZES | NO_CAP, head_dim=8),
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


@pytest.mark.parametrize("length, is_masked", [(8, False), (9, True)])
def test_with_a_mask_a_prefill_has_a_key_for_every_query_head(length, is_masked, monkeypatch):
    """Else CUDA takes its math kernel: scores in float32, 3 GiB a layer at 8 prompts of 2,048."""
    seen = []

    def recorded(query, key, value, mask, **options):
        seen.append((key.shape[1], options["enable_gqa"], mask is not None))
        return plain(query, key, value, mask, **options)

    plain = kv_cache.F.scaled_dot_product_attention
    monkeypatch.setattr(kv_cache.F, "scaled_dot_product_attention", recorded)
    query, key, value = (torch.randn(2, heads, length, 4) for heads in (6, 2, 2))
    step = Prefill(kv_cache.KVCache(slots=3, max_len=12), torch.tensor([2, 0]))
    out = step.attend(0, query, key, value, 0.5, window=8)
    assert seen == [(6, False, True) if is_masked else (2, True, False)]
    keys, values = (x.repeat_interleave(3, 1) for x in (key, value))
    at = torch.arange(length)
    mask = (at <= at[:, None]) & (at > at[:, None] - 8)
    expected = plain(query, keys, values, mask, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert step.cache.layers[0][0].shape == (3, 2, 12, 4)  # the cache has one of each


# ---- layers with states --------------------------------------------------------------------------


HYBRIDS = ("qwen3_5", "lfm2")


def drawn(generator, prompt_ids, ticket=7):
    (rollout,) = generator.generate([Rollout(prompt_ids, ticket)])
    return rollout.response_ids, rollout.behavior_logp


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("prompt_ids", [[5], [5, 9], [5, 9, 11, 12, 13, 14, 15]])
def test_a_slot_starts_afresh_whatever_it_held_before(family, prompt_ids, model_dir):
    """A prompt of one token is not prefilled, a short one does not fill the convolution."""
    model = load_with_slots(model_dir(family))
    options = {"slots": 1, "stops": (), "loss": "sampled_reverse_kl"}
    used, fresh = new_generator(model, **options), new_generator(model, **options)
    used.generate([Rollout(ids, ticket) for ticket, ids in enumerate(prompts(3))])
    (ids, logp), (expected_ids, expected) = drawn(used, prompt_ids), drawn(fresh, prompt_ids)
    assert ids == expected_ids and torch.equal(logp, expected)


@pytest.mark.parametrize("family", HYBRIDS)
def test_states_of_idle_slots_reach_nobody(family, model_dir):
    """Idle slots run along in the graphs of a GPU, on whatever stands there."""
    model = load_with_slots(model_dir(family))
    options = {"slots": 4, "stops": (), "loss": "sampled_reverse_kl"}
    plain, spoilt = new_generator(model, **options), new_generator(model, **options)
    for state in spoilt.cache.states.values():
        state[1:] = 1e3
    for generator in (plain, spoilt):
        generator.decode = lambda active, real=generator.decode: real(4)
    (ids, logp), (expected_ids, expected) = (drawn(g, [5, 9, 11]) for g in (spoilt, plain))
    assert ids == expected_ids and torch.equal(logp, expected)
    for state in spoilt.cache.states.values():
        state[:] = -1e3  # a new rollout starts on zeros
    many = [[Rollout(ids, t) for t, ids in enumerate(prompts(9))] for _ in range(2)]
    for a, b in zip(plain.generate(many[0]), spoilt.generate(many[1])):
        assert a.response_ids == b.response_ids


@pytest.mark.parametrize("family", HYBRIDS)
def test_new_weights_in_flight_keep_the_states_at_their_addresses(family, model_dir):
    model = load_with_slots(model_dir(family))
    flat = flatten_parameters(model)
    generator = new_generator(model, stops=(), loss="sampled_reverse_kl")
    places = {name: state.data_ptr() for name, state in generator.cache.states.items()}
    generator.add([Rollout(prompts(1)[0])])
    for _ in range(5):
        generator.step()
    before = {name: state.clone() for name, state in generator.cache.states.items()}
    flat.mul_(1.5)
    assert all(torch.equal(before[name], x) for name, x in generator.cache.states.items())
    while generator.active:
        generator.step()
    assert {name: state.data_ptr() for name, state in generator.cache.states.items()} == places
    assert places and all(x[0].any() for x in before.values())


def test_only_prompts_of_one_length_share_a_prefill_if_there_are_states(model_dir, monkeypatch):
    """A recurrent state would run on through the padding. Keys and values behind it are masked."""
    lengths = [4, 4, 9, 2, 9, 1]
    seen = {}
    for family in ("qwen3", "qwen3_5"):
        generator = new_generator(load_with_slots(model_dir(family)), slots=6, stops=())
        prefill, widths = generator.prefill, []
        generator.prefill = lambda slots, w=widths, p=prefill, g=generator: (
            w.append(sorted(g.prefill_len(slot) for slot in slots)) or p(slots)
        )
        generator.add([Rollout(list(range(5, 5 + n)), t) for t, n in enumerate(lengths)])
        seen[family] = widths
    assert seen == {"qwen3": [[1, 3, 3, 8, 8]], "qwen3_5": [[8, 8], [3, 3], [1]]}
