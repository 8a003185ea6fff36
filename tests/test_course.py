"""The course kit: what students get, what is graded, and what a submission cannot do."""

import ast
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from course import build, mutants, syntax
from course.fixture.make import frozen
from course.instructor import reports as instructor_reports
from course.instructor import sandbox

EXERCISES = build.load_exercises()
NUMBERS = [one.number for one in EXERCISES]
COMMON = 12  # characters; shorter lines say nothing about a solution

try:
    sandbox.check_bubblewrap()
    NO_SANDBOX = ""
except sandbox.SandboxError as error:
    NO_SANDBOX = str(error)
needs_sandbox = pytest.mark.skipif(NO_SANDBOX != "", reason=NO_SANDBOX)
# What is about grading itself runs without bubblewrap, too.
ANYWAY = ["--unsandboxed"] * (NO_SANDBOX != "")


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Where the assignment was built."""
    out = tmp_path_factory.mktemp("assignment")
    build.build(out)
    return out


def grader(trees, *arguments):
    """The command line of grade_all.py."""
    command = [sys.executable, trees / "instructor" / "grade_all.py", *arguments, *ANYWAY]
    return [str(word) for word in command]


def grade(trees, submissions, *flags):
    """What grade_all.py writes: name -> report, name -> grades."""
    out = trees / "grades"
    shutil.rmtree(out, ignore_errors=True)
    command = grader(trees, *submissions, "--out", out, *flags)
    result = subprocess.run(command, capture_output=True, text=True, cwd=trees)
    assert result.returncode == 0, result.stdout + result.stderr
    return tuple(json.loads((out / name).read_text()) for name in ("report.json", "grades.json"))


def notes(report):
    """All notes of a report of grade_all.py."""
    return instructor_reports.notes_of(report)


def submission(place: Path, files: dict):
    """A directory with these files, path -> text."""
    place.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    return place


# ---- what students get ------------------------------------------------------------------------


def test_every_exercise_has_its_handout_tests_and_ten_points():
    for one in EXERCISES:
        points = 0
        for kind in ("tests", "hidden"):
            found = build.points_of(build.COURSE / kind / f"test_{one.slug}.py")
            assert found, (one.slug, kind)
            points += sum(worth for worth, _ in found.values())
        assert points == 10, (one.slug, points)
        handout = (build.COURSE / f"{one.slug}.md").read_text()
        for heading in (
            "## The idea",
            "## What to write",
            "## How it is graded",
            "## The experiment",
            "## Questions",
            "## To read",
        ):
            assert heading in handout, (one.slug, heading)


def test_every_function_that_is_to_be_written_is_blank_and_still_has_its_signature(trees):
    for one in EXERCISES:
        for name in (*one.functions, *one.twins):
            path, inner = build.place_of(name)
            text = (trees / "student" / path).read_text()
            node = syntax.function(text, inner)
            *_, last = node.body
            assert isinstance(last, ast.Raise) and len(node.body) <= 2, name
            solved = syntax.function((trees / "instructor" / "solution" / path).read_text(), inner)
            assert ast.dump(node.args) == ast.dump(solved.args), name


def solution_lines():
    """stripped line -> the functions whose solution it stands in."""
    files = build.solution_files()
    found = {}
    for one in EXERCISES:
        for name in (*one.functions, *one.twins):
            path, inner = build.place_of(name)
            for line in syntax.body_lines(files[path], inner):
                found.setdefault(line, []).append(name)
    return found


def test_no_line_of_a_solution_stands_anywhere_in_what_students_get(trees):
    """What also stands elsewhere in the source is listed: each was looked at, and gives nothing."""
    harmless = {
        "self.version.fill_(version)",
        "for part in parts:",
        "logp = logits.log_softmax(-1)",
        "return value.detach(), s.detach(), gradient",
    }
    lines = {
        line: names
        for line, names in solution_lines().items()
        if len(line) > COMMON and line not in harmless
    }
    for path in (trees / "student").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".md", ".yml", ".toml", ""):
            for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
                assert line.strip() not in lines, (
                    f"{path}:{number} shows {lines[line.strip()]}: {line.strip()}"
                )


def test_what_students_get_has_no_history_no_leftovers_and_no_hidden_tests(trees):
    for tree in ("student", "instructor/classroom50"):
        names = [path.relative_to(trees) for path in (trees / tree).rglob("*")]
        for name in names:
            assert not {
                ".git",
                "__pycache__",
                ".pytest_cache",
                "hidden",
                "solution",
                "wrong",
            } & set(name.parts), name
            assert name.suffix != ".pyc" and name.name != "points.toml" or tree != "student", name
    hidden = {path.read_text() for path in (trees / "instructor" / "hidden").glob("*.py")}
    assert len(hidden) == len(EXERCISES)
    assert not any(path.read_text() in hidden for path in (trees / "student").rglob("*.py"))


def test_links_of_the_students_pages_lead_somewhere(trees):
    for page in (trees / "student").rglob("*.md"):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def test_an_assignment_is_never_overwritten(trees):
    result = subprocess.run(
        [sys.executable, "-m", "course.build", "--out", trees],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert (
        "exists: delete it or give another --out" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_exercises_that_a_course_does_without_are_left_in(tmp_path):
    build.build(tmp_path, solved=[3, 10])
    assert not (tmp_path / "student" / "handouts" / "03_cache.md").exists()
    solved = (tmp_path / "student" / "kv_cache.py").read_text()
    assert solved == (ROOT / "kv_cache.py").read_text()
    with pytest.raises(KeyError, match=r"\[99\]"):
        build.build(tmp_path / "again", solved=[99])


def test_without_the_kernel_a_gpu_runs_plain_torch(trees):
    """Else a fused kernel would hide a blank loss."""
    code = """
import torch
from types import SimpleNamespace
from kernels.head import uses_triton
assert uses_triton(SimpleNamespace(is_cuda=True, dtype=torch.float32)) is False
"""
    subprocess.run([sys.executable, "-c", code], cwd=trees / "student", check=True)


def test_the_frozen_rollouts_are_those_that_the_program_makes():
    """Another machine may round the log-probabilities differently."""
    table = load_file(ROOT / "course" / "fixture" / "rollouts.safetensors")
    made = frozen()
    assert made.keys() == table.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(
            tensor, table[name], rtol=0, atol=1e-4 if tensor.is_floating_point() else 0, msg=name
        )


# ---- grading ----------------------------------------------------------------------------------

QUICK = (4, 7)  # exercises without a model


def alone(number):
    """The student's files with one exercise solved."""
    solution = build.solution_files()
    (exercise,) = (one for one in EXERCISES if one.number == number)
    return build.with_solutions(build.all_blank(solution, EXERCISES), solution, exercise.functions)


def check_scores(trees, tmp_path, numbers):
    """Stubs score nothing, solutions everything, one solution alone exactly its own points."""
    places = [submission(tmp_path / f"only_{number}", alone(number)) for number in numbers]
    flags = ["--exercises", *map(str, numbers)]
    trees_of_all = [trees / "student", trees / "instructor" / "solution"]
    reports, grades = grade(trees, [*trees_of_all, *places], *flags)
    wrong = [
        one for one in reports["solution"]["tests"] if one["status"] not in ("passed", "blocked")
    ]
    assert not wrong
    assert grades["solution"]["points"] == grades["solution"]["max"] > 0
    assert grades["student"]["points"] == 0
    assert all(one["status"] in ("failed", "blocked") for one in reports["student"]["tests"])
    for number in numbers:
        for slug, one in grades[f"only_{number}"]["exercises"].items():
            assert one["points"] == (one["max"] if int(slug[:2]) == number else 0), (
                number,
                slug,
                one,
            )


@pytest.mark.slow
def test_stubs_score_nothing_and_each_solution_its_own_points(trees, tmp_path):
    check_scores(trees, tmp_path, QUICK)


@pytest.mark.slow
def test_the_whole_course_stubs_score_nothing_and_each_solution_its_own_points(trees, tmp_path):
    check_scores(trees, tmp_path, NUMBERS)


def test_a_student_is_told_which_claim_failed_and_why(trees, tmp_path):
    tree = submission(tmp_path / "tree", {})
    build.copy_tree(trees / "student", tree / "student")
    (tree / "student" / "losses.py").write_text(
        alone(6)["losses.py"].replace("(t.exp() * (t - s)).sum(-1)", "(s.exp() * (t - s)).sum(-1)")
    )
    result = subprocess.run(
        [sys.executable, "grade.py", "6"], cwd=tree / "student", capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "failed" in result.stdout and "why:" in result.stdout and "is right" in result.stdout


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda one: one.slug)
def test_there_are_wrong_solutions_and_each_is_one_edit_of_the_right_one(exercise):
    wrongs = mutants.load(exercise)
    assert len(wrongs) >= 4
    for wrong in wrongs:
        path, text = mutants.mutated(build.solution_files(), wrong)
        ast.parse(text)
        assert wrong.function in exercise.functions


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda one: one.slug)
def test_every_wrong_solution_fails(exercise):
    for wrong, failed in mutants.graded(exercise, mutants.load(exercise)):
        assert not mutants.problem(wrong, failed), wrong.name


# ---- attacks on the grader --------------------------------------------------------------------

READ_HIDDEN = """
found = []
for way in (lambda p: open(p).read(), lambda p: __import__("pathlib").Path(p).read_text(),
            lambda p: os.read(os.open(p, os.O_RDONLY), 10_000).decode(),
            lambda p: bytes(torch.from_file(p, size=200, dtype=torch.uint8).tolist()).decode(),
            lambda p: np.fromfile(p, dtype=np.uint8).tobytes().decode()):
    try:
        found.append(way(PATH))
    except BaseException:
        pass
raise RuntimeError("SECRET " + " ".join(found) if found else "nothing found")
"""
# Tries what the sandbox must refuse. Harmless where it does not, but to a `sleep` of the test's.
REACHES_OUT = """
import ctypes, glob, signal, socket
libc = ctypes.CDLL(None)

def see_processes():
    return [one for one in glob.glob("/proc/*/cmdline") if VICTIM in open(one).read()][0]

IRQ = "/proc/irq/default_smp_affinity"
done = []
for name, way in {
    "read a classmate's file": lambda: open(CLASSMATE).read(),
    "empty it": lambda: os.truncate(CLASSMATE, 0),
    "change Python": lambda: open(os.__file__, "a"),
    "change its own file": lambda: open(HERE + "/losses.py", "a"),
    "read the hidden tests": lambda: open(PATH).read(),
    "read the points": lambda: open(os.path.dirname(SOLUTION) + "/points.toml").read(),
    "read the users": lambda: open("/etc/passwd").read(),
    "read the environment": lambda: os.environ["TESTS_SECRET"],
    "see a process": see_processes,
    "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 or 1 / 0,
    "change the root": lambda: os.chroot("/tmp"),
    "set the kernel": lambda: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY),
    "restart the machine": lambda: os.open("/proc/sysrq-trigger", os.O_WRONLY),
    "choose who handles interrupts": lambda: os.open(IRQ, os.O_WRONLY),
    "connect": lambda: socket.create_connection(("127.0.0.1", PORT), timeout=1),
    "connect inside": lambda: socket.socket(socket.AF_UNIX).connect(VICTIM_SOCKET),
}.items():
    try:
        way()
        done.append(name)
    except BaseException:
        pass
raise RuntimeError("SECRET " + ", ".join(done) if done else "nothing found")
"""
# name -> what stands at the end of losses.py, or in the body of SampledReverseKL.value
ATTACKS = {
    "prints": 'print("7 of 7 points", flush=True)\nos.write(1, b"passed " * 100)',
    "sleeps": ("value", "import time; time.sleep(1000)"),
    "spins": ("value", "while True: pass"),
    "forks": "os.fork()",
    "leaves_a_process": """
import subprocess
subprocess.Popen(["sleep", "987654"], start_new_session=True)
""",
    "leaves_a_file": 'open("/tmp/left_behind_987654", "w")',
    "starts_a_shell": """
import subprocess
subprocess.run("echo passed", shell=True)
os.system("true")
""",
    "edits_the_tests": 'open(HERE + "/tests/claims.py", "w").write("def check(*_): pass")',
    "edits_the_probes": """
import probes
probes.loss_and_gradient = lambda *_: (torch.zeros(6), torch.zeros(6, 1))
""",
    "exits_early": "sys.exit(0)",
    "exits_hard": "os._exit(0)",
    "exits_in_the_test": ("value", "import os; os._exit(0)"),
    "patches_pytest": """
import pytest
pytest.main = lambda *_, **__: 0
sys.modules["grading"] = sys.modules["claims"] = pytest
""",
    "patches_torch": """
torch.autograd.grad = lambda *_, **__: (torch.zeros(6, 1),)
torch.allclose = lambda *_, **__: True
""",
    "kills_the_grader": """
import signal
for pid in (VICTIM_PID, os.getppid(), os.getpgid(0), 1):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
""",
    "kills_everything": "os.kill(-1, 9)",
    "kills_by_number": "import ctypes; ctypes.CDLL(None).kill(os.getppid(), 9)",
    "kills_by_handle": "import signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "answers_for_itself": """
for fd in range(3, 64):
    try:
        os.write(fd, b"\\0" * 8 + b"passed")
    except OSError:
        pass
""",
    "sends_code": """
import pickle
class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + BOMB,)
torch.save = lambda value, file: file.write(pickle.dumps(("value", Bomb())))
""",
    "answers_nothing": """
save = torch.save
torch.save = lambda value, file: save(('value', []), file)
""",
    "takes_all_memory": ("value", "import torch; return torch.ones(2**38)"),
    "recurses": ("value", "return self.value(s, t, b)"),
    "reads_the_hidden_tests": READ_HIDDEN,
    "imports_the_solution": """
sys.path.insert(0, SOLUTION)
for name in [*sys.modules]:
    if name == "losses":
        del sys.modules[name]
from losses import *
""",
    "reaches_out": REACHES_OUT,
    "sends_an_endless_message": """
nested = "x" * 1000
for _ in range(30): nested = [nested] * 30
save = torch.save
torch.save = lambda value, file: save(("error", nested), file)
""",
    "sends_a_long_message": """
save = torch.save
torch.save = lambda value, file: save(('error', 'x' * 2**26), file)
""",
    "answers_with_a_huge_tensor": (
        "value",
        "import torch; torch.autograd.grad = lambda *_: (torch.zeros(1).expand(2**40),); "
        "return s.sum(-1)",
    ),
    "asks_the_network": 'import socket; socket.create_connection(("127.0.0.1", PORT), timeout=1)',
    "raises_everything": "raise BaseException('no')",
    "is_no_python": "def (:",
    "says_what_is_no_text": "raise RuntimeError(chr(0xdc80) + chr(27))",
}


def attack_files(trees, attack, **names):
    """losses.py of an attacker who has not solved the exercise. `names`: what it knows."""
    text = (trees / "student" / "losses.py").read_text()
    if isinstance(attack, tuple):
        (exercise,) = (one for one in EXERCISES if one.number == 7)
        message = f'raise NotImplementedError("exercise 7: {exercise.title}")'
        before, after = text.split("class SampledReverseKL")
        after = after.replace(message, attack[1], 1)
        return {"losses.py": f"{before}class SampledReverseKL{after}"}
    names |= {
        "PATH": str(trees / "instructor" / "hidden" / "test_07_score_function.py"),
        "SOLUTION": str(trees / "instructor" / "solution"),
    }
    header = "import os, sys\nimport numpy as np\nimport torch\n"
    header += "HERE = os.path.dirname(os.path.abspath(__file__))\n"
    header += "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return {"losses.py": text + "\n" + header + attack}


def processes():
    found = []
    for entry in Path("/proc").iterdir():
        try:
            found.append((entry / "cmdline").read_bytes())
        except OSError:
            pass
    return found


QUICK_ATTACKS = ("reaches_out",)


@pytest.fixture
def outside():
    """What an attack may look for: a process, two sockets that listen. Nothing happens to them."""
    address = f"\0course{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(address)
        local.listen()
        victim = subprocess.Popen(["sleep", "987653"])
        yield {
            "VICTIM": "987653",
            "VICTIM_PID": victim.pid,
            "PORT": tcp.getsockname()[1],
            "VICTIM_SOCKET": address,
        }
        assert victim.poll() is None
        assert not select.select([tcp, local], [], [], 0)[0]
        victim.kill()
        victim.wait()


@needs_sandbox
@pytest.mark.parametrize(
    "names",
    [QUICK_ATTACKS, pytest.param(tuple(ATTACKS), marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_an_attack_on_the_grader_gains_nothing_and_harms_nobody_else(
    names, trees, tmp_path, outside, monkeypatch
):
    """What can be seen of it is in the report. The honest submission, the last, has its points."""
    monkeypatch.setenv("TESTS_SECRET", "not for a submission")
    attacks = {name: ATTACKS[name] for name in names}
    outside |= {
        "CLASSMATE": str(tmp_path / "zz_honest" / "losses.py"),
        "BOMB": str(tmp_path / "bomb"),
    }
    places = [
        submission(tmp_path / name, attack_files(trees, attack, **outside))
        for name, attack in attacks.items()
    ]
    for place in places:
        submission(
            place, {"tests/claims.py": "def check(*_): pass", "tests/test_07_score_function.py": ""}
        )
    submissions = [*places, submission(tmp_path / "zz_honest", alone(7))]
    reports, grades = grade(
        trees, submissions, "--exercises", "7", "--public", "--limit", "3", "--jobs", "2"
    )
    assert {name: one["points"] for name, one in grades.items()} == {
        name: 5 * (name == "zz_honest") for name in grades
    }
    for name in {"sleeps", "spins"} & set(attacks):
        assert {one["status"] for one in reports[name]["tests"]} >= {"timeout"}, name
    if "is_no_python" in attacks:
        assert "losses.py is no Python" in notes(reports["is_no_python"])[-1]
    for name in {"reads_the_hidden_tests", "reaches_out"} & set(attacks):
        messages = [one["message"] for one in reports[name]["tests"]]
        assert all("nothing found" in message for message in messages), messages
    assert all(len(one["message"]) <= 500 for report in reports.values() for one in report["tests"])
    assert "losses.py uses ctypes, socket, sys: read it" in notes(reports["reaches_out"])
    assert notes(reports["zz_honest"]) == []
    assert not any(b"987654" in command for command in processes())
    assert not (tmp_path / "bomb").exists()
    assert not Path("/tmp/left_behind_987654").exists()


@pytest.mark.slow
def test_an_empty_answer_scores_nothing_in_any_exercise(trees, tmp_path):
    """A loop over what comes back must not pass because nothing did."""
    files = sorted({path for one in EXERCISES for path in one.files})
    for name, answer in {
        "list": "[]",
        "tensor": "torch.zeros(0)",
        "true": "True",
        "dict": "{}",
        "zero": "torch.zeros(())",
        "tuples": "[()] * 50",
    }.items():
        attack = f"""
import torch
save = torch.save
if 'lambda' not in save.__name__:
    torch.save = lambda value, file: save(('value', {answer}), file)
"""
        submission(
            tmp_path / name,
            {path: (trees / "student" / path).read_text() + attack for path in files},
        )
    _, grades = grade(trees, sorted(tmp_path.iterdir()), "--limit", "20")
    assert {name: one["points"] for name, one in grades.items()} == dict.fromkeys(
        grades, 0
    ) and len(grades) == 6


@pytest.mark.slow
def test_functions_that_do_next_to_nothing_score_next_to_nothing(trees, tmp_path):
    """Of them it is true that four tokens have four positions, that what came first is trained
    first, and that a class has its columns."""
    functions = {
        "model.py": """
def predicting_positions(prompt_len, length): return slice(0, length - prompt_len)
def response_hidden(model, channel, rows): return torch.zeros(len(rows), model.config.hidden_size)
""",
        "kernels/fused_loss.py": """
@triton.jit
def row_logsumexp(row, V, LANES: constexpr): return tl.load(row).to(tl.float32)
@triton.jit
def gradient_at_candidates(s, ids, ids_row, c_row, c_sum, C, CANDIDATES: constexpr): return s
@triton.jit
def overwrite_row(row, grad_row, lse, c_sum, V, LANES: constexpr): pass
""",
        "kernels/decode_attention.py": """
@triton.jit
def decode_kernel(
    query, keys, values, position, out, scale, window, L, G: constexpr, E: constexpr, D: constexpr,
    ROWS: constexpr, KEY_WIDTH: constexpr, VALUE_WIDTH: constexpr, BLOCK: constexpr,
    PRECISION: constexpr,
): tl.store(out + tl.program_id(0), 0.0)
""",
        "kernels/head.py": """
def unfused_loss(loss, logits, ids, t, b, dtype):
    s, _ = gather(logits, ids)
    return loss.value(s, t, b), s, logits.zero_()
def forward(ctx, hidden, weight, ids, t, b, loss, scale, chunk):
    ctx.save_for_backward(hidden, weight)
    return hidden.double().sum() * 0, torch.zeros(ids.shape)
CandidateLoss.forward = staticmethod(forward)
def backward(ctx, *_):
    return (*map(torch.zeros_like, ctx.saved_tensors), *[None] * 6)
CandidateLoss.backward = staticmethod(backward)
""",
        "tickets.py": """
def may_start(ticket, weight_version, config): return True
def batch(self, version):
    rows = list(self.scored.values())[: self.config.batch_size]
    return rows if len(rows) == self.config.batch_size else None
Tickets.batch = batch
""",
        "channel.py": """
Channel.publish = lambda self, parts, version: None
Channel.pick_up = lambda self, flat: flat.copy_(self.weights[0]) is None
""",
        "kv_cache.py": """
def may_see(now, length, window): return torch.ones(len(now), length, dtype=torch.bool)
def mask(self, window, dtype):
    return torch.zeros(len(self.position), 1, 1, int(self.position.max()) + 1, dtype=dtype)
Decode.mask = mask
Prefill.attend = Decode.attend = lambda self, layer, q, *_: q.transpose(1, 2)
""",
        "losses.py": """
def draw(probs, uniforms): return probs.argmax(-1, keepdim=True).expand(uniforms.shape).contiguous()
def zero(self, s, t, b): return (0 * s).sum(-1)
for one in (ForwardKL, SparseReverseKL, SampledReverseKL, StratifiedReverseKL): one.value = zero
Loss.reverse_kl = StratifiedReverseKL.reverse_kl = zero
""",
        "estimator.py": """
Mine.__init__ = lambda self, config: Loss.__init__(self)
Mine.value = lambda self, s, t, b: (0 * s).sum(-1)
""",
    }
    files = {
        path: (trees / "student" / path).read_text() + "\n\n" + text
        for path, text in functions.items()
    }
    _, grades = grade(trees, [submission(tmp_path / "trivial", files)])
    points = {
        slug: one["points"] for slug, one in grades["trivial"]["exercises"].items() if one["points"]
    }
    assert points == {"01_shift": 2, "04_staleness": 2, "11_estimator": 2}


@pytest.mark.parametrize(
    "bwrap, message",
    [
        (None, "bubblewrap is missing.* apt-get install bubblewrap.* --unsandboxed"),
        ("echo 'bwrap: No permissions' >&2; exit 1", "refuses it: bwrap: No permissions"),
    ],
    ids=["missing", "forbidden"],
)
def test_without_bubblewrap_the_grader_refuses_and_says_what_to_do(
    bwrap, message, trees, tmp_path, monkeypatch
):
    if bwrap is not None:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{bwrap}\n")
        (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = [sys.executable, trees / "instructor" / "grade_all.py", trees / "student"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.slow
def test_unsandboxed_a_submission_has_its_points(trees, tmp_path):
    place = submission(tmp_path / "mine", alone(7))
    _, grades = grade(trees, [place], "--exercises", "7", "--public", "--unsandboxed")
    assert grades["mine"]["points"] == 5


def test_a_submission_that_stops_reading_runs_into_the_limit(monkeypatch):
    """What the judge sends may be more than a socket holds."""
    monkeypatch.syspath_prepend(build.COURSE / "tests")
    import grading

    ours, its = socket.socketpair()
    with pytest.raises(grading.Timeout):
        sandbox.Worker(ours, 0.2).call_me(torch.zeros(10_000_000))
    its.close()


def test_a_lab_without_exercise_8_does_not_show_the_answer_to_exercise_7(tmp_path):
    """Its tail is what exercise 7 asks for."""
    build.build(tmp_path, solved=[2, 3, 5, 6, 8, 9, 10, 11, 12])
    text = (tmp_path / "student" / "losses.py").read_text()
    for name in (
        "SampledReverseKL.value",
        "StratifiedReverseKL.value",
        "StratifiedReverseKL.reverse_kl",
        "Loss.reverse_kl",
    ):
        *_, last = syntax.function(text, name).body
        assert isinstance(last, ast.Raise), name
    assert "draw(" in syntax.source(text, "Proposal.propose")
    assert "raise" in (tmp_path / "student" / "estimator.py").read_text()


@pytest.mark.slow
def test_once_all_is_solved_the_student_trains(tmp_path):
    """What is blank for other reasons, the twins, is not needed."""
    solution = build.solution_files()
    names = [name for one in EXERCISES for name in one.functions]
    files = build.with_solutions(build.all_blank(solution, EXERCISES), solution, names)
    build.write_tree(tmp_path / "tree", files, EXERCISES)
    mine = ["--plugin", "estimator.py", "--loss", "mine"]
    for command in (
        ["serial.py"],
        ["train.py"],
        ["train.py", *mine, "--output-dir", "runs/mine"],
        ["experiment.py", "mine", *mine],
    ):
        subprocess.run(
            [sys.executable, *command, "--steps", "2"],
            cwd=tmp_path / "tree",
            check=True,
            capture_output=True,
        )


@pytest.mark.slow
def test_estimators_are_ranked_and_who_fails_the_tests_is_left_out(trees, tmp_path):
    places = [submission(tmp_path / "right", alone(11)), trees / "student"]
    command = [sys.executable, trees / "instructor" / "rank.py", *places, *ANYWAY]
    command += ["--updates", "1", "--seeds", "1", "--lags", "0"]
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "student is left out: 0 of 10 points" in result.stdout
    _, *lines = (tmp_path / "ranking.csv").read_text().splitlines()
    values = {name: float(value) for name, _, value in (line.split(",") for line in lines)}
    assert len(values) == 2 and values.keys() > {"right"} and max(values.values()) < 100


@pytest.mark.slow
def test_a_grader_that_is_killed_leaves_no_process(trees, tmp_path):
    """Its submission spins, and ends with the judge."""
    place = submission(tmp_path / "spins", attack_files(trees, ATTACKS["spins"]))
    command = grader(trees, place, "--exercises", "7", "--limit", "300")
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # the nursery and a worker; bubblewrap outside and inside
    wait_until(lambda: sandboxes(trees) == (2 if ANYWAY else 4))
    process.kill()
    process.wait()
    wait_until(lambda: sandboxes(trees) == 0)


def sandboxes(trees):
    """Processes of sandboxes that run."""
    name = str(trees / "instructor" / "sandbox.py").encode()
    return sum(name in command for command in processes())


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_blank_in_sampling_the_cache_or_tickets_fails_no_test_of_the_learner_or_the_teacher(
    tmp_path,
):
    """All but the one that compares the generator with the teacher."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build", "__pycache__")
    )
    names = [name for one in EXERCISES if one.number in (2, 3, 4) for name in one.functions]
    for name in (*names, "losses.Proposal.propose"):
        path, inner = build.place_of(name)
        (tree / path).write_text(syntax.blank((tree / path).read_text(), inner, "blank"))
    losses = (tree / "losses.py").read_text()  # where every Config calls `check`, as in a course
    losses = losses.replace("    def check(self):", "    check = bool\n\n    def unused(self):")
    (tree / "losses.py").write_text(losses)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/test_learner.py",
        "tests/test_teacher.py",
    ]
    command += ["-k", "not test_teacher_equal_to_student_agrees"]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]


# ---- the graders' formats ---------------------------------------------------------------------


def test_zip_files_and_one_directory_too_many_are_graded_and_a_broken_one_stops_nobody(
    trees, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(trees / "instructor")
    import submission as handed_in

    files = ["channel.py", "losses.py"]
    submission(tmp_path / "plain", {"losses.py": "1"})
    submission(tmp_path / "deeper", {"my work/losses.py": "1", "other/notes.txt": ""})
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "mine").symlink_to(tmp_path / "plain")
    (tmp_path / "broken.zip").write_text("no zip file")
    for name, inside in {
        "zipped": "losses.py",
        "zipped deeper": "my work/losses.py",
        "windows": "my work\\losses.py",
    }.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(inside, "1")
            archive.writestr("../channel.py", "outside")
            archive.writestr("__MACOSX/my work/._losses.py", "")
    taken_from = "the files are taken from my work/"
    for name, right, note in [
        ("plain", b"1", None),
        ("deeper", b"1", taken_from),
        ("linked", None, None),
        ("broken.zip", None, "it cannot be read: File is not a zip file"),
        ("zipped.zip", b"1", None),
        ("zipped deeper.zip", b"1", taken_from),
        ("windows.zip", b"1", taken_from),
    ]:
        with handed_in.opened(tmp_path / name, files) as (place, notes):
            assert handed_in.read_file(place / "losses.py")[0] == right, name
            assert notes == [note] * (note is not None), name
            assert not (place / "channel.py").exists(), name


def test_links_and_large_files_are_graded_as_not_written(trees, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(trees / "instructor")
    import submission as handed_in

    solution = trees / "instructor" / "solution"
    none = "none of the files is there: graded as not written"
    for name, path, target, note in [
        ("link", "losses.py", solution / "losses.py", "losses.py is no regular file"),
        ("circle", "losses.py", tmp_path / "circle" / "losses.py", "losses.py is no regular file"),
        ("around", "kernels", solution / "kernels", "kernels/head.py lies outside"),
        ("deeper", "mine", solution, none),
        ("large", None, None, "losses.py has more than"),
    ]:
        place = submission(tmp_path / name, {} if path else {"losses.py": "#" * 2**21})
        if path:
            (place / path).symlink_to(target)
        files = ["kernels/head.py"] if path == "kernels" else ["losses.py"]
        with handed_in.opened(place, files) as (root, _):
            found, about = handed_in.clean_tree(root, tmp_path / "tree", files)
        assert not found and about[files[0]][0].startswith(note), (name, about)
        clean = (trees / "student" / files[0]).read_text()
        assert (tmp_path / "tree" / files[0]).read_text() == clean, name


def test_what_was_graded_before_stays_unless_it_is_graded_again(tmp_path):
    """A student or an exercise can be graded again without the others."""

    def tests(kind, slug, points):
        return [
            {
                "exercise": slug,
                "kind": kind,
                "test": "test",
                "claim": "It is right.",
                "status": "failed",
                "message": "",
                "points": points,
                "worth": 5,
            }
        ]

    def add(name, tests):
        instructor_reports.add(
            tmp_path,
            name,
            {"sha256": {one["exercise"]: "1" for one in tests}, "notes": {}, "tests": tests},
        )
        return json.loads((tmp_path / "grades.json").read_text())

    add("ann", tests("hidden", "02_b", 4) + tests("public", "02_b", 3))
    add("bob", tests("public", "02_b", 5))
    grades = add("ann", tests("public", "02_b", 1) + tests("public", "01_a", 2))
    assert {name: one["points"] for name, one in grades.items()} == {"ann": 7, "bob": 5}
    assert (
        tmp_path / "grades.csv"
    ).read_text() == "submission,points,max,blocked,01_a,02_b\nann,7,15,0,2,5\nbob,5,5,0,,5\n"
    assert "exercise 01_a: 2 of 5" in (tmp_path / "feedback" / "ann.txt").read_text()
    assert " -   5  5 of 5" in instructor_reports.class_table(grades, {})
    report = {
        "sha256": {"02_b": "another"},
        "notes": {"02_b": []},
        "tests": tests("public", "02_b", 1),
    }
    again = instructor_reports.merged(
        json.loads((tmp_path / "report.json").read_text())["ann"], report
    )
    assert "ran on other files" in notes(again)[0]


@pytest.mark.slow
def test_a_class_that_is_interrupted_keeps_what_was_graded(trees, tmp_path):
    """Ctrl-C stops within the test that runs, and nothing runs on."""
    places = [
        submission(tmp_path / "a", alone(7)),
        submission(tmp_path / "b", attack_files(trees, ATTACKS["sleeps"])),
    ]
    out = tmp_path / "out"

    def listen():  # also where the tests were started in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)

    command = grader(trees, *places, "--exercises", "7", "--limit", "300", "--out", out)
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=listen,
    )
    wait_until((out / "grades.json").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    grades = json.loads((out / "grades.json").read_text())
    assert grades["a"]["points"] == 10 and "b" not in grades
    wait_until(lambda: sandboxes(trees) == 0)


@pytest.mark.slow
def test_gradescope_gets_a_score_for_every_test(trees, tmp_path):
    place = submission(tmp_path / "submission", alone(7))
    out = tmp_path / "results.json"
    command = grader(trees, place, "--gradescope", out, "--exercises", "7")
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert (
        sum(one["score"] for one in result["tests"])
        == sum(one["max_score"] for one in result["tests"])
        == 10
    )
    assert {one["visibility"] for one in result["tests"]} == {"visible", "after_published"}
    assert all(
        {"name", "score", "max_score", "status", "output"} <= set(one) for one in result["tests"]
    )


@pytest.mark.slow
def test_classroom_50_gets_its_result_from_public_tests_alone(trees, tmp_path):
    bundle = trees / "instructor" / "classroom50"
    assert not list(bundle.rglob("hidden*")) and not list(bundle.rglob("solution*"))
    checkout = submission(tmp_path / "checkout", alone(7))
    urls = {f"{name}_URL": f"https://example.org/{name}" for name in ("COMMIT", "RELEASE")}
    names = {
        "CLASSROOM": "course",
        "ASSIGNMENT": "opd",
        "SUBMISSION_TAG": "submit/1",
        "RUNNER_TEMP": str(tmp_path),
    }
    command = [sys.executable, bundle / "autograder.py", "--installed", "--exercises", "7"]
    subprocess.run(
        list(map(str, command)),
        cwd=checkout,
        env=os.environ | urls | names,
        check=True,
        capture_output=True,
    )
    result = json.loads((checkout / "result.json").read_text())
    assert result["schema"] == "classroom50/result/v1" and result["classroom"] == "course"
    assert (
        result["score"] == result["max-score"] == 5 == sum(one["score"] for one in result["tests"])
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere"], "nowhere is no directory and no zip file"),
        ([".", "--jobs", "0"], "give more than 0"),
        ([".", "--limit", "nan"], "give more than 0"),
        ([".", "--out", "student/README.md/grades"], "--out student/README.md/grades: "),
        ([".", "."], "two submissions have the name"),
        ([".", "--exercises", "99"], r"--exercises \[99\]: there are"),
    ],
)
def test_what_the_grader_cannot_use_is_one_line(flags, message, trees):
    command = [sys.executable, trees / "instructor" / "grade_all.py", *flags]
    result = subprocess.run(command, cwd=trees, capture_output=True, text=True)
    assert (
        result.returncode == 1
        and re.search(message, result.stderr)
        and "Traceback" not in result.stderr
    )
