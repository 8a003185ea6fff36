"""Claims about the memory estimate: it is near what is counted,
and what cannot fit is refused with numbers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import load
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import checks
from config import Config, InputError
from launch import role_devices
from learner import Learner
from experiments.memory import estimate, model_size, plan_memory

GIB = 2**30
GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


def saved_bytes(model, tokens):
    """Bytes that the backward pass of the layers keeps, in bfloat16, beside the weights."""
    seen = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The tensor stays, so its address is not used again.
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.base_model(input_ids=torch.randint(0, 100, (1, tokens)), use_cache=False)
    return sum(size for size, _ in seen.values())


def qwen(D=512, mlp=1536, heads=8, groups=4, layers=2):
    settings = Qwen3Config(
        vocab_size=128,
        hidden_size=D,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(settings)


@pytest.mark.parametrize("sizes", [{}, {"D": 256, "mlp": 1024}, {"heads": 16, "groups": 8}])
def test_the_activations_of_a_layer_are_estimated_within_a_fifth(sizes, tmp_path):
    two, three = qwen(layers=2, **sizes), qwen(layers=3, **sizes)
    counted = [saved_bytes(three, tokens) - saved_bytes(two, tokens) for tokens in (64, 128)]
    a_token = (counted[1] - counted[0]) / 64  # copies of the weights do not depend on the tokens
    three.save_pretrained(tmp_path)
    assert 2 * model_size(str(tmp_path))[3] == pytest.approx(a_token, rel=0.2)


LLAMA = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("kind, settings", [
    (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    (LlamaForCausalLM, LlamaConfig(**LLAMA, head_dim=None)),
    (GPT2LMHeadModel, GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4)),
])  # fmt: skip
def test_sizes_are_read_whatever_a_family_calls_them(kind, settings, tmp_path):
    model = kind(settings)
    model.save_pretrained(tmp_path)
    count, layers, width, _, keys = model_size(str(tmp_path))
    assert (count, layers, width, keys) == (sum(p.numel() for p in model.parameters()), 3, 32, 32)


def test_the_estimate_counts_masters_gradients_and_moments_and_shares_them_between_ranks(model_dir):
    config = Config(student=model_dir(), teacher=model_dir(), micro_batch_tokens=104, head_chunk=1)
    one, two = (estimate(config, world, False, 4)[0] for world in (1, 2))
    learner = Learner(load(model_dir()), config, 173, torch.float32)
    count = sum(p.numel() for p in learner.parameters)
    assert count == model_size(model_dir())[0]
    # Half of them, less what sharding gathers for a layer.
    assert one - two >= 20 * count / 2 - 4 * count
    assert estimate(config, 1, True, 4)[0] < one  # checkpointing


@pytest.fixture
def gpus(monkeypatch):
    """gpus(bytes): what every GPU has."""
    return lambda size: monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=size)
    )


def test_checkpointing_is_switched_on_when_memory_asks_and_what_cannot_fit_is_refused(
    model_dir, gpus
):
    config = Config(
        student=model_dir(), teacher=model_dir(), micro_batch_tokens=20_000, dtype="bfloat16"
    )
    devices = [GPU, OTHER, OTHER]  # learner, generator, teacher
    plain, recomputing = (estimate(config, 1, recompute, 2)[0] for recompute in (False, True))
    _, generator, teacher = estimate(config, 1, False, 2)
    assert recomputing < 0.8 * plain
    gpus(10 * plain)
    recompute, text = plan_memory(config, 1, devices)
    shared = (generator + teacher) / GIB
    assert not recompute and text.startswith(
        f"estimated memory, GiB: learner {plain / GIB:.1f}, generator "
    )
    assert f"; cuda:1: {shared:.1f} of {0.9 * 10 * plain / GIB:.1f}" in text
    gpus(max(plain, generator + teacher) * 1.05)
    assert plan_memory(config, 1, devices)[0] == (
        plain > 0.9 * 1.05 * max(plain, generator + teacher)
    )
    gpus(max(recomputing, generator + teacher) / 0.9 + 1)
    assert plan_memory(config, 1, devices)[0]
    gpus(recomputing)
    with pytest.raises(
        InputError,
        match=r"learner .* cuda:0: .*: lower --micro-batch-tokens \(20000\) .*--slots \(64\)",
    ):
        plan_memory(config, 1, devices)
    recompute, text = plan_memory(replace(config, checkpoint_activations="off"), 1, devices)
    assert not recompute and "cuda:0: " in text  # one's own risk
    forced = SimpleNamespace(**{**vars(config), "checkpoint_activations": "on"})
    assert plan_memory(forced, 1, [torch.device("cpu")]) == (True, "")


def test_a_teacher_on_several_gpus_holds_its_share_of_the_parameters_on_each(
    model_dir, gpus, monkeypatch
):
    one, two = (
        estimate(Config(student=model_dir(), teacher=model_dir(), teacher_gpus=n), 1, False, 2)[2]
        for n in (1, 2)
    )
    # Its activations are as large on every GPU.
    assert one - two == pytest.approx(2 * model_size(model_dir())[0] / 2)
    monkeypatch.setattr("experiments.memory.estimate", lambda *args: (GIB, 2 * GIB, 3 * GIB))
    gpus(1 << 40)
    devices = [torch.device("cuda", i) for i in (0, 1, 2, 4)]  # teachers on 2 and 3, and on 4 and 5
    _, text = plan_memory(Config(dtype="bfloat16", teacher_gpus=2, teachers=2), 1, devices)
    for device, needed in ((0, 1), (1, 2), (2, 3), (4, 3)):
        assert f"; cuda:{device}: {needed}.0 of " in text


def test_a_teacher_gets_the_gpus_behind_its_own_and_none_of_its_neighbours(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    names = [
        str(device)
        for device in role_devices(
            Config(generators=3, teachers=2, teacher_gpus=2, batch_size=4), 1
        )
    ]
    assert names == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:6"]
    names = [
        str(device) for device in role_devices(Config(generators=8, teachers=2, batch_size=4), 1)
    ]
    assert names == [f"cuda:{i % 8}" for i in range(11)]  # they share
    with pytest.raises(
        InputError,
        match=(
            "--teacher-gpus is 3: then no GPU is shared and the roles need 10, there are 8: "
            "lower it, --teachers"
        ),
    ):
        role_devices(Config(generators=3, teachers=2, teacher_gpus=3, batch_size=4), 1)


def test_a_teacher_on_several_gpus_is_placed_by_the_library_on_them_alone(
    model_dir, gpus, monkeypatch
):
    gpus(1000)
    asked = {}
    original = checks.AutoModelForCausalLM.from_pretrained

    def from_pretrained(path, device_map, max_memory, **options):
        asked.update(device_map=device_map, max_memory=max_memory)
        return original(path, **options)

    monkeypatch.setattr(checks.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model = checks.load_model(model_dir(), torch.float32, torch.device("cuda", 5), gpus=3)
    assert asked == {"device_map": "auto", "max_memory": {5: 900, 6: 900, 7: 900}}
    assert model.device.type == "cpu" and not model.training  # where the library put it, it stays


def test_the_head_of_a_model_on_several_gpus_is_checked_where_its_hidden_states_are(
    model_dir, monkeypatch
):
    """The library moves logits back to the first GPU, hidden states stay on the last.
    `meta` stands for another device."""
    model = load(model_dir())
    moved, original = [], checks.head_weight

    class Elsewhere:
        def __init__(self, weight):
            self.weight = weight

        def __len__(self):
            return len(self.weight)

        def to(self, hidden):
            moved.append(hidden.device)
            return self.weight

    monkeypatch.setattr(checks, "head_weight", lambda model: Elsewhere(original(model)))
    checks.check_forward(model, None, 8)
    assert moved == [torch.device("cpu")]
    assert checks.agree(torch.ones(3), torch.ones(3, dtype=torch.bfloat16)) and not checks.agree(
        torch.ones(3), torch.zeros(3)
    )


def test_recomputing_layers_changes_no_update(model_dir):
    from frozen import ROWS
    from test_learner import gradients, new_learner, stale_table

    for family in ("qwen3", "gemma3", "llama"):
        config = Config(top_k=4, num_samples=2)
        table = stale_table(model_dir, config)
        plain, recomputing = (
            new_learner(model_dir(family, seed=2), config, recompute=on) for on in (False, True)
        )
        assert plain.update(table, ROWS) == recomputing.update(table, ROWS)
        assert torch.equal(gradients(plain), gradients(recomputing))


def test_recomputing_keeps_one_tensor_a_layer(model_dir):
    model = qwen().requires_grad_(True)
    before = saved_bytes(model, 128)
    Learner(model, Config(checkpoint_activations="on"), 128, torch.float32, recompute=True)
    assert saved_bytes(model, 128) < before / 4


def test_recomputing_switches_no_dropout_on():
    """OPT drops out in the layer itself."""
    torch.manual_seed(0)
    settings = OPTConfig(
        vocab_size=90,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.5,
    )
    model = OPTForCausalLM(settings).eval()
    before = model(input_ids=torch.arange(9)[None]).logits
    Learner(model, Config(), 90, torch.float32, recompute=True)
    assert torch.equal(model(input_ids=torch.arange(9)[None]).logits, before)
