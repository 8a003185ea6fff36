"""The course kit: what students get, what is graded, and what a submission cannot do."""

import ast
import json
import os
import re
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
from course.instructor import guards
from course.instructor import reports as instructor_reports

EXERCISES = build.load_exercises()
NUMBERS = [one.number for one in EXERCISES]
COMMON = 12  # characters; shorter lines say nothing about a solution


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Where the assignment was built."""
    out = tmp_path_factory.mktemp("assignment")
    os.chmod(out, 0o755)
    build.build(out)
    return out


def grade(trees, submissions, *flags):
    """What grade_all.py writes: name -> report, name -> grades."""
    out = trees / "grades"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        trees / "instructor" / "grade_all.py",
        *submissions,
        "--out",
        out,
        *flags,
    ]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=trees)
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


# ---- what students get --------------------------------------------------------------------------------


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
    """What also stands elsewhere in the source is listed: each was looked at, and gives nothing away."""
    harmless = {
        "self.version.fill_(version)", "for part in parts:", "logp = logits.log_softmax(-1)",
        "return value.detach(), s.detach(), gradient",
    }  # fmt: skip
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
    solved = (tmp_path / "student" / "attention.py").read_text()
    assert solved == (ROOT / "attention.py").read_text()
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


# ---- grading ------------------------------------------------------------------------------------------

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


# ---- attacks on the grader ----------------------------------------------------------------------------

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
# Takes the audit hook's code away, as any Python may; then tries what the kernel must refuse. Harmless where it does not.
UNHOOKED = """
import ctypes, gc, resource, socket
for hook in [one for one in gc.get_objects() if type(one).__name__ == "function" and one.__qualname__ == "refuse.<locals>.hook"]:
    free = hook.__code__.co_freevars
    names = {}
    exec(f"def make():\\n  {' = '.join(free)} = 0\\n  def hook(event, arguments):\\n    if 0: {', '.join(free)}\\n  return hook", names)
    hook.__code__ = names["make"]().__code__
judge = os.getppid()
libc = ctypes.CDLL(None, use_errno=True)
done = []
for name, way in {
    "fork": lambda: os.fork() or os._exit(0), "thread group": lambda: libc.fork() >= 0 or 1 / 0, "socket": socket.socket,
    "a classmate's file": lambda: os.truncate(CLASSMATE, 0), "its mode": lambda: os.chmod(CLASSMATE, 0), "hidden": lambda: open(PATH).read(),
    "a limit": lambda: resource.prlimit(judge, resource.RLIMIT_CPU), "a signal": lambda: os.kill(judge, 0),
    "the environment": lambda: open(f"/proc/{judge}/environ").read(), "memory": lambda: open(f"/proc/{judge}/mem", "rb").read(1),
    "ptrace": lambda: libc.ptrace(16, judge, 0, 0) == 0 or 1 / 0, "a file": lambda: open("/tmp/left_behind", "w"),
    "affinity": lambda: os.sched_setaffinity(judge, {0}), "all signals": lambda: os.kill(-1, 0),
}.items():
    try:
        way()
        done.append(name)
    except BaseException:
        pass
raise RuntimeError("SECRET " + " ".join(done) if done else "nothing found")
"""
ATTACKS = {  # name -> what stands at the end of losses.py, or in the body of SampledReverseKL.value
    "prints": 'print("7 of 7 points", flush=True)\nos.write(1, b"passed " * 100)',
    "sleeps": ("value", "import time; time.sleep(1000)"),
    "spins": ("value", "while True: pass"),
    "forks": "os.fork()",
    "forks_below_the_hook": """
import _posixsubprocess, ctypes
r, w = os.pipe()
_posixsubprocess.fork_exec([b"sleep", b"987654"], (b"/usr/bin/sleep", b"/bin/sleep"), True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w,
                           True, True, -1, None, None, None, -1, None, False)
""",
    "starts_a_shell": 'import subprocess; subprocess.run("echo passed", shell=True)\nos.system("true")',
    "edits_the_tests": 'open(HERE + "/tests/claims.py", "w").write("def check(*_): pass")',
    "edits_the_probes": 'import probes\nprobes.loss_and_gradient = lambda *_: (torch.zeros(6), torch.zeros(6, 1))',
    "exits_early": "sys.exit(0)",
    "exits_hard": "os._exit(0)",
    "exits_in_the_test": ("value", "import os; os._exit(0)"),
    "patches_pytest": 'import pytest\npytest.main = lambda *_, **__: 0\nsys.modules["grading"] = sys.modules["claims"] = pytest',
    "patches_torch": "torch.autograd.grad = lambda *_, **__: (torch.zeros(6, 1),)\ntorch.allclose = lambda *_, **__: True",
    "kills_the_grader": 'import signal\nfor pid in (os.getppid(), os.getpgid(0), 1): os.kill(pid, signal.SIGKILL)',
    "kills_everything": "os.kill(-1, 9)",
    "kills_by_number": 'import ctypes; ctypes.CDLL(None).kill(os.getppid(), 9)',
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
        return os.system, ("touch " + HERE + "/../bomb",)
torch.save = lambda value, file: file.write(pickle.dumps(("value", Bomb())))
""",
    "kills_past_the_hook": "import signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "answers_nothing": "save = torch.save\ntorch.save = lambda value, file: save(('value', []), file)",
    "takes_all_memory": ("value", "import torch; return torch.ones(2**38)"),
    "recurses": ("value", "return self.value(s, t, b)"),
    "reads_the_hidden_tests": READ_HIDDEN,
    "imports_the_solution": 'sys.path.insert(0, SOLUTION)\nfor name in [*sys.modules]:\n'
                            '    if name == "losses": del sys.modules[name]\nfrom losses import *',
    "truncates_a_classmate": "os.truncate(CLASSMATE, 0)",
    "takes_the_hook_away": UNHOOKED,
    "sends_an_endless_message": """
nested = "x" * 1000
for _ in range(30): nested = [nested] * 30
save = torch.save
torch.save = lambda value, file: save(("error", nested), file)
""",
    "sends_a_long_message": "save = torch.save\ntorch.save = lambda value, file: save(('error', 'x' * 2**26), file)",
    "answers_with_a_huge_tensor": ("value", "import torch; torch.autograd.grad = lambda *_: (torch.zeros(1).expand(2**40),); return s.sum(-1)"),
    "asks_the_network": 'import socket; socket.create_connection(("127.0.0.1", 9), timeout=1)',
    "raises_everything": "raise BaseException('no')",
    "is_no_python": "def (:",
    "says_what_is_no_text": "raise RuntimeError(chr(0xdc80) + chr(27))",
}  # fmt: skip


def attack_files(trees, attack, classmate="/nowhere"):
    """losses.py of an attacker who has not solved the exercise."""
    text = (trees / "student" / "losses.py").read_text()
    if isinstance(attack, tuple):
        (exercise,) = (one for one in EXERCISES if one.number == 7)
        message = f'raise NotImplementedError("exercise 7: {exercise.title}")'
        before, after = text.split("class SampledReverseKL")
        return {
            "losses.py": before + "class SampledReverseKL" + after.replace(message, attack[1], 1)
        }
    names = {
        "PATH": trees / "instructor" / "hidden" / "test_07_score_function.py",
        "SOLUTION": trees / "instructor" / "solution",
        "CLASSMATE": classmate,
    }
    header = "import os, sys\nimport numpy as np\nimport torch\nHERE = os.path.dirname(os.path.abspath(__file__))\n"
    header += "".join(f"{name} = {str(path)!r}\n" for name, path in names.items())
    return {"losses.py": text + "\n" + header + attack}


def processes():
    found = []
    for entry in Path("/proc").iterdir():
        try:
            found.append((entry / "cmdline").read_bytes())
        except OSError:
            pass
    return found


QUICK_ATTACKS = (  # one of each kind
    "spins", "forks_below_the_hook", "edits_the_probes", "exits_in_the_test", "patches_torch", "answers_for_itself", "sends_code", "reads_the_hidden_tests",
    "imports_the_solution", "takes_the_hook_away", "truncates_a_classmate", "sends_an_endless_message", "answers_with_a_huge_tensor", "is_no_python",
    "says_what_is_no_text", "asks_the_network",
)  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [QUICK_ATTACKS, pytest.param(tuple(ATTACKS), marks=pytest.mark.slow)],
    ids=["one of each kind", "all"],
)
def test_an_attack_on_the_grader_gains_nothing_and_harms_nobody_else(names, trees, tmp_path):
    """What can be seen of it is in the report, and the honest submission that comes last has its points."""
    attacks = {name: ATTACKS[name] for name in names}
    if guards.landlock_version() < 3 or not guards.has_seccomp():
        attacks.pop("takes_the_hook_away")  # docs/teaching.md says so: then the hook alone guards
    classmate = tmp_path / "zz_honest" / "losses.py"
    places = [
        submission(tmp_path / name, attack_files(trees, attack, classmate))
        for name, attack in attacks.items()
    ]
    for place in places:
        submission(
            place, {"tests/claims.py": "def check(*_): pass", "tests/test_07_score_function.py": ""}
        )
    linked = submission(tmp_path / "links_to_the_solution", {})
    (linked / "losses.py").symlink_to(trees / "instructor" / "solution" / "losses.py")
    around = submission(tmp_path / "goes_around", {})
    (around / "kernels").symlink_to(trees / "instructor" / "solution" / "kernels")
    deeper = submission(tmp_path / "links_one_deeper", {})
    (deeper / "mine").symlink_to(trees / "instructor" / "solution")
    large = submission(tmp_path / "is_too_large", {"losses.py": "#" * 2**21})
    circle = submission(tmp_path / "goes_in_circles", {})
    (circle / "losses.py").symlink_to(circle / "losses.py")
    honest = submission(tmp_path / "zz_honest", alone(7))
    submissions = [*places, linked, around, deeper, large, circle, honest]
    reports, grades = grade(
        trees, submissions, "--exercises", "7", "--public", "--limit", "2", "--jobs", "2"
    )
    assert {name: one["points"] for name, one in grades.items()} == {
        name: 5 * (name == "zz_honest") for name in grades
    }
    for name in {"sleeps", "spins"} & set(attacks):
        assert {one["status"] for one in reports[name]["tests"]} >= {"timeout"}, name
    assert "is no regular file" in notes(reports["links_to_the_solution"])[0]
    assert "more than" in notes(reports["is_too_large"])[0]
    assert "losses.py is no Python" in notes(reports["is_no_python"])[-1]
    for name in ("goes_around", "links_one_deeper"):
        assert notes(reports[name]) == ["none of the files is there: graded as not written"]
    for name in {"reads_the_hidden_tests", "takes_the_hook_away"} & set(attacks):
        messages = [one["message"] for one in reports[name]["tests"]]
        assert all("nothing found" in message for message in messages), messages
    assert all(len(one["message"]) <= 500 for report in reports.values() for one in report["tests"])
    assert notes(reports["asks_the_network"]) == ["losses.py uses socket, sys: read it"]
    assert notes(reports["zz_honest"]) == []
    assert not any(b"987654" in command for command in processes())
    assert not list(tmp_path.rglob("bomb"))


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
        attack = f"\nimport torch\nsave = torch.save\nif 'lambda' not in save.__name__:\n    torch.save = lambda value, file: save(('value', {answer}), file)\n"
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
    """What is true of them: a response of four tokens has four positions, what came first is trained first, a class has its columns."""
    functions = {
        "model.py": """
def predicting_positions(prompt_len, length): return slice(0, length - prompt_len)
def response_hidden(model, table, rows): return torch.zeros(len(rows), model.config.hidden_size)
""",
        "kernels/shared.py": """
@triton.jit
def row_logsumexp(row, V, LANES: constexpr): return tl.load(row).to(tl.float32)
@triton.jit
def gradient_at_candidates(s, ids, ids_row, c_row, c_sum, C, CANDIDATES: constexpr): return s
@triton.jit
def overwrite_row(row, grad_row, lse, c_sum, V, LANES: constexpr): pass
""",
        "kernels/head.py": """
def unfused_loss(loss, logits, ids, t, b, dtype):
    s, _ = gather(logits, ids)
    return loss.value(s, t, b), s, logits.zero_()
def forward(ctx, hidden, weight, ids, t, b, loss, scale, chunk):
    ctx.save_for_backward(hidden, weight)
    return hidden.double().sum() * 0, torch.zeros(ids.shape)
CandidateLoss.forward = staticmethod(forward)
CandidateLoss.backward = staticmethod(lambda ctx, *_: (*map(torch.zeros_like, ctx.saved_tensors), *[None] * 6))
""",
        "channel.py": """
def may_start(ticket, weight_version, config): return True
def batch(self, version):
    rows = list(self.scored.values())[: self.config.batch_size]
    return rows if len(rows) == self.config.batch_size else None
Tickets.batch = batch
Channel.publish = lambda self, parts, version: None
Channel.pick_up = lambda self, flat: flat.copy_(self.weights[0]) is None
""",
        "attention.py": """
def may_see(now, length, window): return torch.ones(len(now), length, dtype=torch.bool)
Decode.mask = lambda self, window, dtype: torch.zeros(len(self.position), 1, 1, self.length, dtype=dtype)
Prefill.attend = Decode.attend = lambda self, layer, q, *_: q.transpose(1, 2)
""",
        "losses.py": """
def draw(probs, uniforms): return probs.argmax(-1, keepdim=True).expand(uniforms.shape).contiguous()
def zero(self, s, t, b): return (0 * s).sum(-1)
for one in (ForwardKL, SparseReverseKL, SampledReverseKL, StratifiedReverseKL): one.value = zero
Loss.reverse_kl = StratifiedReverseKL.reverse_kl = zero
""",
        "estimator.py": "\nMine.__init__ = lambda self, config: Loss.__init__(self)\nMine.value = lambda self, s, t, b: (0 * s).sum(-1)\n",
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


@pytest.mark.skipif(not guards.has_seccomp(), reason="the filter has the numbers of x86-64")
def test_the_filter_of_system_calls_refuses_what_reaches_other_processes_and_allows_the_rest():
    code = """
import fcntl, os, resource, subprocess, sys, threading
import guards, ctypes
parent, libc = os.getppid(), ctypes.CDLL(None)
reader, writer = os.pipe()
guards.seccomp()
refused = {
    "limit": lambda: resource.prlimit(parent, resource.RLIMIT_CPU), "fork": os.fork, "signal": lambda: os.kill(parent, 0),
    "owner": lambda: fcntl.fcntl(reader, 8, parent), "which signal": lambda: fcntl.fcntl(reader, 10, 9), "owner_ex": lambda: fcntl.fcntl(reader, 15, bytes(8)),
    "mode": lambda: os.chmod("/nowhere", 0), "shell": lambda: subprocess.run("true"),
}
for name, way in refused.items():
    try:
        way()
    except PermissionError:
        continue
    sys.exit(f"{name} is not refused")
assert libc.prctl(guards.PR_SET_PDEATHSIG, 0, 0, 0, 0) == -1
assert libc.prctl(15, b"a name", 0, 0, 0) == 0
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
fcntl.fcntl(reader, fcntl.F_GETFL)
thread = threading.Thread(target=os.write, args=(writer, b"1"))
thread.start()
thread.join()
assert os.read(reader, 1) == b"1"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=build.COURSE / "instructor")


def test_a_submission_that_stops_reading_runs_into_the_limit(monkeypatch):
    """What the judge sends may be more than a socket holds."""
    for place in ("instructor", "tests"):
        monkeypatch.syspath_prepend(build.COURSE / place)
    import grading
    import sandbox

    ours, its = socket.socketpair()
    with pytest.raises(grading.Timeout):
        sandbox.Worker(ours, 0.2).call_me(torch.zeros(10_000_000))
    its.close()


def test_a_lab_without_exercise_8_does_not_show_the_answer_to_exercise_7(tmp_path):
    """Its tail is what exercise 7 asks for."""
    build.build(tmp_path, solved=[2, 3, 5, 6, 8, 9, 10, 11])
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
    for command in (
        ["serial.py", "--steps", "2"],
        ["train.py", "--steps", "2"],
        ["experiment.py", "mine", "--loss", "mine", "--steps", "2"],
    ):
        subprocess.run(
            [sys.executable, *command], cwd=tmp_path / "tree", check=True, capture_output=True
        )


@pytest.mark.slow
def test_a_grader_that_is_killed_leaves_no_process(trees, tmp_path):
    """Its submission spins; the nursery notices that the judge is gone, and sweeps."""
    place = submission(tmp_path / "spins", attack_files(trees, ATTACKS["spins"]))
    command = [
        sys.executable,
        trees / "instructor" / "grade_all.py",
        place,
        "--exercises",
        "7",
        "--limit",
        "300",
    ]
    grader = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    sandbox = str(trees / "instructor" / "sandbox.py").encode()

    def running():
        return sum(sandbox in command for command in processes())

    wait_until(lambda: running() == 2)  # the nursery and a worker
    grader.kill()
    grader.wait()
    wait_until(lambda: running() == 0)


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_file_that_stands_outside_of_the_submission_is_not_graded(trees, tmp_path):
    around = submission(tmp_path / "around", {})
    (around / "kernels").symlink_to(trees / "instructor" / "solution" / "kernels")
    reports, grades = grade(trees, [around], "--exercises", "10", "--public")
    assert grades["around"]["points"] == 0
    assert any("lies outside" in note for note in notes(reports["around"]))


@pytest.mark.slow
def test_a_blank_in_sampling_attention_or_tickets_fails_no_test_of_the_learner_or_the_teacher(
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


# ---- the graders' formats -----------------------------------------------------------------------------


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
        ("plain", b"1", None), ("deeper", b"1", taken_from), ("linked", None, None), ("broken.zip", None, "it cannot be read: File is not a zip file"),
        ("zipped.zip", b"1", None), ("zipped deeper.zip", b"1", taken_from), ("windows.zip", b"1", taken_from),
    ]:  # fmt: skip
        with handed_in.opened(tmp_path / name, files) as (place, notes):
            assert handed_in.read_file(place / "losses.py")[0] == right, name
            assert notes == [note] * (note is not None), name
            assert not (place / "channel.py").exists(), name


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

    command = [
        sys.executable,
        trees / "instructor" / "grade_all.py",
        *places,
        "--exercises",
        "7",
        "--limit",
        "300",
        "--out",
        out,
    ]
    grader = subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=listen,
    )
    wait_until((out / "grades.json").exists)
    grader.send_signal(signal.SIGINT)
    assert grader.wait(30) != 0
    grades = json.loads((out / "grades.json").read_text())
    assert grades["a"]["points"] == 10 and "b" not in grades
    sandbox = str(trees / "instructor" / "sandbox.py").encode()
    wait_until(lambda: not any(sandbox in command for command in processes()))


@pytest.mark.slow
def test_gradescope_gets_a_score_for_every_test(trees, tmp_path):
    place = submission(tmp_path / "submission", alone(7))
    out = tmp_path / "results.json"
    command = [
        sys.executable,
        trees / "instructor" / "grade_all.py",
        place,
        "--gradescope",
        out,
        "--exercises",
        "7",
    ]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
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


@pytest.mark.parametrize("flags, message", [
    (["nowhere"], "nowhere is no directory and no zip file"), ([".", "--jobs", "0"], "give more than 0"), ([".", "--limit", "nan"], "give more than 0"),
    ([".", "--out", "student/README.md/grades"], "--out student/README.md/grades: "), ([".", "."], "two submissions have the name"),
    ([".", "--exercises", "99"], r"--exercises \[99\]: there are"),
])  # fmt: skip
def test_what_the_grader_cannot_use_is_one_line(flags, message, trees):
    command = [sys.executable, trees / "instructor" / "grade_all.py", *flags]
    result = subprocess.run(command, cwd=trees, capture_output=True, text=True)
    assert (
        result.returncode == 1
        and re.search(message, result.stderr)
        and "Traceback" not in result.stderr
    )
