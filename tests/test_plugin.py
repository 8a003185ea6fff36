"""Claims about a loss in a file of one's own: --plugin finds it, and refuses a wrong one."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_losses import V, gradient, outcomes, policies

import losses
from losses import LOSSES, Loss, import_plugin, make_loss
from serial import Serial
from support.config import InputError, builtin, parse
from support.data import Prompt

SEVEN = """
from losses import LOSSES, Loss

class Seven(Loss):
    def __init__(self, config):
        super().__init__(top=config.top_k)

    def value(self, s, t, b):
        return 7.0 + 0.0 * s.sum(-1)

LOSSES["seven"] = Seven
"""


@pytest.fixture(autouse=True)
def as_before():
    """What a plugin adds to LOSSES is taken back."""
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


def plugin(directory, code=SEVEN, name="mine.py"):
    path = directory / name
    path.write_text(code)
    return str(path)


def refused(**settings):
    """The message, which is one line."""
    with pytest.raises(InputError) as error:
        builtin(**settings)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_file_adds_a_loss_and_is_imported_once(tmp_path):
    path = plugin(tmp_path, SEVEN + "LOSSES.setdefault('times', []).append(1)\n")
    config = parse(["--plugin", path, "--loss", "seven", "--top-k", "3"])
    loss = make_loss(config)
    assert type(loss) is LOSSES["seven"] and loss.num_columns == config.num_candidates == 4
    assert LOSSES["times"] == [1]


def test_a_module_adds_losses_by_its_name(monkeypatch):
    for name in ("sampled_current_is", "sampled_rollout_ppo", "top_k_baseline"):
        LOSSES.pop(name)
    import_plugin.cache_clear()
    monkeypatch.delitem(sys.modules, "experiments.corrections")
    config = builtin(plugin="experiments.corrections", loss="sampled_rollout_ppo")
    assert type(make_loss(config)) is LOSSES["sampled_rollout_ppo"]
    assert "top_k_baseline" in LOSSES


@pytest.mark.parametrize("name", ["losses.py", "support.py", "json.py"])
def test_a_file_takes_the_place_of_no_module_that_has_its_name(name, tmp_path):
    modules = {key: sys.modules.get(key) for key in ("losses", "support", "json")}
    config = builtin(plugin=plugin(tmp_path, name=name), loss="seven")
    assert {key: sys.modules.get(key) for key in modules} == modules
    assert type(make_loss(config)).__bases__ == (losses.Loss,)


def test_two_files_of_one_name_are_two_plugins(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = plugin(tmp_path / name, SEVEN.replace("seven", name))
        assert type(make_loss(builtin(plugin=path, loss=name))) is LOSSES[name]


@pytest.mark.parametrize(
    "name, code, message",
    [
        ("/nowhere/mine.py", None, "--plugin /nowhere/mine.py: .*No such file"),
        ("no_such.module", None, "--plugin no_such.module: No module named 'no_such'"),
        ("mine.py", "1 / 0", "--plugin .*mine.py: division by zero"),
        ("mine.py", "class A:\npass", "--plugin .*mine.py: expected an indented block .*line 2"),
        ("mine.py", "import no_such", "--plugin .*mine.py: No module named 'no_such'"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named_in_one_line(name, code, message, tmp_path):
    name = plugin(tmp_path, code) if code else name
    assert re.match(message, refused(plugin=name))


def test_a_loss_that_nobody_has_added_is_refused_with_those_there_are(tmp_path):
    message = refused(plugin=plugin(tmp_path), loss="eight")
    shipped = "forward_kl, sparse_reverse_kl, sampled_reverse_kl, stratified_reverse_kl, "
    assert message.startswith(f"--loss eight: one of {shipped}") and "seven is needed" in message


NEEDED = r", not \[5\] with a gradient to s"
WRONG = {
    "mean": ("super().__init__(top=2)", "s.mean()", r"gives \[\]" + NEEDED),
    "columns": ("super().__init__(top=2)", "s", r"gives \[5, 3\]" + NEEDED),
    "a column": ("super().__init__()", "s", r"gives \[5, 1\]" + NEEDED),
    "no gradient": ("super().__init__(top=2)", "(t - b).sum(-1)", r"gives \[5\]" + NEEDED),
    "detached": ("super().__init__(top=2)", "s.detach().sum(-1)", r"gives \[5\]" + NEEDED),
    "a number": ("super().__init__(top=2)", "1.0", r"gives \[1.0\]" + NEEDED),
    "nothing": ("super().__init__(top=2)", "None", r"gives \[None\]" + NEEDED),
    "a tail of nothing": ("super().__init__(tail=4)", "s.sum(-1)", r"`propose` of 2 slots gives"),
    "an error": ("super().__init__(top=2)", "s @ t", r"mat1 and mat2 shapes"),
    "no value": ("super().__init__(top=2)", None, r"'Wrong' object has no attribute 'value'"),
    "no init": (None, "s.sum(-1)", r"__init__\(\) takes 1 positional argument but 2 were given"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_loss_that_could_not_train_is_refused_at_the_start(fault, monkeypatch):
    """The learner would add up whatever `value` returns."""
    init, value, reason = WRONG[fault]
    code = "class Wrong(Loss):\n    pass\n"
    if init:
        code += f"    def __init__(self, config): {init}\n"
    if value:
        code += f"    def value(self, s, t, b): return {value}\n"
    scope = {"Loss": Loss}
    exec(code, scope)
    monkeypatch.setitem(LOSSES, "wrong", scope["Wrong"])
    assert re.match(rf"--loss wrong: .*{reason}", refused(loss="wrong"))


@pytest.mark.slow
def test_a_run_of_processes_trains_with_a_file_that_is_called_losses_py(pair, tmp_path):
    """Generator and teacher import it anew, in processes of their own."""
    plugin(tmp_path, name="losses.py")
    sizes = ["--batch-size=4", "--slots=4", "--max-prompt-tokens=32", "--max-new-tokens=6"]
    flags = [*sizes, "--steps=2", "--eval-every=0", "--cpu-threads=1", "--output-dir=run"]
    mine = ["--plugin=losses.py", "--loss=seven", "--top-k=3"]
    command = [sys.executable, str(ROOT / "train.py"), *pair, *flags, *mine]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [7.0, 7.0]


# ---- the example of the README -------------------------------------------------------------------


@pytest.fixture
def example(tmp_path):
    """--plugin with the README's example: the file as it stands there."""
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```\n<!-- /example -->", text, re.S)
    return {"plugin": plugin(tmp_path, code), "loss": "jeffreys_kl"}


def jeffreys(s, t):
    return (s.exp() - t.exp()) * (s - t)


def test_the_example_of_the_readme_gets_the_candidates_that_it_names(example):
    loss = make_loss(builtin(**example, top_k=3, num_samples=2))
    assert type(loss).__name__ == "JeffreysKL" and loss.teacher_top == 0
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, logp = loss.propose(logits.clone(), uniforms)
    assert ids.shape == logp.shape == (50, loss.num_columns) == (50, 1 + 3 + 2)
    full, top = logits.log_softmax(-1), logits.topk(3).indices
    assert torch.equal(ids[:, 1:4], top)
    torch.testing.assert_close(logp[:, :4], full.gather(1, ids[:, :4]))
    tail = full.scatter(1, top, float("-inf")).log_softmax(-1)
    torch.testing.assert_close(logp[:, 4:], tail.gather(1, ids[:, 4:]))
    assert logp.isfinite().all()
    cumulative = tail.double().exp().cumsum(-1)
    for column, uniform in zip((4, 5), (1, 2)):  # the interval of the drawn id holds its number
        above = cumulative.gather(1, ids[:, column, None])[:, 0]
        below = above - tail.double().exp().gather(1, ids[:, column, None])[:, 0]
        u = uniforms[:, uniform]
        assert (below - 1e-6 <= u).all() and (u <= above + 1e-6).all()


@pytest.mark.parametrize("lag", [0.0, 1.0])
def test_the_example_of_the_readme_has_the_value_and_gradient_of_what_it_says(example, lag):
    """Exactly, as a mean over the draws of the tail: the Jeffreys divergence is a plain sum."""
    student, t, b = policies(7, lag)
    loss = make_loss(builtin(**example, top_k=3, num_samples=1))
    exact = jeffreys(student.log_softmax(-1), t).sum()
    value, grad = 0.0, torch.zeros_like(student)
    for ids, behavior, p in outcomes(loss, b):
        one = lambda s: loss.value(s[ids][None], t[ids][None], behavior[None])  # noqa: E731, B023
        value += p * one(student.log_softmax(-1))[0]
        grad += p * gradient(one, student)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(grad, gradient(lambda s: jeffreys(s, t), student))


def test_the_example_of_the_readme_trains(example, model_dir, tokenizer):
    """One update with tiny models, the metric and the gradient against dense logits."""
    config = builtin(
        **example,
        top_k=3,
        batch_size=4,
        max_new_tokens=6,
        max_grad_norm=1e9,
        head_chunk=5,
        student=model_dir(seed=0),
        teacher=model_dir(seed=1),
    )
    prompts = [Prompt(text, tokenizer(text).input_ids) for text in ("a12+b34=", "a56+b78+c90=")]
    run = Serial(config, 0, prompts, [])
    reference = type(run.learner.model).from_pretrained(config.path("student"))
    rows = []
    batch = run.tickets.batch
    run.tickets.batch = lambda version: rows.append(batch(version)) or rows[-1]
    metrics = run.update()
    table, parts = run.channel, []
    for row in rows[0]:
        length, first = int(table.length[row]), int(table.prompt_len[row])
        count = length - first
        logits = reference(table.tokens[row : row + 1, :length].long()).logits[0, first - 1 : -1]
        s = logits.log_softmax(-1).gather(1, table.candidate_ids[row, :count].long())
        t, b = table.teacher_logp[row, :count], table.behavior_logp[row, :count]
        terms = jeffreys(s, t)
        parts.append(terms[:, 1:4].sum(-1) + (terms[:, 4:] / b[:, 4:].exp()).mean(-1))
    expected = torch.cat(parts).mean()
    expected.backward()
    assert metrics["tokens"] == len(torch.cat(parts))
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3) and norm > 0
    moved = zip(run.learner.parameters, reference.parameters())
    assert any(not torch.equal(ours, before) for ours, before in moved)


def test_the_example_of_the_readme_is_the_file_that_it_names():
    text = (ROOT / "README.md").read_text()
    assert (ROOT / "experiments" / "jeffreys_kl.py").read_text() in text
