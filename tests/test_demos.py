"""Claims about the two demonstrations: two teachers, and a teacher with examples in its prompt."""

import itertools
import json
import shutil

import pytest
from conftest import ROOT, build_model
from test_data import byte_tokenizer

from assets.task import neighbour_sums, running_sums
from experiments import context, two_teachers
from support.config import builtin
from support.data import for_teachers, read_jsonl

ASSETS = ROOT / "assets"


def test_sums_of_neighbours_are_right_and_held_out_prompts_are_disjoint(tokenizer):
    train, held_out = (dict(neighbour_sums(2000, 0, held_out)) for held_out in (False, True))
    assert len(train) == len(held_out) == 2000 and not set(train) & set(held_out)
    assert not set(train) & set(dict(running_sums(2000, 0, False)))  # the sign tells them apart
    for prompt, answer in train.items():
        numbers = {term[0]: int(term[1:]) for term in prompt.rstrip("=").split(",")}
        found = {term[0]: int(term[:0:-1]) for term in answer.split(",")}
        assert found == {b: numbers[a] + numbers[b] for a, b in itertools.pairwise(numbers)}
        assert tokenizer.unk_token_id not in tokenizer(prompt + answer).input_ids


@pytest.mark.parametrize(
    "text, is_finished, expected",
    [
        ("The capital is Tokyo.", True, True),
        ("  Why not?  ", True, True),
        ("The capital is Tokyo.", False, False),  # it was cut there
        ("The capital is Tokyo", True, False),
        ("It is Tokyo. It is large.", True, False),
        ("It is\nTokyo.", True, False),
        (" ".join(["word"] * 26) + ".", True, False),
        ("", True, False),
    ],
)
def test_one_short_sentence(text, is_finished, expected):
    assert context.is_short(text, is_finished) == expected


def test_the_examples_stand_in_the_teachers_prompt_alone(tmp_path):
    rows = [*context.rows()]
    assert len(rows) == len({row["messages"][0]["content"] for row in rows}) > context.HELD_OUT
    assert not {row["messages"][0]["content"] for row in rows} & set(context.EXAMPLES)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    build_model("qwen3", vocab=259).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    lengths = {"max_prompt_tokens": 200, "max_teacher_prompt_tokens": 900, "max_new_tokens": 8}
    config = builtin(student=str(tmp_path), teacher="student", **lengths)
    prompts = read_jsonl(str(path), byte_tokenizer(), 200)
    for prompt in for_teachers(prompts, config, {}, vocab=259):
        read = byte_tokenizer().decode(prompt.for_teacher)
        for question, answer in context.EXAMPLES.items():
            assert question in read and answer in read
            assert question not in prompt.text and answer not in prompt.text
        assert read.endswith(prompt.text)  # then both read the same


@pytest.mark.slow
def test_the_study_of_two_teachers_writes_every_line_once_and_continues(tmp_path, monkeypatch):
    def models(out):
        for name, source in (("teacher_pairs", "teacher"), ("student_both", "student")):
            shutil.copytree(ASSETS / source, out / name)

    monkeypatch.setattr(two_teachers, "second_task", models)
    monkeypatch.setattr(two_teachers, "STEPS", 2)
    monkeypatch.setattr(two_teachers, "EVERY", 1)
    lines = two_teachers.make(tmp_path / "a.csv", tmp_path / "out", seeds=1)
    assert len(lines) == 2 * 2 * 3 and lines == two_teachers.read(tmp_path / "a.csv")
    before = (tmp_path / "a.csv").read_bytes()
    assert two_teachers.make(tmp_path / "a.csv", tmp_path / "out", seeds=1) == lines
    assert (tmp_path / "a.csv").read_bytes() == before
    text = two_teachers.summary(lines)
    assert text.count("right") == 2 and text.count("wrong") == 2
    wrong = [
        json.loads(line) for line in (tmp_path / "out" / "wrong.jsonl").read_text().splitlines()
    ]
    assert {row["teacher"] for row in wrong} == {"sums"} and len(wrong) == 20_000
