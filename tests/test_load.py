"""Claims about models and tokenizers: what the project cannot use is refused before it starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU, build_model, load
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from assets.tokenizer import build_tokenizer
from channel import Rollout
from generate import Sampler
from losses import LOSSES, StratifiedReverseKL
from model import head_weight
from support.config import InputError, builtin
from support.load import (
    agree,
    check_models,
    load_model,
    load_tokenizer,
    shared_vocabulary,
    stop_ids,
)

# ---- tokenizers and settings --------------------------------------------------------------------


def test_a_missing_model_directory_is_refused_at_once():
    with pytest.raises(
        InputError,
        match=r"--teacher /nowhere: no model there \(config.json is missing in /nowhere\)",
    ):
        check_models(builtin(teacher="/nowhere"))
    # Not a hub id: tests is a directory here.
    with pytest.raises(InputError, match="--teacher tests/nowhere: no model there .*tests/nowhere"):
        check_models(builtin(teacher="tests/nowhere"))


GPTQ = {"quant_method": "gptq", "bits": 4}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 100,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_type": "nothing"}, "config.json cannot be used: .*nothing"),
        (
            {"quantization_config": GPTQ},
            "its weights are quantised: that is not supported",
        ),
        (
            {"max_position_embeddings": 103},
            (
                "a sequence may have 104 tokens, the model takes 103: "
                "lower --max-new-tokens, --max-prompt-tokens or --max-teacher"
            ),
        ),
        (
            {"rope_parameters": LONGROPE},
            "a sequence may have 104 tokens, the model takes 100: lower",
        ),
    ],
)
def test_a_config_that_the_run_cannot_use_is_refused(settings, message, model_dir, tmp_path):
    other = shutil.copytree(model_dir(), tmp_path / "other")
    (other / "config.json").write_text(
        json.dumps(json.loads((other / "config.json").read_text()) | settings)
    )
    with pytest.raises(InputError, match=message):
        check_models(builtin(student=model_dir(), teacher=str(other)))
    (other / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json cannot be used: "):
        check_models(builtin(student=model_dir(), teacher=str(other)))


def save_pair(model_dir, tmp_path, tokenizer, vocab=190):
    """A directory like model_dir(vocab=190), with another tokenizer."""
    other = shutil.copytree(model_dir(vocab=vocab), tmp_path / "other", dirs_exist_ok=True)
    tokenizer.save_pretrained(other)
    return str(other)


def renamed(old, new):
    tokenizer = build_tokenizer()
    text = tokenizer._tokenizer.to_str().replace(json.dumps(old) + ":", json.dumps(new) + ":")
    return type(tokenizer)(
        tokenizer_object=type(tokenizer._tokenizer).from_str(text),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
    )


def test_tokenizers_that_differ_are_refused_with_the_tokens_that_do(model_dir, tmp_path):
    other = save_pair(model_dir, tmp_path, renamed("a", "A"))
    for pair in ((model_dir(vocab=190), other), (other, model_dir(vocab=190))):
        with pytest.raises(
            InputError, match=r"differ at 1 ids \(5: '[aA]' and '[aA]', ...\): choose"
        ):
            check_models(builtin(student=pair[0], teacher=pair[1]))


def test_tokens_that_one_tokenizer_has_at_its_end_are_cut_off(model_dir, tmp_path):
    """Both heads have rows for them, which padding would have, too. Nobody samples them."""
    more = build_tokenizer()
    more.add_tokens(["<new>", "<newer>"])
    other = save_pair(model_dir, tmp_path, more)
    for student, teacher in ((model_dir(vocab=190), other), (other, model_dir(vocab=190))):
        config = builtin(student=student, teacher=teacher)
        assert check_models(config) == [] and shared_vocabulary(config) == 173
        sampler = Sampler(config, CPU, 4, [])
        weight = head_weight(sampler.generator.model)
        weight[173:] = 100 * weight[5:6]  # would win
        rollouts = sampler.generator.generate([Rollout([5, 6], ticket=i) for i in range(4)])
        assert max(rollout.candidate_ids.max() for rollout in rollouts) < 173


def test_a_stop_token_that_would_be_cut_off_is_refused(model_dir, tmp_path):
    """As a chat format that was added to the student's tokenizer alone."""
    more = build_tokenizer()
    more.add_special_tokens({"eos_token": "<|im_end|>"})
    other = save_pair(model_dir, tmp_path, more)
    (Path(other) / "generation_config.json").write_text('{"eos_token_id": 173}')
    with pytest.raises(InputError, match="a teacher knows no stop token of the student"):
        check_models(builtin(student=other, teacher=model_dir(vocab=190)))


def test_a_post_processor_that_only_one_has_does_no_harm(model_dir, tmp_path):
    adds_bos = build_tokenizer()
    adds_bos._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    other = save_pair(model_dir, tmp_path, adds_bos)
    assert check_models(builtin(student=model_dir(vocab=190), teacher=other)) == []


def test_a_model_with_code_of_its_own_is_refused_and_nothing_is_asked(
    model_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    other = shutil.copytree(model_dir(), tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (other / "config.json").write_text(json.dumps(settings))
    (other / "mine.py").write_text("raise SystemExit")
    with pytest.raises(
        InputError, match="own code is never run; its config.json cannot be used: .*custom code"
    ):
        check_models(builtin(student=model_dir(), teacher=str(other)))


def test_heads_padded_to_different_sizes_are_cut_to_the_smaller(model_dir):
    for sizes in ((190, 180), (180, 190)):
        config = builtin(student=model_dir(vocab=sizes[0]), teacher=model_dir(vocab=sizes[1]))
        assert check_models(config) == [] and shared_vocabulary(config) == 180
        tokenizer = load_tokenizer("--student", config.path("student"))
        assert stop_ids(config.path("student"), tokenizer) == {1}


@pytest.mark.parametrize("loss, limit", [("forward_kl", 173), ("stratified_reverse_kl", 172)])
def test_a_top_k_above_the_vocabulary_is_refused(loss, limit, model_dir):
    config = builtin(student=model_dir(), teacher=model_dir(), loss=loss, top_k=limit)
    check_models(config)
    with pytest.raises(
        InputError,
        match=f"--top-k is {limit + 1}, the vocabulary has 173 ids: {limit} is the most for {loss}",
    ):
        check_models(replace(config, top_k=limit + 1))


def test_a_loss_of_ones_own_with_a_tail_leaves_an_id_for_it(model_dir, monkeypatch):
    class Mine(StratifiedReverseKL):
        pass

    monkeypatch.setitem(LOSSES, "mine", Mine)
    with pytest.raises(
        InputError, match="--top-k is 173, the vocabulary has 173 ids: 172 is the most for mine"
    ):
        check_models(builtin(student=model_dir(), teacher=model_dir(), loss="mine", top_k=173))


def test_one_position_of_large_rounding_is_no_fault_and_a_small_fault_everywhere_is_one():
    """SmolLM2 after 60 updates has a position whose logits are off by 9e-5 by rounding alone."""
    a = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    a /= a.abs().max()
    one, all_of_them = a.clone(), a + 9e-5
    one[7] += 9e-5
    assert agree(a, one) and not agree(a, all_of_them)
    assert agree(a[0], a[0] + 1e-6) and not agree(a[0], a[0] + 9e-5)
    assert not agree(a, torch.full_like(a, torch.nan))


def test_stop_ids_are_those_of_generation_config_and_tokenizer(tmp_path, tokenizer):
    model = build_model("qwen3")
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert stop_ids(str(tmp_path), tokenizer) == {1, 7, 9}


def test_different_stop_ids_of_teacher_and_student_are_said(tmp_path, tokenizer, model_dir):
    model = build_model("qwen3")
    model.generation_config.eos_token_id = [7]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student, teacher = model_dir(), str(tmp_path)
    also = tokenizer.convert_ids_to_tokens(7)
    (note,) = check_models(builtin(student=student, teacher=teacher))
    assert f"student stops at ['<eos>'], teacher at ['<eos>', {also!r}]: --stop-token adds" in note
    assert check_models(builtin(student=student, teacher=teacher, stop_token=(also,))) == []


def test_a_stop_token_of_ones_own_ends_responses_and_is_known_to_the_checkpoint(model_dir):
    tokenizer = load_tokenizer("--student", model_dir())
    config = builtin(student=model_dir(), teacher=model_dir(), stop_token=("a", "3"))
    expected = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["a", "3"])}
    assert Sampler(config, CPU, 2, []).generator.stops == expected and len(expected) == 3
    with pytest.raises(InputError, match="--stop-token a <nil>: not all are in "):
        check_models(replace(config, stop_token=("a", "<nil>")))


def test_chat_templates_that_differ_are_shown(tmp_path, tokenizer, model_dir):
    """Both models read what the student's writes: in the field it cost 0.3 nats of format noise."""
    paths = []
    for name, header in (("student", "<a>"), ("teacher", "<b>"), ("bare", None)):
        paths.append(shutil.copytree(model_dir(), tmp_path / name))
        text = "{{ messages[0].content }}{{ style }}"
        tokenizer.chat_template = text + header if header else None
        (paths[-1] / "chat_template.jinja").unlink()  # the file that was copied
        tokenizer.save_pretrained(paths[-1])
    student, teacher, bare = map(str, paths)
    (note,) = check_models(builtin(student=student, teacher=teacher))
    assert "the student's chat template counts: " in note and "That of the teacher: " in note
    assert "<a>'" in note and "<b>'" in note
    assert check_models(builtin(student=student, teacher=student)) == []
    assert check_models(builtin(student=student, teacher=bare)) == []
    quiet = builtin(student=student, teacher=teacher, chat_template_kwargs='{"style": "(brief)"}')
    assert "(brief)<a>" in check_models(quiet)[0]


# ---- models -------------------------------------------------------------------------------------


def test_weights_that_are_missing_or_cut_short_are_refused_in_one_line(model_dir, tmp_path):
    broken = shutil.copytree(model_dir(), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"broken cannot be loaded: [^\n]*$"):
        load(str(broken))
    weights.unlink()
    with pytest.raises(InputError, match=r"broken cannot be loaded: .*no file named[^\n]*$"):
        load(str(broken))


def test_a_config_with_fewer_layers_than_its_files_is_refused(model_dir, tmp_path):
    cut = shutil.copytree(model_dir(), tmp_path / "cut")
    settings = json.loads((cut / "config.json").read_text())
    settings |= {"num_hidden_layers": 1, "layer_types": settings["layer_types"][:1]}
    (cut / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match=r"cut: \d+ tensors have no place in it, model.layers.1.\S+ for one"
    ):
        load(str(cut))


def test_a_model_whose_files_lack_a_tensor_is_refused_not_started_at_random(model_dir, tmp_path):
    partial = shutil.copytree(model_dir(), tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match="1 tensors are not in its files, model.norm.weight for one"
    ):
        load(str(partial))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_called_so(value, tmp_path):
    model = build_model("qwen3")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="is not supported: its logits are not finite: damaged weights?"
    ):
        load(str(tmp_path))


def test_a_head_that_is_more_than_a_product_is_refused(tmp_path):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=1.0,
        initializer_range=0.5,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a bias, scale or soft-cap follows the head"):
        load(str(tmp_path))


def test_a_model_whose_early_tokens_change_with_the_length_is_refused_at_the_lengths_of_the_run(
    tmp_path,
):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    LlamaForCausalLM(
        LlamaConfig(**sizes, max_position_embeddings=16, rope_parameters=scaling)
    ).save_pretrained(tmp_path)
    for kind in (torch.float32, torch.bfloat16):
        load_model(str(tmp_path), kind, CPU, length=16)
    # Cannot tell it from rounding.
    load_model(str(tmp_path), torch.bfloat16, CPU, length=28)
    build_tokenizer().save_pretrained(tmp_path)
    sizes = {"student": str(tmp_path), "max_prompt_tokens": 12}
    Sampler(builtin(**sizes, max_new_tokens=4), CPU, 1, [])
    with pytest.raises(
        InputError,
        match=r"or they change with the length of the sequence \(compared: 8 and 28 tokens\)",
    ):
        Sampler(builtin(**sizes, max_new_tokens=16), CPU, 1, [])
