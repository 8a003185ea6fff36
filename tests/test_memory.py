"""Claims about the memory estimate: it is near what is counted, and the tool reads it right."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import load, load_with_slots, new_generator
from frozen import ROWS, frozen_table
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

from channel import Rollout
from experiments import memory, splits
from experiments.memory import GIB, GRAPH, USABLE, estimate, largest, model_size, needed
from experiments.memory import shapes_of_steps
from learner import Learner
from support import load as loading
from support.config import InputError, builtin
from support.roles import role_devices


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


def qwen(F=512, mlp=1536, heads=8, groups=4, layers=2):
    settings = Qwen3Config(
        vocab_size=128,
        hidden_size=F,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(settings)


@pytest.mark.parametrize("sizes", [{}, {"F": 256, "mlp": 1024}, {"heads": 16, "groups": 8}])
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
    count, layers, features, _, keys = model_size(str(tmp_path))
    assert (count, layers, features, keys) == (
        sum(p.numel() for p in model.parameters()),
        3,
        32,
        32,
    )


def test_the_estimate_counts_masters_gradients_and_moments_and_shares_them_between_ranks(model_dir):
    config = builtin(student=model_dir(), teacher=model_dir(), micro_batch_tokens=104, head_chunk=1)
    one, two = (needed(config, ranks, 4)["learner"] for ranks in (1, 2))
    learner = Learner(load(model_dir()), config, 173, torch.float32)
    count = sum(p.numel() for p in learner.parameters)
    assert count == model_size(model_dir())[0]
    # Half of them, less what sharding gathers for a layer.
    assert one - two >= 20 * count / 2 - 4 * count
    recomputing = replace(config, checkpoint_activations=True)
    assert needed(recomputing, 1, 4)["learner"] < one


def test_the_parts_are_what_the_roles_hold(model_dir):
    """Weights, KV cache and logits of a generator, counted on one that has run."""
    config = builtin(student=model_dir(), teacher=model_dir(), slots=3, batch_size=64)
    generator = new_generator(load_with_slots(model_dir()), slots=3, max_prompt=64, max_new=40)
    generator.generate([Rollout([5, 6, 7])])
    cache = sum(x.nbytes for layer in generator.cache.layers.values() for x in layer)
    weights = sum(p.nbytes for p in generator.model.parameters())
    parts = estimate(config, 1, 4)["generator"]
    assert (parts["weights"], parts["KV cache"]) == (weights, cache)
    # Logits, log-probabilities, probabilities: of eager steps, of graphs, of evaluation's graphs.
    assert parts["logits"] == 3 * 3 * 3 * 4 * 173


def test_a_generator_has_few_graphs_and_as_many_again_for_evaluation(model_dir):
    """At most eight for 128 slots, whatever the lengths."""
    assert shapes_of_steps(3) == [1, 2, 3] and len(shapes_of_steps(128)) == 8
    paths = {"student": model_dir(), "teacher": model_dir()}
    config = builtin(**paths, slots=64, batch_size=64)
    both, one = (
        estimate(replace(config, eval_every=n), 1, 2)["generator"]["graphs"] for n in (50, 0)
    )
    assert both == 2 * one == 2 * 7 * GRAPH


def test_slots_beyond_the_rollouts_in_flight_take_no_memory(model_dir):
    paths = {"student": model_dir(), "teacher": model_dir()}
    few, many = (builtin(**paths, batch_size=8, slots=slots) for slots in (16, 1000))
    assert needed(few, 1, 4) == needed(many, 1, 4)
    shared = replace(few, generators=2)
    cache = [estimate(config, 1, 4)["generator"]["KV cache"] for config in (few, shared)]
    assert cache[0] == 2 * cache[1]


def test_a_teacher_on_several_gpus_holds_its_share_of_the_parameters_on_each(model_dir):
    one, two = (
        needed(builtin(student=model_dir(), teacher=model_dir(), teacher_gpus=n), 1, 2)["teacher"]
        for n in (1, 2)
    )
    # Its activations are as large on every GPU.
    assert one - two == pytest.approx(2 * model_size(model_dir())[0] / 2)


# ---- the tool ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Flags that name a student and a teacher of which there is config.json alone."""
    directory = tmp_path_factory.mktemp("sizes")
    names = {"student": "1.7B", "teacher": "8B"}
    return [f"--{role}={splits.write_config(directory, name)}" for role, name in names.items()]


@pytest.fixture
def tool(monkeypatch, capsys, sizes):
    """tool(flags) -> what it prints on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["memory", *sizes, *flags])
        memory.main()
        return capsys.readouterr().out

    return call


LONG = ["--max-new-tokens=4032", "--micro-batch-tokens=16384", "--batch-size=256"]


def test_the_tool_says_what_roles_need_and_which_gpus_hold_them(tool, sizes):
    text = tool(*LONG, "--nproc-per-node=2", "--gpu-gib=40", "--slots=128")
    _, config = memory.parse_args([*sizes, *LONG, "--slots=128"])
    for role, parts in estimate(config, 2, 2).items():
        (line,) = [line for line in text.splitlines() if line.startswith(role)]
        numbers = [f"{size / GIB:.1f}" for size in (*parts.values(), sum(parts.values()))]
        assert [cell for cell in line.split() if "." in cell] == numbers
    needs = needed(config, 2, 2)
    places = ["learner 0", "learner 1", "generator 0", "teacher 0"]
    for gpu, place in enumerate(places):
        need = needs[place.split()[0]]
        verdict = "fits" if need <= USABLE * 40 * GIB else "TOO MUCH"
        assert f"GPU {gpu}: {need / GIB:.1f} of 36.0 GiB (90% of 40.0), {verdict}: {place}" in text
    assert "fits" in text and "TOO MUCH" in text


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_what_the_tool_says_fits_does_and_twice_as_much_does_not(sizes, gpus):
    """Alone on a GPU or shared."""
    for gib in (40, 80, 160):
        _, config = memory.parse_args([*sizes, *LONG])
        found = largest(config, 1, [gib * GIB] * gpus, 2)
        if found is None:
            least = memory.smallest(config)
            assert not memory.fits(
                replace(least, checkpoint_activations=False), 1, [gib * GIB] * gpus, 2
            )
            continue
        assert memory.fits(found, 1, [gib * GIB] * gpus, 2)
        tokens, slots = found.micro_batch_tokens, found.slots
        is_useful = tokens < memory.token_limit(config)
        more = replace(found, micro_batch_tokens=2 * tokens)
        assert not (is_useful and memory.fits(more, 1, [gib * GIB] * gpus, 2))
        more = replace(found, slots=2 * slots)
        assert slots == 512 or not memory.fits(more, 1, [gib * GIB] * gpus, 2)


def test_checkpointing_fits_more_tokens(tool):
    *_, plain, recomputing = tool(*LONG).splitlines()
    assert plain.split()[:2] == ["--no-checkpoint-activations", "--micro-batch-tokens"]
    assert recomputing.split()[:2] == ["--checkpoint-activations", "--micro-batch-tokens"]
    assert int(recomputing.split()[2]) > int(plain.split()[2])


def test_where_nothing_fits_the_tool_says_which_option_to_change(tool):
    text = tool(*LONG, "--gpu-gib=10", "--teacher-gpus=2")
    assert "--no-checkpoint-activations  none" in text
    assert "--checkpoint-activations     none" in text
    assert "learner: raise --nproc-per-node" in text
    text = tool("--gpu-gib=50", "--gpus=1")
    assert "Its roles would fit on a GPU each: take more GPUs" in text


def test_without_a_gpu_the_tool_says_for_which_it_answers(tool):
    assert "No GPU is here: these are 3 of 80 GiB" in tool()
    assert "No GPU is here" not in tool("--gpu-gib=80")


def test_with_gpus_the_tool_takes_their_memory(tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = SimpleNamespace(total_memory=50 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    text = tool()
    assert "GPU 1: " in text and "of 45.0 GiB (90% of 50.0)" in text and "GPU 2" not in text
    assert "learner 0, teacher 0" in text  # they share the first
    with pytest.raises(SystemExit, match="3 learner ranks, 2 GPUs: lower --nproc-per-node"):
        tool("--nproc-per-node=3")


def test_the_tool_refuses_what_train_refuses(tool):
    with pytest.raises(SystemExit, match="--micro-batch-tokens is 8, one sequence may have 2048"):
        tool("--micro-batch-tokens=8")
    with pytest.raises(SystemExit, match="sizes of the models cannot be estimated"):
        tool("--student=./nowhere")
    with pytest.raises(SystemExit, match="No such option"):
        tool("--nproc=2")


# ---- where roles are placed -------------------------------------------------------------------


def test_a_teacher_gets_the_gpus_behind_its_own_and_none_of_its_neighbours():
    config = builtin(generators=3, teachers="2", teacher_gpus=2, batch_size=4)
    names = [str(device) for device in role_devices(config, 1, gpus=8)]
    assert names == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:6"]
    held = memory.roles_on_gpus(config, 1, gpus=8)
    assert held[4:] == [[("teacher", 0)]] * 2 + [[("teacher", 1)]] * 2
    config = builtin(generators=8, teachers="2", batch_size=4)
    names = [str(device) for device in role_devices(config, 1, gpus=8)]
    assert names == [f"cuda:{i % 8}" for i in range(11)]  # they share
    config = builtin(generators=3, teachers="2", teacher_gpus=3, batch_size=4)
    match = (
        "--teacher-gpus is 3: the roles then share no GPU and need 10, there are 8: "
        "lower it or their number"
    )
    with pytest.raises(InputError, match=match):
        role_devices(config, 1, gpus=8)


def test_a_teacher_on_several_gpus_is_placed_by_the_library_on_them_alone(model_dir, monkeypatch):
    found = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    asked = {}
    original = loading.AutoModelForCausalLM.from_pretrained

    def from_pretrained(path, device_map, max_memory, **options):
        asked.update(device_map=device_map, max_memory=max_memory)
        return original(path, **options)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model = loading.load_model(model_dir(), torch.float32, torch.device("cuda", 5), gpus=3)
    assert asked == {"device_map": "auto", "max_memory": {5: 900, 6: 900, 7: 900}}
    assert model.device.type == "cpu" and not model.training  # where the library put it, it stays


def test_the_head_of_a_model_on_several_gpus_is_checked_where_its_hidden_states_are(
    model_dir, monkeypatch
):
    """The library moves logits back to the first GPU, hidden states stay on the last."""
    model = load(model_dir())
    moved = []
    weight = model.get_output_embeddings().weight

    class Elsewhere:
        def __len__(self):
            return len(weight)

        def to(self, hidden):
            moved.append(hidden.device)
            return weight

    head = SimpleNamespace(weight=Elsewhere())
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    loading.check_head(model, 8)
    assert moved == [torch.device("cpu")]
    same = torch.ones(3, dtype=torch.bfloat16)
    assert loading.agree(torch.ones(3), same) and not loading.agree(torch.ones(3), torch.zeros(3))


def test_each_named_teacher_has_a_size_and_processes_of_its_own(model_dir):
    names = (f"small={model_dir()}", f"large={model_dir(hidden=40)}")
    config = builtin(student=model_dir(), teacher=names, teachers="small=2,large=1")
    sizes = needed(config, 1, 2)
    assert [*sizes] == ["learner", "generator", "teacher small", "teacher large"]
    alone = needed(replace(config, teacher=(model_dir(hidden=40),), teachers="1"), 1, 2)["teacher"]
    assert sizes["teacher large"] == alone > sizes["teacher small"]
    held = memory.roles_on_gpus(config, 1, 5)
    assert held[2:] == [[("teacher small", 0)], [("teacher small", 1)], [("teacher large", 0)]]
    text = "\n".join(memory.report(config, 1, [2**30] * 5))
    assert "teacher small, 2 of them" in text and "fits: teacher large 0" in text


# ---- recomputing activations ------------------------------------------------------------------


def test_recomputing_layers_changes_no_update(model_dir):
    for family in ("qwen3", "gemma3", "llama"):
        config = builtin(top_k=4, num_samples=2)
        table = frozen_table(model_dir(seed=0), model_dir(seed=1), config)
        plain, recomputing = (
            Learner(load(model_dir(family, seed=2)), settings, 173, torch.float32)
            for settings in (config, replace(config, checkpoint_activations=True))
        )
        assert plain.update(table, ROWS) == recomputing.update(table, ROWS)
        for a, b in zip(plain.parameters, recomputing.parameters):
            assert torch.equal(a.grad, b.grad)


def test_recomputing_keeps_one_tensor_a_layer(model_dir):
    model = qwen().requires_grad_(True)
    before = saved_bytes(model, 128)
    Learner(model, builtin(checkpoint_activations=True), 128, torch.float32)
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
    Learner(model, builtin(checkpoint_activations=True), 90, torch.float32)
    assert torch.equal(model(input_ids=torch.arange(9)[None]).logits, before)
