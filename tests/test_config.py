"""Claims about the settings: what cannot work is refused, with value, limit and fix."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from support.config import InputError, builtin, parse


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
            ["--eval-size", "0"],
            "Invalid value for '--eval-size': 0 is not in the range x>=1.",
        ),
        (["--resume", "false"], "Got unexpected extra argument (false)"),
        (["--loss", "kl"], "--loss kl: one of forward_kl, sparse_reverse_kl, "),
        (
            ["--window", "-1"],
            "Invalid value for '--window': -1 is not in the range x>=0.",
        ),
        (["--signal", "rollout"], "No such option"),
        (["--correction", "ppo"], "No such option"),
        (
            ["--batch-size", "9000"],
            "18000 rollouts in flight, the limit is 16384: lower --batch-size",
        ),
        (
            ["--teachers", "math=2"],
            "--teachers is math=2: give a number from 1 on, or one for every teacher: they have no",
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
        ("window", "arrival"),
        ("loss", "kl"),
        ("teacher", None),
    ):
        with pytest.raises(InputError, match=f"--{name}"):
            builtin(**{name: value})


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
    message = f"--config {path}: stepz is no option of this version, see --help"
    assert message in refused("--config", str(path))
    path.write_text("steps: [7]\n")
    message = f"--config {path}: steps is ['7']: one value is needed"
    assert message in refused("--config", str(path))
    path.write_text("prompts:\n")
    assert "--prompts is missing" in refused("--config", str(path))
    path.write_text("max-staleness: 3\nsteps: 8\n")
    assert parse(["--config", str(path)]) == builtin(max_staleness=3, steps=8)
    for text in ("steps: many", "steps: 7.5", "steps:"):
        path.write_text(text)
        assert "Invalid value for '--steps'" in refused("--config", str(path))
    for text in ("- steps", "steps", "- [steps, 7]"):
        path.write_text(text)
        assert "a mapping of option names is needed" in refused("--config", str(path))
    path.write_text("output_dir: no\nresume: yes\n")
    assert parse(["--config", str(path)]) == builtin(output_dir="no", resume=True)
    for text in ("steps: true", "prompts: [a]", "resume: maybe", "seed: {a: 1}"):
        path.write_text(text)
        assert text.split(":")[0] in refused("--config", str(path))
    path.write_text("a: [")
    assert f"--config {path}: while parsing" in refused("--config", str(path))
    assert "Is a directory" in refused("--config", "")
    nested = "teacher: {math: [a, b], code: c}"
    for text in ("stop_token: {a: b}", "prompts: {a: b}", nested):
        path.write_text(text)
        assert "one value is needed, or a list where" in refused("--config", str(path))
    path.write_text("order: batch")
    assert "order is no option of this version" in refused("--config", str(path))


def test_a_repeatable_option_is_a_list_in_yaml_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    assert parse([]).stop_token == ()
    config = parse(["--stop-token", "<|im_end|>", "--stop-token=</s>"])
    assert config == builtin(stop_token=("<|im_end|>", "</s>"))
    path.write_text(config.dump())
    assert parse(["--config", str(path)]) == config
    assert parse(["--config", str(path), "--stop-token", "x"]) == builtin(stop_token=("x",))
    path.write_text("stop-token: <eos>\n")
    assert parse(["--config", str(path)]) == builtin(stop_token=("<eos>",))
    assert "--stop-token is --resume: its own value is missing" in refused(
        "--stop-token", "--resume"
    )
    for wrong in ((7,), "abc", 7):  # letters are no tokens
        with pytest.raises(InputError, match="--stop-token is "):
            builtin(stop_token=wrong)
    with pytest.raises(InputError, match="--steps is "):
        builtin(steps=(3,))


NAMED = ("math=builtin", "code=student")


def test_teachers_have_names_on_the_command_line_and_in_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    flags = ["--teacher", "math=builtin", "--teacher=code=student", "--teachers=math=2,code=1"]
    config = parse(flags)
    assert config == builtin(teacher=NAMED, teachers="math=2,code=1")
    path.write_text("teacher: {math: builtin, code: student}\nteachers: {math: 2, code: 1}\n")
    assert parse(["--config", str(path)]) == config
    path.write_text(config.dump())
    assert parse(["--config", str(path)]) == config
    assert parse(["--config", str(path), "--teacher=x", "--teachers=1"]).teacher == ("x",)
    path.write_text("teacher: [a=x, b=y]\nteachers: 3\n")
    assert parse(["--config", str(path)]) == builtin(teacher=("a=x", "b=y"), teachers="3")


def test_what_each_process_of_a_node_is_called_and_where_its_model_lies():
    config = builtin(teacher=NAMED, teachers="code=1,math=2", generators=2)
    assets = Path(config.path("student")).parent
    assert config.teacher_paths == {"math": f"{assets}/teacher", "code": f"{assets}/student"}
    assert config.teacher_processes == ["math", "math", "code"]
    assert config.role_names == [
        "generator 0", "generator 1",
        "teacher math 0", "teacher math 1", "teacher code 0", "learner",
    ]  # fmt: skip
    assert builtin(teachers="2").role_names[1:] == ["teacher 0", "teacher 1", "learner"]
    assert builtin(teacher=NAMED, teachers="2").teacher_processes == ["math"] * 2 + ["code"] * 2
    for path in ("runs/lr=1e-4/step_3", "./lr=1/x", "org/name", "a b=c"):  # no names
        assert builtin(teacher=path).teacher_paths == {"": path}


@pytest.mark.parametrize(
    "teacher, teachers, message",
    [
        (("a=x", "y"), "1", "--teacher a=x --teacher y: several teachers need different names"),
        (("x", "y"), "1", "several teachers need different names"),
        (("a=x", "a=y"), "1", "several teachers need different names"),
        (("a=x", "b="), "1", "several teachers need different names"),
        ((), "1", "--teacher is missing"),
        ("", "1", "--teacher is missing"),
        ("x", "0", "--teachers is 0: give a number from 1 on"),
        ("x", "two", "--teachers is two: "),
        ("x", "1.5", "--teachers is 1.5: "),
        ("x", "a=2", "--teachers is a=2: "),
        (("a=x", "b=y"), "a=2", "or one for every teacher: a=1,b=1"),
        (("a=x", "b=y"), "a=2,b=0", "--teachers is a=2,b=0: "),
        (("a=x", "b=y"), "a=2,b=1,c=1", "--teachers is a=2,b=1,c=1: "),
        (("a=x", "b=y"), "2,b=1", "--teachers is 2,b=1: "),
        (("a=x", "b=y"), "a=1,a=2,b=1", "--teachers is a=1,a=2,b=1: "),
        ("x", "2,3", "--teachers is 2,3: "),
        ("x", "9" * 5000, "--teachers is 999"),
    ],
)
def test_teachers_that_are_not_named_clearly_are_refused(teacher, teachers, message):
    with pytest.raises(InputError) as error:
        builtin(teacher=teacher, teachers=teachers)
    assert message in str(error.value)


def test_without_a_student_of_ones_own_the_defaults_are_those_of_the_built_in_task(tmp_path):
    """A file or a flag that names another student gets the defaults for real models."""
    path = tmp_path / "run.yaml"
    own = ["--student=mine", "--teacher=theirs", "--prompts=p.jsonl"]
    path.write_text("student: mine\nteacher: theirs\nprompts: p.jsonl\n")
    for argv in (own, ["--config", str(path)], [*own, "--config", str(path)]):
        config = parse(argv)
        assert (config.student, config.lr, config.max_new_tokens) == ("mine", 1e-6, 1024)
        assert config.keep_checkpoints == 2
    assert parse([]) == builtin() and builtin().lr == 1e-3 and builtin().max_new_tokens == 40
    path.write_text("lr: 0.5\n")
    assert parse(["--config", str(path), "--steps=3"]) == builtin(lr=0.5, steps=3)
    assert "--teacher is missing" in refused("--student=mine")
    assert "--prompts is missing" in refused("--student=mine", "--teacher=theirs")


def test_resume_reads_the_settings_that_the_run_has_left(tmp_path):
    first = builtin(lr=0.5, batch_size=8, output_dir=str(tmp_path))
    (tmp_path / "config.yaml").write_text(first.dump())
    argv = ["--resume", f"--output-dir={tmp_path}"]
    assert parse(argv) == replace(first, resume=True)
    assert parse([*argv, "--steps=900"]) == replace(first, resume=True, steps=900)
    (tmp_path / "other.yaml").write_text("lr: 0.25\n")
    given = parse([*argv, f"--config={tmp_path}/other.yaml"])
    assert given == builtin(lr=0.25, resume=True, output_dir=str(tmp_path))
    elsewhere = parse(["--resume", f"--output-dir={tmp_path}/new"])
    assert elsewhere == builtin(resume=True, output_dir=f"{tmp_path}/new")


def test_every_option_has_a_help_text_and_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name in yaml.safe_load(builtin().dump()):
        assert "--" + name.replace("_", "-") in text


def test_a_batch_that_the_nodes_cannot_share_equally_is_refused(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    message = "--batch-size is 64: take a multiple of the number of nodes, 3"
    with pytest.raises(InputError, match=message):
        builtin()


def test_every_node_has_an_output_directory_of_its_own(monkeypatch):
    config = builtin(output_dir="runs/a")
    places = []
    for node in ("0", "1", "12"):
        monkeypatch.setenv("GROUP_RANK", node)
        places.append(str(config.output))
    assert places == ["runs/a", "runs/a/node_1", "runs/a/node_12"]
