"""Claims about several teachers, and about a teacher that reads more than the student."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_model, load
from runs import finish, metrics, read_trace, start, start_nodes
from test_data import CHATML, WITH_TOOLS, byte_tokenizer, write_lines
from test_train import assert_same_run, comparable

from serial import Serial
from support.config import InputError, builtin
from support.data import load_prompts
from support.load import check_models, load_tokenizer, shared_vocabulary

slow = pytest.mark.slow
QUIZ = CHATML.replace("<|im_start|>' + m['role'] + '\n'", "' + m['role'][0] + ':'")  # another one
USER = {"role": "user", "content": "3+4?"}
HINT = {"role": "system", "content": "It is less than ten, and it is odd."}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Three models of one tokenizer; that of "code" has another chat template."""
    found = {}
    for seed, (name, template) in enumerate(
        (("student", CHATML), ("math", CHATML), ("code", QUIZ))
    ):
        found[name] = str(tmp_path_factory.mktemp(name))
        build_model("qwen3", seed, vocab=259).save_pretrained(found[name])
        byte_tokenizer(template).save_pretrained(found[name])
    return found


def chat(*turns, header="<|im_start|>assistant\n"):
    """CHATML by hand."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + header


ASKED = chat(("user", "3+4?"))
ROWS = [  # a row of a file, and what its teacher reads before the response
    ({"prompt": "1+1=", "teacher": "math"}, "1+1="),
    ({"prompt": "1+2=", "teacher": "code"}, "1+2="),
    ({"prompt": "1+3=", "teacher": "math", "teacher_prompt": "It is 4: 1+3="}, "It is 4: 1+3="),
    ({"prompt": "What is 1+4? ", "teacher": "code", "teacher_prompt": "5"}, "5"),
    ({"messages": [USER], "teacher": "math"}, ASKED),
    (
        {"messages": [USER], "teacher": "math", "teacher_messages": [HINT, USER]},
        chat(("system", HINT["content"]), ("user", "3+4?")),
    ),
    # The template is the teacher's own, and its text may be shorter than the student's.
    (
        {"messages": [HINT, USER], "teacher": "code", "teacher_messages": [USER]},
        "u:3+4?<|im_end|>\n<|im_start|>assistant\n",
    ),
    ({"prompt": "2+2=", "teacher": "math", "teacher_messages": [USER]}, ASKED),
]


def config_of(places, tmp_path, rows, **changes):
    """Settings of a run on these rows of a file."""
    settings = {
        "student": places["student"],
        "teacher": tuple(f"{name}={places.get(name)}" for name in ("math", "code")),
        "prompts": write_lines(tmp_path / "prompts.jsonl", *rows),
        "max_prompt_tokens": 128,
        "max_new_tokens": 7,
        "batch_size": len(rows),
    }
    return builtin(**settings | changes)


def serial_of(config):
    prompts, held_out = load_prompts(config, load_tokenizer("--student", config.path("student")))
    return Serial(config, 0, prompts, held_out)


def plain_logp(path, text, response, wanted):
    """log-probabilities of the ids `wanted` [T,C], by transformers alone."""
    ids = load_tokenizer("--teacher", path)(text, add_special_tokens=False).input_ids
    logits = load(path)(torch.tensor([ids + response])).logits[0]
    return logits[len(ids) - 1 : -1].log_softmax(-1).gather(1, wanted)


# ---- what the teacher reads ---------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["stratified_reverse_kl", "forward_kl"])
@pytest.mark.parametrize("longest", [1, 7])
def test_each_teacher_scores_the_students_response_after_its_own_prompt(
    loss, longest, places, tmp_path
):
    """Longer and shorter than the student's, chat and plain, responses of one token and cut."""
    rows, texts = zip(*ROWS)
    changes = {"loss": loss, "top_k": 4, "max_new_tokens": longest, "teachers": "2"}
    config = config_of(places, tmp_path, rows, **changes)
    run = serial_of(config)
    read = {prompt.text: prompt for prompt in run.tickets.prompts}
    assert len(read) == len(rows) - 1  # two rows ask the student the same
    run.update()
    table = run.channel
    seen = set()
    for row in range(len(rows)):
        number = run.tickets.prompts.index(run.tickets.prompt_of(int(table.ticket[row])))
        seen.add(number)
        start, end = int(table.prompt_len[row]), int(table.length[row])
        response = table.tokens[row, start:end].tolist()
        wanted = table.candidate_ids[row, : len(response)].long()
        path = places[rows[number]["teacher"]]
        expected = plain_logp(path, texts[number], response, wanted)
        scored = table.teacher_logp[row, : len(response)]
        torch.testing.assert_close(scored, expected, atol=1e-5, rtol=0)
    assert seen == set(range(len(rows)))


def test_one_system_message_goes_before_every_chat_for_the_teacher_alone(places, tmp_path):
    rows = [
        {"messages": [USER], "teacher": "math"},
        {"messages": [USER, {"role": "assistant", "content": "7"}], "teacher": "math"},
        {"messages": [USER], "teacher": "math", "teacher_messages": [USER | {"content": "9?"}]},
    ]
    config = config_of(places, tmp_path, rows, teacher_system="Be brief.")
    tokenizer = load_tokenizer("--student", places["student"])
    prompts, _ = load_prompts(config, tokenizer)
    assert [prompt.text for prompt in prompts] == [ASKED] * 3
    for prompt, asked in zip(prompts, ("3+4?", "3+4?", "9?")):
        text = chat(("system", "Be brief."), ("user", asked))
        assert tokenizer.decode(prompt.for_teacher) == text


def test_a_teacher_that_is_the_student_and_reads_the_same_has_no_divergence(places, tmp_path):
    rows = [{"prompt": f"{i}+{i}="} for i in range(4)] + [{"messages": [USER]}]
    config = config_of(places, tmp_path, rows, teacher="student", loss="sampled_reverse_kl")
    assert config.teacher_paths == {"": places["student"]}
    metrics = serial_of(config).update()
    assert abs(metrics["reverse_kl"]) < 1e-6 and metrics["grad_norm"] < 1e-5
    other = [row | {"teacher_prompt": "Quite another text. "} for row in rows]
    config = config_of(places, tmp_path, other, teacher="student", loss="sampled_reverse_kl")
    assert serial_of(config).update()["reverse_kl"] > 1e-3


def test_the_cache_keeps_apart_what_teachers_read_before_one_response(places, tmp_path):
    """The student's sequence is the same in all rows."""
    rows = [{"prompt": "1+1=", "teacher_prompt": text} for text in ("1", "2", "1", "12")]
    config = config_of(
        places, tmp_path, rows, teacher=places["math"], loss="forward_kl", top_k=4,
        teacher_cache_mb=8,
    )  # fmt: skip
    run = serial_of(config)
    run.tickets.issue(0)
    table = run.channel
    for row in table.to_generator.get_all():
        for tokens, length in (
            (table.tokens, table.prompt_len),
            (table.teacher_tokens, table.teacher_prompt_len),
        ):
            tokens[row, length[row] : length[row] + 3] = torch.tensor([70, 71, 72])
        table.length[row] = table.prompt_len[row] + 3
        table.candidate_ids[row, :3, 0] = torch.tensor([70, 71, 72])
        run.teachers[0].score(table, [row])
    cache = run.teachers[0].cache
    assert len(cache.entries) == 3 and cache.hits == 1
    for row in range(4):
        read = table.teacher_tokens[row, : table.teacher_prompt_len[row]].tolist()
        text = load_tokenizer("--teacher", places["math"]).decode(read)
        wanted = table.candidate_ids[row, :3].long()
        expected = plain_logp(places["math"], text, [70, 71, 72], wanted)
        torch.testing.assert_close(table.teacher_logp[row, :3], expected, atol=1e-5, rtol=0)


# ---- rows that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, changes, message",
    [
        ({}, {}, "line 2: names no `teacher`: take one of math, code"),
        ({"teacher": "mth"}, {}, "`teacher` is 'mth': none has this name: take one of math"),
        ({"teacher": ["math"]}, {}, "`teacher` is ['math']: none has this name"),
        ({"teacher": 1}, {}, "`teacher` is 1: none has this name"),
        (
            {"teacher": "math", "teacher_prompt": "a", "teacher_messages": [USER]},
            {},
            "give `teacher_prompt` or `teacher_messages`, not both",
        ),
        (
            {"teacher": "math", "teacher_prompt": ""},
            {},
            "for the teacher: the prompt is empty or not text",
        ),
        (
            {"teacher": "math", "teacher_prompt": 7},
            {},
            "for the teacher: the prompt is empty or not text",
        ),
        (
            {"teacher": "math", "teacher_messages": []},
            {},
            "for the teacher: the prompt is empty or not text",
        ),
        (
            {"teacher": "math", "teacher_messages": [USER, {"role": "assistant", "content": "7"}]},
            {},
            "teacher_messages: its last turn is the assistant's, where the student's response",
        ),
        (
            {"teacher": "math", "teacher_messages": [{"role": "user"}]},
            {},
            "a message needs a `role`, and text as `content`",
        ),
        (
            {"teacher": "math"},
            {"teacher_system": "Be brief."},
            "--teacher-system goes before a chat, and this is plain text: give `messages`",
        ),
        (
            {"teacher": "math", "teacher_prompt": "x" * 200},
            {},
            "1 of 2 prompts are longer than --max-teacher-prompt-tokens 128, the longest has 200",
        ),
        (
            {"teacher": "math", "teacher_prompt": "x" * 20},
            {"max_teacher_prompt_tokens": 19},
            "1 of 2 prompts are longer than --max-teacher-prompt-tokens 19, the longest has 20",
        ),
    ],
)
def test_a_row_whose_teacher_cannot_read_it_is_refused_with_its_line(
    row, changes, message, places, tmp_path
):
    rows = [{"prompt": "1+1=", "teacher": "code"}, {"prompt": "1+2="} | row]
    if "teacher_system" in changes:
        rows[0] = {"messages": [USER], "teacher": "code"}
    config = config_of(places, tmp_path, rows, **changes)
    with pytest.raises(InputError) as error:
        load_prompts(config, load_tokenizer("--student", config.path("student")))
    assert message in str(error.value)
    assert "line 2" in str(error.value) or "longer" in message


def test_evaluation_rows_name_a_teacher_and_need_nothing_else_for_it(places, tmp_path):
    """No teacher reads them."""
    rows = [{"messages": [USER], "teacher": "math"}]
    held_out = {"prompt": "1+1=", "answer": "2", "teacher": "code", "teacher_prompt": "x" * 500}
    changes = {"eval_prompts": write_lines(tmp_path / "e.jsonl", held_out), "teacher_system": "Be."}
    config = config_of(places, tmp_path, rows, **changes)
    tokenizer = load_tokenizer("--student", places["student"])
    (prompt,) = load_prompts(config, tokenizer)[1]
    assert (prompt.text, prompt.teacher) == ("1+1=", "code")
    write_lines(tmp_path / "e.jsonl", held_out | {"teacher": "other"})
    with pytest.raises(InputError, match="e.jsonl, line 1: `teacher` is 'other'"):
        load_prompts(config, tokenizer)


def test_tools_and_template_settings_of_a_row_hold_for_a_teachers_chat_too(places, tmp_path):
    tokenizer = byte_tokenizer(WITH_TOOLS)
    for place in ("student", "math"):
        tokenizer.save_pretrained(tmp_path / place)
        shutil.copy(Path(places[place]) / "config.json", tmp_path / place)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    asked = {"messages": [USER], "tools": tools}
    rows = [asked | {"teacher_messages": [HINT, USER]}, asked | {"teacher_prompt": [HINT, USER]}]
    rows.append(asked | {"teacher_prompt": "plain"})
    config = config_of(
        {"student": str(tmp_path / "student")}, tmp_path, rows, teacher=str(tmp_path / "math"),
        max_prompt_tokens=400,
    )  # fmt: skip
    read = [tokenizer.decode(p.for_teacher) for p in load_prompts(config, tokenizer)[0]]
    assert read[0] == read[1] and '"add"' in read[0] and HINT["content"] in read[0]
    assert read[2] == "plain"


def test_rows_that_are_too_long_for_the_teacher_can_be_left_out(places, tmp_path, capsys):
    rows = [{"prompt": "1+1="}, {"prompt": "1+2=", "teacher_prompt": "x" * 20}]
    changes = {"teacher": places["math"], "max_teacher_prompt_tokens": 19}
    config = config_of(places, tmp_path, rows, drop_long_prompts=True, **changes)
    prompts, _ = load_prompts(config, load_tokenizer("--student", config.path("student")))
    assert [prompt.text for prompt in prompts] == ["1+1="]
    assert (
        "1 of 2 prompts are longer than --max-teacher-prompt-tokens 19" in capsys.readouterr().out
    )


def test_with_one_teacher_rows_need_not_name_it_and_may_name_no_other(places, tmp_path):
    tokenizer = load_tokenizer("--student", places["student"])
    rows = [{"prompt": "1+1="}, {"prompt": "1+2=", "teacher": "math"}]
    config = config_of(places, tmp_path, rows, teacher=f"math={places['math']}")
    prompts, _ = load_prompts(config, tokenizer)
    assert [prompt.teacher for prompt in prompts] == ["math", "math"]
    with pytest.raises(
        InputError, match="line 2: `teacher` is 'math': .* --teacher NAME=DIR makes"
    ):
        load_prompts(replace(config, teacher=(places["math"],)), tokenizer)


def test_every_teacher_must_read_text_like_the_student(places, model_dir, tmp_path):
    config = config_of(places, tmp_path, [{"prompt": "1"}])
    assert shared_vocabulary(config) == 259
    wrong = replace(config, teacher=(f"math={places['math']}", f"code={model_dir()}"))
    with pytest.raises(InputError, match="the tokenizers of --student and --teacher code differ"):
        check_models(wrong)
    missing = replace(config, teacher=("math=/nowhere", f"code={places['code']}"))
    with pytest.raises(InputError, match="--teacher math /nowhere: no model there"):
        check_models(missing)
    (note,) = check_models(config)
    assert "That of the teacher code: " in note  # its chat template is another


def test_a_teacher_takes_longer_sequences_than_the_student_only_if_it_can(places, tmp_path):
    limit = load(places["math"]).config.max_position_embeddings
    rows = [{"prompt": "1"}]
    fits = {"max_teacher_prompt_tokens": limit - 7, "max_prompt_tokens": 16}
    check_models(config_of(places, tmp_path, rows, **fits))
    with pytest.raises(InputError, match=f"may have {limit + 1} tokens, the model takes {limit}"):
        check_models(
            config_of(places, tmp_path, rows, **fits | {"max_teacher_prompt_tokens": limit - 6})
        )
    budget = {"micro_batch_tokens": 100, "max_prompt_tokens": 16, "max_teacher_prompt_tokens": 94}
    with pytest.raises(InputError, match="micro-batch-tokens is 100, one sequence may have 101"):
        config_of(places, tmp_path, rows, **budget)


# ---- metrics ------------------------------------------------------------------------------------


def test_the_reverse_kl_of_each_teacher_is_that_of_its_own_rows(places, tmp_path):
    """Together they make the total, and a run of one's rows alone has the same."""
    rows = [row for row, _ in ROWS]
    config = config_of(places, tmp_path, rows, loss="sampled_reverse_kl")
    run = serial_of(config)
    found = run.update()
    table = run.channel
    sums = {"math": [0.0, 0], "code": [0.0, 0]}
    for row in range(len(rows)):
        count = int(table.length[row] - table.prompt_len[row])
        name = run.tickets.prompt_of(int(table.ticket[row])).teacher
        of_row = [x[row, :count] for x in (table.behavior_logp, table.teacher_logp)]
        kl = run.learner.student.loss.reverse_kl(of_row[0], of_row[1], of_row[0])
        sums[name][0] += float(kl.sum())
        sums[name][1] += count
    for name, (kl, count) in sums.items():
        assert found[f"reverse_kl/{name}"] == pytest.approx(kl / count, rel=1e-4)
    total = sum(found[f"reverse_kl/{name}"] * count for name, (_, count) in sums.items())
    assert found["reverse_kl"] == pytest.approx(total / found["tokens"], rel=1e-6)


def test_with_one_nameless_teacher_no_metric_has_a_name(places, tmp_path):
    rows = [{"prompt": "1+1="}, {"prompt": "1+2="}]
    config = config_of(places, tmp_path, rows, teacher=places["math"])
    assert not any("/" in name for name in serial_of(config).update())


# ---- whole runs ---------------------------------------------------------------------------------

COUNT = 40
SUMS = [
    {
        "prompt": f"{i}+{i}=",
        "answer": f"{2 * i}",
        "teacher": "code" if i % 3 else "math",
        **({"teacher_prompt": f"({2 * i}) {i}+{i}="} if i % 2 else {}),
    }
    for i in range(COUNT)
]


@pytest.fixture
def flags(places, tmp_path):
    """A run with three processes of two teachers."""
    return [
        f"--student={places['student']}", f"--teacher=math={places['math']}",
        f"--teacher=code={places['code']}", "--teachers=math=2,code=1",
        f"--prompts={write_lines(tmp_path / 'p.jsonl', *SUMS)}", "--eval-size=4",
        "--batch-size=12", "--steps=4", "--max-staleness=0", "--eval-every=2", "--lr=1e-3",
        "--teacher-cache-mb=1",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_synchronous_runs_with_three_processes_of_two_teachers_are_equal_to_the_last_bit(
    flags, tmp_path
):
    for name in ("a", "b"):
        finish(start(tmp_path / name, *flags))
    ours, theirs = (comparable(metrics(tmp_path / name)) for name in ("a", "b"))
    assert ours == theirs and len(ours) == 4
    record = metrics(tmp_path / "a")[-1]
    for name in ("math", "code"):
        assert record[f"reverse_kl/{name}"] > 0
    named = [name for name in record if name.startswith("teacher_busy/")]
    assert named == ["teacher_busy/math 0", "teacher_busy/math 1", "teacher_busy/code 0"]
    tracks = {e["args"]["name"] for e in read_trace(tmp_path / "a") if e["ph"] == "M"}
    assert tracks == {
        "generator 0",
        "teacher math 0",
        "teacher math 1",
        "teacher code 0",
        "learner",
    }
    evaluated = [name for name in record if name.startswith("eval_accuracy/")]
    assert evaluated and json.loads(json.dumps(record)) == record


@slow
def test_one_process_of_each_teacher_and_two_nodes_score_like_three_processes(flags, tmp_path):
    finish(start(tmp_path / "three", *flags))
    finish(start(tmp_path / "one", *flags, "--teachers=1"))
    for agent in start_nodes(2, tmp_path / "nodes", *flags):
        finish(agent)
    three = metrics(tmp_path / "three")
    for name in ("one", "nodes"):
        assert_same_run(metrics(tmp_path / name), three)
        for teacher in ("math", "code"):
            key = f"reverse_kl/{teacher}"
            assert metrics(tmp_path / name)[0][key] == pytest.approx(three[0][key], rel=1e-4)


NOTES = """
import json
from tickets import Tickets
real = Tickets.trained
def trained(self, tickets):
    with open("{path}", "a") as file:
        file.write(json.dumps(sorted(tickets)) + "\\n")
    real(self, tickets)
Tickets.trained = trained
"""


@slow
def test_a_run_with_a_window_of_two_that_is_resumed_trains_every_ticket_once(flags, tmp_path):
    """With lag within its bound."""
    plugin = tmp_path / "notes.py"
    plugin.write_text(NOTES.format(path=tmp_path / "tickets"))
    more = ["--max-staleness=1", "--window=2", "--generators=2", f"--plugin={plugin}"]
    more += ["--eval-every=0", "--save-every=1"]
    finish(start(tmp_path / "run", *flags, *more, "--steps=7"))
    finish(start(tmp_path / "run", *flags, *more, "--steps=12", "--resume"))
    lines = [json.loads(line) for line in (tmp_path / "tickets").read_text().splitlines()]
    assert len(lines) == 12 and sorted(sum(lines, [])) == list(range(12 * 12))
    assert max(record["lag_max"] for record in metrics(tmp_path / "run")) <= 3
