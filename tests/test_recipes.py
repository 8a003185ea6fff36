"""Claims about the recipes: their flags exist, their table is what the estimator prints,
their prompts are read."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from experiments import gsm8k, heal
from support.config import parse

TEXT = (ROOT / "docs" / "recipes.md").read_text()


def test_every_recipe_is_a_command_line_that_the_settings_accept(monkeypatch):
    commands = [
        block.replace("\\\n", " ") for block in re.findall(r"^```\n(.*?)^```$", TEXT, re.M | re.S)
    ]
    flags = [
        shlex.split(line)[shlex.split(line).index("train.py") + 1 :]
        for block in commands
        for line in block.splitlines()
        if "train.py" in line
    ]
    laptop, *boxes = map(parse, flags)
    assert len(boxes) == 4 and laptop.num_candidates == 33 and laptop.max_staleness == 2
    assert all(box.num_candidates == 33 and box.batch_size == 256 for box in boxes)


@pytest.mark.slow
def test_the_table_of_the_recipes_is_what_the_estimator_prints():
    (pairs,) = re.findall(r"experiments\.simulate --plan --pairs ([^`]*)`", TEXT)
    run = subprocess.run(
        [sys.executable, "-m", "experiments.simulate", "--plan", "--pairs", *pairs.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    printed = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines()[2:]
    ]
    rows = {
        cells[0]: cells[1:]
        for cells in (
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in TEXT.splitlines()
            if line.startswith("| ")
        )
    }
    names = (
        "learner ranks, generators, teachers",
        "GiB of a learner, a generator, a teacher",
        "seconds an update",
    )
    for name, column in zip(names, (2, 4, 5)):
        assert rows[name] == [cells[column] for cells in printed], name


def test_a_question_of_gsm8k_becomes_a_prompt_with_its_number():
    item = json.loads(gsm8k.line("How many?", "3 + 4 = 7\n#### 1,007"))
    assert item["answer"] == "1007" and item["messages"][0]["content"].startswith("How many?\n")


def test_the_questions_for_the_real_model_are_many_different_and_always_the_same():
    questions = heal.questions()
    assert len(questions) == len(set(questions)) > 200 and questions == heal.questions()
