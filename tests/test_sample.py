"""Claims about the command line that samples from a checkpoint."""

import json
from types import SimpleNamespace

import pytest
from conftest import ROOT

from experiments.sample import main
from experiments.says import svg
from support.data import Prompt


def sample(monkeypatch, capsys, *flags):
    monkeypatch.setattr("sys.argv", ["experiments.sample", "--json", *flags])
    main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command_line_answers_every_prompt_in_order_and_marks_the_answers(
    monkeypatch, capsys, tmp_path
):
    prompts = [("a47+b58=", "b501"), ("a47+b58+c91=", "b501,c691"), ("a10+b10=", "wrong")]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in prompts)
    )
    flags = [
        f"--model={ROOT}/assets/teacher",
        f"--prompts={tmp_path}/p.jsonl",
        "--max-new-tokens=40",
        "--slots=2",
    ]
    greedy = sample(monkeypatch, capsys, *flags, "--temperature=0")
    assert [(r["prompt"], r["correct"], r["finish"]) for r in greedy] == [
        (p, a != "wrong", "stop") for p, a in prompts
    ]
    assert greedy[1]["response"] == "b501,c691" and greedy[1]["tokens"] == 10
    first, second, other = (
        sample(monkeypatch, capsys, *flags, f"--seed={seed}") for seed in (0, 0, 1)
    )
    assert first == second and [r["tokens"] for r in first] == [r["tokens"] for r in other] == [
        r["tokens"] for r in greedy
    ]


@pytest.mark.parametrize(
    "flag",
    [
        "--slots=0",
        "--max-new-tokens=0",
        "--temperature=-1",
        "--temperature=nan",
        "--seed=4294967296",
    ],
)
def test_the_command_line_refuses_what_could_never_end(flag, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        sample(monkeypatch, capsys, "--model=x", "--prompts=y", flag)
    assert "at least" in capsys.readouterr().err


def test_the_command_line_refuses_what_cannot_fit_into_memory(monkeypatch, capsys, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a47+b58="}\n')
    monkeypatch.setattr("experiments.sample.available_memory", lambda: 2**30)
    flags = ["--model=builtin", f"--prompts={tmp_path}/p.jsonl"]
    assert len(sample(monkeypatch, capsys, *flags)) == 1
    with pytest.raises(
        SystemExit,
        match=r"GiB are needed, 1.0 are free: lower --slots \(64\) or --max-new-tokens \(9999999\)",
    ):
        sample(monkeypatch, capsys, *flags, "--max-new-tokens=9999999")


def test_the_command_line_keeps_to_the_length_that_the_model_takes(monkeypatch, capsys, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a47+b58="}\n')
    flags = ["--model=builtin", f"--prompts={tmp_path}/p.jsonl"]
    assert len(sample(monkeypatch, capsys, *flags)) == 1
    with pytest.raises(
        SystemExit, match=r"a sequence may have \d+ tokens, the model takes 128: lower"
    ):
        sample(monkeypatch, capsys, *flags, "--max-new-tokens=200")


def test_the_command_line_names_the_least_temperature(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        sample(monkeypatch, capsys, "--model=x", "--prompts=y", "--temperature=0.0005")
    assert "--temperature is 0 (greedy) or at least 0.001" in capsys.readouterr().err


def test_two_models_are_shown_side_by_side_for_people(monkeypatch, capsys, tmp_path):
    rows = [{"prompt": "a10+b10=", "answer": "b020"}, {"prompt": "a10+b11="}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [f"{ROOT}/assets/student", f"{ROOT}/assets/teacher"]
    flags = ["--temperature=0", "--max-new-tokens=8", f"--prompts={tmp_path}/p.jsonl"]
    monkeypatch.setattr("sys.argv", ["experiments.sample", "--model", *models, *flags])
    main()
    out, errors = capsys.readouterr()
    blocks = out.strip().split("\n\n")
    assert len(blocks) == 2
    first = blocks[0].splitlines()
    assert first[0] == "a10+b10=   (answer: b020)"
    assert first[1].startswith("  student  b") and first[2] == "  teacher  b020  [right]"
    assert "right" not in blocks[1] and "teacher: 1 of 1 (100.0%) answers correct" in errors
    monkeypatch.setattr("sys.argv", ["experiments.sample", "--model", *models, *flags, "--first=1"])
    main()
    assert capsys.readouterr().out.strip() == blocks[0]


def test_a_prompt_that_one_model_does_not_read_is_shown_of_none(monkeypatch, capsys):
    def sample(args, model):
        rollout = SimpleNamespace(response_ids=[1], finish=0)
        numbers = [0, 2, 3] if model == "a" else [0, 1, 2, 3]  # one was too long for a's tokenizer
        found = {}
        for i in numbers:
            prompt = Prompt(f"p{i}", [1], source=(i, {"prompt": f"p{i}"}))
            found[i] = prompt, rollout, f"{model}{i}"
        return found

    monkeypatch.setattr("experiments.sample.sample", sample)
    monkeypatch.setattr("sys.argv", ["experiments.sample", "--model", "a", "b"])
    main()
    blocks = capsys.readouterr().out.strip().split("\n\n")
    words = [block.split() for block in blocks]
    assert [[block[0], block[2], block[5]] for block in words] == [
        [f"p{i}", f"a{i}", f"b{i}"] for i in (0, 2, 3)
    ]


def test_without_a_file_the_prompts_are_those_of_the_built_in_task(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["experiments.sample", "--model=builtin", "--first=3"])
    main()
    out = capsys.readouterr().out
    assert out.count("(answer: b") == 3 and out.count("[right]") + out.count("[wrong]") == 3


def test_the_readmes_first_picture_is_drawn_from_the_committed_samples():
    lines = (ROOT / "experiments" / "results" / "says.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert svg(samples) == (ROOT / "docs" / "says.svg").read_text()
    questions = [sample["question"] for sample in samples]
    assert questions[::2] == questions[1::2] and len(set(questions)) == 8
    nasty = [dict(sample, response="<script>") for sample in samples]
    assert "<script>" not in svg(nasty)
