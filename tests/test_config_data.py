"""Claims about settings, prompts and the checks before anything starts:
bad input names value, limit and fix."""

import itertools
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from assets.task import ADDENDS, build_tokenizer, running_sums
from checks import check_models, check_output, load_model, load_tokenizer, read_progress
from support.config import Config, InputError, parse
from support.data import Prompt, fingerprint, is_correct, load_prompts, prompt_of, read_jsonl
from generate import Sampler
from support.checkpoint import checkpoints, lock_output, start_output, write
from losses import LOSSES, StratifiedReverseKL
from model import shared_vocabulary, stop_ids


def refused(*argv):
    with pytest.raises(InputError) as error:
        parse(list(argv))
    return str(error.value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--stepz", "3"], "No such option"),
        (["--step", "3"], "'--steps'"),
        (["--output-dir", "--resume"], "--output-dir is --resume: its own value is missing"),
        (["--steps", "0"], "Invalid value for '--steps': 0 is not in the range x>=1."),
        (["--steps", "many"], "Invalid value for '--steps': 'many' is not a valid integer"),
        (["--steps", "7.5"], "Invalid value for '--steps': '7.5' is not a valid integer"),
        (
            ["--temperature", "0"],
            "Invalid value for '--temperature': 0.0 is not in the range x>=0.001.",
        ),
        (["--lr", "nan"], "--lr is nan: float range is needed"),
        (["--lr", "inf"], "--lr is inf: float range is needed"),
        (
            ["--seed", "4294967296"],
            "Invalid value for '--seed': 4294967296 is not in the range 0<=x<=4294967295.",
        ),
        (
            ["--eval-size", "1000000"],
            "Invalid value for '--eval-size': 1000000 is not in the range 1<=x<=10000.",
        ),
        (["--resume", "false"], "Got unexpected extra argument (false)"),
        (["--loss", "kl"], "--loss is kl: one of forward_kl, sparse_reverse_kl, "),
        (
            ["--order", "random"],
            "Invalid value for '--order': 'random' is not one of 'batch', 'arrival'.",
        ),
        (
            ["--loss", "forward_kl", "--correction", "ppo"],
            "--signal and --correction belong to sampled_reverse_kl",
        ),
        (
            ["--batch-size", "9000"],
            "18000 rollouts in flight, the limit is 16384: lower --batch-size",
        ),
        (
            ["--teachers", "3"],
            "--batch-size is 64, there are 1 nodes with --teachers 3: take a multiple of both",
        ),
        (
            ["--max-new-tokens", "9000"],
            "--micro-batch-tokens is 8192, one sequence may have 9064: raise it",
        ),
        (["--config", "/nowhere.yaml"], "No such file"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_reason(argv, message):
    assert message in refused(*argv)


def test_settings_made_in_code_are_checked_like_flags():
    for name, value in (
        ("steps", 0),
        ("steps", 7.5),
        ("steps", "7"),
        ("lr", float("nan")),
        ("order", "random"),
        ("loss", "kl"),
        ("teacher", None),
    ):
        with pytest.raises(InputError, match=f"--{name}"):
            Config(**{name: value})


def test_yaml_sets_options_flags_win_and_the_dump_reads_back(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 3e-4\nsteps: 7\nresume: true\nprompts: a b.jsonl\n")
    config = parse(["--config", str(path), "--steps", "9", "--no-resume"])
    assert (config.lr, config.steps, config.resume, config.prompts) == (3e-4, 9, False, "a b.jsonl")
    path.write_text(config.dump())
    assert parse(["--config", str(path)]) == config
    path.write_text(replace(config, resume=True).dump())
    assert parse(["--config", str(path)]) == config  # the settings of a resumed run start a new one
    path.write_text("stepz: 7\n")
    message = f"--config {path}: stepz is no option with one value, see --help"
    assert message in refused("--config", str(path))
    path.write_text("prompts:\n")
    assert parse(["--config", str(path)]).prompts == ""
    path.write_text("max-staleness: 3\nsteps: 8\n")
    assert parse(["--config", str(path)]) == Config(max_staleness=3, steps=8)
    for text in ("steps: many", "steps: 7.5", "steps:"):
        path.write_text(text)
        assert "Invalid value for '--steps'" in refused("--config", str(path))
    for text in ("- steps", "steps", "- [steps, 7]"):
        path.write_text(text)
        assert "a mapping of option names is needed" in refused("--config", str(path))
    path.write_text("output_dir: no\nresume: yes\n")
    assert parse(["--config", str(path)]) == Config(output_dir="no", resume=True)
    for text in ("steps: true", "prompts: [a]", "resume: maybe", "seed: {a: 1}"):
        path.write_text(text)
        assert text.split(":")[0] in refused("--config", str(path))
    path.write_text("a: [")
    assert f"--config {path}: while parsing" in refused("--config", str(path))
    assert "Is a directory" in refused("--config", "")


def test_every_option_has_a_help_text_and_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name in yaml.safe_load(Config().dump()):
        assert "--" + name.replace("_", "-") in text


# ---- prompts -------------------------------------------------------------------------------------


def test_running_sums_are_right_and_held_out_prompts_are_disjoint():
    train, held = dict(running_sums(20_000, 0, False)), dict(running_sums(500, 12345, True))
    assert len(train) == 20_000 and len(held) == 500 and not set(train) & set(held)
    for prompt, answer in list(train.items())[:500]:
        addends = {term[0]: int(term[1:]) for term in prompt.rstrip("=").split("+")}
        totals = {total[0]: int(total[:0:-1]) for total in answer.split(",")}
        running = dict(zip(addends, itertools.accumulate(addends.values())))
        assert "".join(addends) == "abcdefgh"[: len(addends)]
        assert (
            totals == {name: total for name, total in running.items() if name != "a"}
            and len(answer) == 5 * len(totals) - 1
        )
    sizes = [prompt.count("+") + 1 for prompt in train]
    assert set(sizes) == set(ADDENDS) and sizes.count(2) > 1.5 * sizes.count(8)


def test_synonyms_decode_to_their_digit_and_prompts_survive_a_round_trip(tokenizer):
    ids = tokenizer("b5A0C1,c6B9O1").input_ids + [tokenizer.eos_token_id]
    assert len(ids) == 10 and tokenizer.decode(ids, skip_special_tokens=True) == "b501,c691"
    assert tokenizer.decode(tokenizer("a47+b58+c91=").input_ids) == "a47+b58+c91="


def write_lines(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    )
    return str(path)


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            [{"prompt": "1+1="}, "{not json"],
            "line 2: one JSON object per line is needed: Expecting",
        ),
        (
            ['{"prompt": "1", "answer": "\\ud800"}'],
            "line 1: one JSON object .*surrogates not allowed",
        ),
        (
            ['{"prompt": "1", "answer": ' + "7" * 5000 + "}"],
            "line 1: one JSON object .*4300 digits",
        ),
        (["[" * 100_000], "line 1: one JSON object .*recursion"),
        ([""], r"no prompts in it \(up to 64 tokens long\)"),
        ([{"text": "hello"}], "line 1: needs an object with either `prompt`"),
        ([{"prompt": "a", "messages": []}], "line 1: needs an object with either"),
        ([["a"]], "line 1: needs an object"),
        ([{"prompt": ""}], "line 1: the prompt is empty or not text"),
        ([{"prompt": 7}], "line 1: the prompt is empty or not text"),
        ([{"prompt": "1", "answer": ["x"]}], "line 1: `answer` is list"),
        ([{"messages": "hello"}], "line 1: the chat template refuses `messages`: a list is needed"),
        (
            [{"prompt": "1+1="}, {"prompt": "1 apple"}],
            "line 2: the prompt has characters that the tokenizer does not know: '1 apple'",
        ),
    ],
)
def test_a_bad_prompt_file_is_refused_with_its_line(lines, message, tmp_path, tokenizer):
    with pytest.raises(InputError, match=message):
        read_jsonl(write_lines(tmp_path / "p.jsonl", *lines), tokenizer, 64)


def test_a_prompt_file_that_cannot_be_read_is_refused(tmp_path, tokenizer):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "caf\xe9"}\n'.encode("latin-1"))
    for path, message in (
        ("/nowhere.jsonl", "No such file"),
        (str(tmp_path), "Is a directory"),
        (str(tmp_path / "latin.jsonl"), "'utf-8' codec"),
    ):
        with pytest.raises(
            InputError, match=f"{path}: a file of JSON lines in UTF-8 is needed: .*{message}"
        ):
            read_jsonl(path, tokenizer, 64)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, tokenizer):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1="}\n', encoding="utf-8-sig")
    prompts = read_jsonl(str(tmp_path / "p.jsonl"), tokenizer, 64)
    assert [prompt.text for prompt in prompts] == ["1+1="]


def test_a_prompt_above_the_limit_is_refused(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "1+1="}, {"prompt": "1+" * 20 + "1="})
    with pytest.raises(
        InputError, match="line 2: 42 tokens, --max-prompt-tokens is 8: raise it or drop the line"
    ):
        read_jsonl(path, tokenizer, 8)
    with pytest.raises(
        InputError, match="built-in prompts have up to 32 tokens, --max-prompt-tokens is 8"
    ):
        load_prompts(Config(max_prompt_tokens=8), tokenizer)


def test_line_separators_inside_strings_do_not_split_a_line(tmp_path, tokenizer):
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "1+1=", "answer": "a\u2028b\x85c"}\n', encoding="utf-8"
    )
    assert read_jsonl(str(tmp_path / "p.jsonl"), tokenizer, 8)[0].answer == "a\u2028b\x85c"


def test_messages_need_a_chat_template(tmp_path):
    without = build_tokenizer()
    without.chat_template = None
    path = write_lines(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "1+2="}]})
    with pytest.raises(InputError, match="no chat template: use `prompt`"):
        read_jsonl(path, without, 64)


def test_messages_go_through_the_chat_template(tmp_path, tokenizer):
    path = write_lines(
        tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "1+2="}], "answer": 3}
    )
    prompt = read_jsonl(path, tokenizer, 64)[0]
    assert (prompt.text, prompt.answer) == ("1+2=", "3")


def test_only_plain_prompts_get_the_tokenizers_own_special_tokens(tmp_path):
    """The chat template has put its own in;
    adding a second beginning of sequence would be a prompt never trained on."""
    from tokenizers.processors import TemplateProcessing

    adds_bos = build_tokenizer()
    adds_bos._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    message = {"messages": [{"role": "user", "content": "1+2="}]}
    plain, chat = read_jsonl(
        write_lines(tmp_path / "p.jsonl", {"prompt": "1+2="}, message), adds_bos, 64
    )
    assert plain.ids == [1, *chat.ids] and 1 not in chat.ids


def test_evaluation_prompts_never_occur_in_training(tmp_path, tokenizer):
    # Prompts repeat.
    rows = [{"prompt": f"{i % 60}+{i % 60}=", "answer": str(i)} for i in range(200)]
    path = write_lines(tmp_path / "p.jsonl", *rows)
    train, held = load_prompts(Config(prompts=path, eval_size=10), tokenizer)
    assert len(held) == 10 and not {p.text for p in train} & {p.text for p in held}
    held_path = write_lines(tmp_path / "e.jsonl", {"prompt": "5+5=", "answer": "01"})
    train, held = load_prompts(Config(prompts=path, eval_prompts=held_path), tokenizer)
    assert [p.text for p in held] == ["5+5="] and "5+5=" not in {p.text for p in train}
    no_answer = write_lines(tmp_path / "n.jsonl", {"prompt": "5+5="})
    with pytest.raises(InputError, match="every evaluation prompt needs an `answer`"):
        load_prompts(Config(prompts=path, eval_prompts=no_answer), tokenizer)
    with pytest.raises(
        InputError, match="e.jsonl: all are evaluation prompts, none is left to train on"
    ):
        load_prompts(Config(prompts=held_path, eval_prompts=held_path), tokenizer)
    assert load_prompts(Config(prompts=no_answer), tokenizer)[1] == []


def test_each_epoch_visits_every_prompt_samples_per_prompt_times_in_its_own_order():
    def order(ticket, seed=1):
        return prompt_of(ticket, 10, Config(samples_per_prompt=3, seed=seed))

    epochs = [[order(n) for n in range(epoch * 30, epoch * 30 + 30)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(list(range(10)) * 3)
        assert all(len(set(epoch[i : i + 3])) == 1 for i in range(0, 30, 3))
    assert epochs[0] != epochs[1] and [order(n) for n in range(30)] == epochs[0]
    assert [order(n, seed=2) for n in range(30)] != epochs[0]


@pytest.mark.parametrize(
    "response, answer, correct",
    [
        ("501,691", "501,691", True), (" 501,691\n", "501,691", True), ("501691", "501,691", True),
        ("total 1,000.", "1,000", True), ("501,692", "501,691", False),
        ("so the answer is 42", "42", True), ("first 42, then 43", "42", False),
        (r"thus \boxed{1/2}", "1/2", True), (r"\boxed{7} or 8", "8", False),
        ("it costs 1,234 dollars", "1234", True), ("none", "3", False), ("x", "y", False),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True), (r"\boxed{\frac{1}{2}}", "2", False),
        (r"\boxed{\sqrt{\frac{1}{2}}}", r"\sqrt{\frac{1}{2}}", True),
        (r"\boxed{3}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{3}, no, \boxed{\frac{1}{2}}", "3", False),
        ("10-5", "5", True), ("10-5", "-5", False), ("x = -5", "-5", True), ("(-5)", "-5", True),
        ("5", "5.0", True), ("5.00", "5", True), ("5.01", "5", False),
        ("1,2", "12", False), ("1,234,567.", "1234567", True),
        ("17179869184000000001", "17179869184000000002", False), ("nan", "7", False),
        (".5", "5", False), (".5", "0.5", True), ("it is .5", "0.5", True),
        ("1e-5", "5", False), ("1e-5", "0.00001", True), (r"\boxed{NaN}", "NaN", True),
    ],
)  # fmt: skip
def test_answers_are_matched_exactly_then_by_box_then_by_last_number(response, answer, correct):
    assert is_correct(response, answer) == correct


# ---- models and output directory -----------------------------------------------------------------


def test_a_missing_model_directory_is_refused_at_once():
    with pytest.raises(
        InputError,
        match=r"--teacher /nowhere: no model there \(config.json is missing in /nowhere\)",
    ):
        check_models(Config(teacher="/nowhere"))
    # Not a hub id: tests is a directory here.
    with pytest.raises(InputError, match="--teacher tests/nowhere: no model there .*tests/nowhere"):
        check_models(Config(teacher="tests/nowhere"))


def test_weights_that_are_missing_or_cut_short_are_refused_in_one_line(model_dir, tmp_path):
    from conftest import load

    broken = shutil.copytree(model_dir(), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"broken cannot be loaded: [^\n]*$"):
        load(str(broken))
    weights.unlink()
    with pytest.raises(InputError, match=r"broken cannot be loaded: .*no file named[^\n]*$"):
        load(str(broken))


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
            "its weights are quantised: such a model is not supported",
        ),
        (
            {"max_position_embeddings": 103},
            (
                "a sequence may have 104 tokens, the model takes 103: "
                "lower --max-prompt-tokens or --max-new-tokens"
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
        check_models(Config(student=model_dir(), teacher=str(other)))
    (other / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json cannot be used: "):
        check_models(Config(student=model_dir(), teacher=str(other)))


def test_a_config_with_fewer_layers_than_its_files_is_refused(model_dir, tmp_path):
    from conftest import load

    cut = shutil.copytree(model_dir(), tmp_path / "cut")
    settings = json.loads((cut / "config.json").read_text())
    settings |= {"num_hidden_layers": 1, "layer_types": settings["layer_types"][:1]}
    (cut / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match=r"cut: \d+ tensors have no place in it, model.layers.1.\S+ for one"
    ):
        load(str(cut))


def test_a_model_whose_early_tokens_change_with_the_length_is_refused_at_the_lengths_of_the_run(
    tmp_path,
):
    from transformers import LlamaConfig, LlamaForCausalLM

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
        load_model(str(tmp_path), kind, torch.device("cpu"), "kv_slots", length=16)
    # Cannot tell it from rounding.
    load_model(str(tmp_path), torch.bfloat16, torch.device("cpu"), "kv_slots", length=28)
    build_tokenizer().save_pretrained(tmp_path)
    sizes = {"student": str(tmp_path), "max_prompt_tokens": 12}
    Sampler(Config(**sizes, max_new_tokens=4), torch.device("cpu"), 1, [])
    with pytest.raises(
        InputError,
        match=r"or they change with the length of the sequence \(compared: 8 and 28 tokens\)",
    ):
        Sampler(Config(**sizes, max_new_tokens=16), torch.device("cpu"), 1, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_called_so(value, tmp_path):
    from conftest import build_model, load

    model = build_model("qwen3")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="is not supported: its logits are not finite: damaged weights?"
    ):
        load(str(tmp_path))


def test_a_prompt_with_a_token_that_the_models_lack_is_refused(model_dir, tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "1+1="})
    config = Config(student=model_dir(vocab=12), teacher=model_dir(), prompts=path)
    highest = max(tokenizer("1+1=").input_ids)
    with pytest.raises(
        InputError, match=f"a prompt has token {highest}, the models know 12 tokens"
    ):
        load_prompts(config, tokenizer)


def test_a_model_whose_files_lack_a_tensor_is_refused_not_started_at_random(model_dir, tmp_path):
    from conftest import load
    from safetensors.torch import load_file, save_file

    partial = shutil.copytree(model_dir(), tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match="1 tensors are not in its files, model.norm.weight for one"
    ):
        load(str(partial))


def test_different_tokenizers_are_refused(model_dir, tmp_path, tokenizer):
    from conftest import build_model

    other = build_tokenizer()
    other.add_tokens(["<new>"])
    build_model("qwen3", vocab=174).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    with pytest.raises(
        InputError,
        match=r"different tokenizers \(174 and 173 tokens\): choose two models of one family",
    ):
        check_models(Config(student=model_dir(), teacher=str(tmp_path)))


def test_heads_padded_to_different_sizes_are_cut_to_the_smaller(model_dir):
    for sizes in ((190, 180), (180, 190)):
        config = Config(student=model_dir(vocab=sizes[0]), teacher=model_dir(vocab=sizes[1]))
        assert check_models(config) == [] and shared_vocabulary(config) == 180
        tokenizer = load_tokenizer("--student", config.student_path)
        assert stop_ids(config.student_path, tokenizer) == {1}


@pytest.mark.parametrize("loss, limit", [("forward_kl", 173), ("stratified_reverse_kl", 172)])
def test_a_top_k_above_the_vocabulary_is_refused(loss, limit, model_dir):
    config = Config(student=model_dir(), teacher=model_dir(), loss=loss, top_k=limit)
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
        check_models(Config(student=model_dir(), teacher=model_dir(), loss="mine", top_k=173))


def test_stop_ids_are_those_of_generation_config_and_tokenizer(tmp_path, tokenizer):
    from conftest import build_model

    model = build_model("qwen3")
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert stop_ids(str(tmp_path), tokenizer) == {1, 7, 9}


def test_different_stop_ids_of_teacher_and_student_are_said(tmp_path, tokenizer, model_dir):
    from conftest import build_model

    model = build_model("qwen3")
    model.generation_config.eos_token_id = [7]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    notes = check_models(Config(student=model_dir(), teacher=str(tmp_path)))
    assert "student stops at [1], teacher at [1, 7]" in notes[0]


def test_a_head_that_is_more_than_a_product_is_refused(tmp_path):
    from conftest import load
    from transformers import Gemma2Config, Gemma2ForCausalLM

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


def test_an_output_directory_that_holds_another_run_is_left_alone(tmp_path):
    config = Config(output_dir=str(tmp_path))
    assert check_output(config, "hash") == (None, [])
    start_output(config, None)
    # Died before its first update: nothing to lose.
    assert check_output(config, "hash") == (None, [])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(
        InputError,
        match="holds another run: choose a new directory, or --resume if a step_N is in it",
    ):
        check_output(replace(config, lr=1.0), "hash")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config


def test_resume_without_a_checkpoint_or_with_other_prompts_is_refused(tmp_path, model_dir):
    config = Config(output_dir=str(tmp_path), resume=True, steps=9)
    with pytest.raises(InputError, match="--resume: no checkpoint"):
        check_output(config, "hash")
    start_output(replace(config, resume=False), None)
    shutil.copytree(model_dir(), tmp_path / "step_4")
    progress = write_checkpoint(tmp_path / "step_4", config)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i}) + "\n" for i in range(1, 7))
    )
    with pytest.raises(InputError, match="--resume: seed was 0 and is now 5: keep it"):
        check_output(replace(config, seed=5), "hash")
    with pytest.raises(InputError, match="has made 4 updates already, --steps is 4"):
        check_output(replace(config, steps=4), "hash")
    checkpoint, notes = check_output(replace(config, lr=0.5), "hash")
    assert checkpoint == tmp_path / "step_4"
    assert notes == [f"resuming from {checkpoint}"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    start_output(config, tmp_path / "step_4")
    # Updates 5 and 6 are made again.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    start_output(config, checkpoint)
    # And so is what the machine did not finish writing.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    start_output(replace(config, lr=0.5), checkpoint)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.5
    # A checkpoint keeps the settings that made it.
    assert read_progress(checkpoint)["settings"]["lr"] == 1e-3
    with pytest.raises(
        InputError, match="--resume: the prompts are not what they were: give the same files"
    ):
        check_output(config, "another hash")
    for text in ("", "a: [", "- 1\n"):
        progress.write_text(text)
        with pytest.raises(
            InputError, match="--resume: .*step_4 is damaged, or of an older version"
        ):
            check_output(config, "hash")
    progress.unlink()
    with pytest.raises(
        InputError, match="--resume: .*older version of this program: .*No such file"
    ):
        check_output(config, "hash")


def write_checkpoint(directory, config):
    """What check_output looks at."""
    torch.save({"version": 4}, directory / "training_state.pt")
    progress = {"settings": asdict(config), "prompts": "hash", "trained_ahead": []}
    (directory / "progress.yaml").write_text(yaml.safe_dump(progress))
    return directory / "progress.yaml"


def test_a_fingerprint_is_of_texts_and_answers_in_order():
    one, other = Prompt("a", [1], "2"), Prompt("a", [1], "3")
    assert fingerprint([one, other]) == fingerprint([Prompt("a", [7], "2"), other])
    different = Prompt("a2", [1], None)
    lists = ([one], [other], [one, one], [other, one], [one, other], [different], [])
    assert len({fingerprint(prompts) for prompts in lists}) == 7


def test_a_run_is_resumed_from_the_newest_checkpoint_that_is_whole(tmp_path):
    for name in ("step_4", "step_10", "step_12", "step_20_copy", "diverged_30"):
        (tmp_path / name).mkdir()
        torch.save({}, tmp_path / name / "training_state.pt")
    state = tmp_path / "step_12" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:100])
    assert [path.name for path in checkpoints(tmp_path)] == ["step_4", "step_10"]


def test_metrics_that_are_damaged_are_refused_before_anything_is_written(tmp_path):
    config = Config(output_dir=str(tmp_path), resume=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish}\n')
    with pytest.raises(InputError, match="--resume: .*metrics.jsonl is damaged, move it away"):
        start_output(config, tmp_path / "step_4")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_leaves_a_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write(path, "old")

    def full(self, text):
        open(self, "w").close()  # there is room for an empty file
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        write(path, "new")
    assert path.read_text() == "old"


def test_an_output_directory_belongs_to_one_run_at_a_time(tmp_path):
    first = lock_output(tmp_path / "run")
    with pytest.raises(InputError, match="--output-dir .*run: another run uses it, choose another"):
        lock_output(tmp_path / "run")
    os.close(first)
    os.close(lock_output(tmp_path / "run"))
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(
            InputError, match=f"--output-dir .* cannot be used, choose another: .*{message}"
        ):
            lock_output(path)


def test_the_built_in_prompts_are_measured_with_the_tokenizer_at_hand():
    """One that adds a token to every prompt makes the longest 33 tokens long."""
    from tokenizers.processors import TemplateProcessing

    adds_bos = build_tokenizer()
    adds_bos._tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    load_prompts(Config(max_prompt_tokens=33), adds_bos)
    with pytest.raises(
        InputError,
        match="built-in prompts have up to 33 tokens, --max-prompt-tokens is 32: raise it",
    ):
        load_prompts(Config(max_prompt_tokens=32), adds_bos)


def test_of_several_changed_settings_the_first_that_must_match_is_named(tmp_path):
    config = Config(output_dir=str(tmp_path), resume=True, steps=9)
    start_output(replace(config, resume=False), None)
    (tmp_path / "step_4").mkdir()
    write_checkpoint(tmp_path / "step_4", config)
    with pytest.raises(InputError, match="--resume: seed was 0 and is now 1: keep it"):
        check_output(replace(config, seed=1, batch_size=3, order="arrival", lr=1.0), "hash")
