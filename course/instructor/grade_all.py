"""Grade a class: `python grade_all.py SUBMISSION...`, a directory or a zip file for each student.

    python grade_all.py submissions/*                   the table, and the files below
    python grade_all.py alice bob.zip --exercises 6 7   these exercises only
    python grade_all.py alice --public                  the public tests only
    python grade_all.py DIR --gradescope results.json   one submission, for Gradescope

Of a submission only the files that a student may edit count. They go into a clean tree. Every test
runs with a process of its own for the submission, in bubblewrap (sandbox.py). points.toml says what
a test is worth.
The name of a student is that of the directory, or of the zip file without its ending.

Files in --out, written after every submission. What is there already stays, except what is graded
anew: so one student, or one exercise, can be graded again.

    grades.json   name -> {"points", "max", "blocked", "exercises": {slug: the same three}}
    grades.csv    the same as a table
    report.json   name -> {"sha256": {slug: hash}, "notes", "tests": [...]} with every claim
    feedback/     a page for every student: the claims, and why they failed

A test has passed, failed, timeout, or is blocked: it needs a GPU and there is none. Blocked points
are not in "max".
"""

import argparse
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import tomllib
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "clean" / "tests")]

os.environ.setdefault("TQDM_DISABLE", "1")

import reports  # noqa: E402
from grading import claim_of, judge, tests_of  # noqa: E402
from sandbox import LONGEST, Sandbox, SandboxError, check_bubblewrap  # noqa: E402
from submission import clean_tree, hash_of, name_of, opened, printable  # noqa: E402

LIMIT = 60.0  # seconds a test
JUDGING = 30.0  # seconds that a test may take beside the submission
MEMORY = 4 * 2**30  # bytes of address space that judging may add
PR_SET_PDEATHSIG = 1  # of Linux
KINDS = {"public": HERE / "clean" / "tests", "hidden": HERE / "hidden"}


class UsageError(Exception):
    pass


# ---- one submission ---------------------------------------------------------------------------


@cache  # asked for the first time before memory is limited
def has_gpu():
    import torch

    return torch.cuda.is_available()


@contextmanager
def alarm(seconds: float):
    """Raise TimeoutError after so many seconds, in the main thread."""

    def ring(*_):
        raise TimeoutError(f"not judged after {seconds:.0f} s")

    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, 0)


def run_test(sandbox: Sandbox, test, limit: float):
    """(status, message, seconds) of one test."""
    if test.gpu and not has_gpu():
        return "blocked", "it needs a GPU", 0.0
    began = time.monotonic()
    try:
        worker = sandbox.worker(limit, test.gpu, interprets=not test.compiled)
        with worker as student, alarm(limit + JUDGING):
            status, message = judge(test, student)
    except (SandboxError, TimeoutError) as error:
        status, message = "failed", str(error)
    return status, printable(message[:LONGEST]), time.monotonic() - began


def entry(slug, kind, name, worth, test, status, message, seconds):
    """A test as the report has it."""
    return {
        "exercise": slug,
        "kind": kind,
        "test": name,
        "claim": claim_of(test),
        "status": status,
        "message": message,
        "points": worth * (status == "passed"),
        "worth": worth,
        "seconds": seconds,
    }


def grade(submission: Path, exercises: dict, sandbox: Sandbox, limit: float = LIMIT):
    """The report of one submission. `exercises`: slug -> its table of points.toml."""
    files = sorted({name for one in exercises.values() for name in one["files"]})
    report = []
    with opened(submission, files) as (root, notes):
        found, more = clean_tree(root, sandbox.tree, files)
    for slug, kind, name, points, test in all_tests(exercises):
        status, message, seconds = run_test(sandbox, test, limit)
        report.append(entry(slug, kind, name, points, test, status, message, round(seconds, 2)))
    hashes = {slug: hash_of(found, one["files"]) for slug, one in exercises.items()}
    about = {
        slug: notes + [note for name in one["files"] for note in more.get(name, ())]
        for slug, one in exercises.items()
    }
    return {"sha256": hashes, "notes": about, "tests": report}


def all_tests(exercises: dict):
    """(slug, kind, name, points, function) of every test."""
    for slug, exercise in exercises.items():
        for kind, where in KINDS.items():
            tests = tests_of(where / f"test_{slug}.py") if exercise[kind] else {}
            for name, worth in exercise[kind].items():
                yield slug, kind, name, worth["points"], tests[name]


def not_graded(exercises: dict):
    """The report of a submission whose judge came to an end."""
    result = "failed", "the judge came to an end", 0.0
    report = [entry(*one, *result) for one in all_tests(exercises)]
    note = "the judge came to an end while it was graded: look at what it answers"
    return {"sha256": {}, "notes": {slug: [note] for slug in exercises}, "tests": report}


# ---- the command line -------------------------------------------------------------------------


def chosen(numbers, only_public=False):
    """slug -> its table of points.toml, with the tests that are to run."""
    exercises = tomllib.loads((HERE / "points.toml").read_text())
    if numbers:
        known = {int(slug[:2]) for slug in exercises}
        unknown = sorted(set(numbers) - known)
        if unknown:
            raise UsageError(f"--exercises {unknown}: there are {sorted(known)}")
        exercises = {slug: one for slug, one in exercises.items() if int(slug[:2]) in numbers}
    if only_public:
        for exercise in exercises.values():
            exercise["hidden"] = {}
    for slug, exercise in exercises.items():
        for kind, where in KINDS.items():
            text = (where / f"test_{slug}.py").read_text() if exercise[kind] else ""
            missing = [name for name in exercise[kind] if f"def {name}(" not in text]
            if missing:
                raise UsageError(f"points.toml: {slug} has no {kind} test {', '.join(missing)}")
    return exercises


def check_submissions(paths):
    for path in paths:
        if not path.is_dir() and not (path.is_file() and path.suffix == ".zip"):
            raise UsageError(f"{path} is no directory and no zip file: give one for each student")
    names = [name_of(path) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two submissions have the name {name}: rename one")


def check_out(out: Path):
    """--out can be written, and what is in it can be read."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return reports.read_reports(out)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{out / 'report.json'} is damaged: move it away") from None


def grade_into(connection, submission: Path, exercises: dict, limit: float, sandboxed: bool):
    """In a child: grade a submission and send its report. A killed grader takes it along."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # the sandbox goes back to it
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        with Sandbox(sandboxed) as sandbox:
            connection.send(grade(submission, exercises, sandbox, limit))
    except SandboxError as error:
        connection.send(error)


def grade_apart(submission: Path, exercises: dict, limit: float, sandboxed: bool):
    """The report of a submission, judged in a process of its own: what it answers may be too much.

    Raises SandboxError if no sandbox starts.
    """
    ours, its = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=grade_into, args=(its, submission, exercises, limit, sandboxed))
    child.start()
    its.close()
    try:
        report = ours.recv()
    except EOFError:
        return not_graded(exercises)
    finally:
        ours.close()
        child.join(10)  # its sandbox ends first
        child.kill()
        child.join()
    if isinstance(report, SandboxError):
        raise report
    return report


@contextmanager
def one_temporary_directory():
    """Everything temporary lies in it, so a judge that is killed leaves nothing."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        mock.patch.object(tempfile, "tempdir", directory),
        mock.patch.dict(os.environ, TMPDIR=directory),
    ):
        yield


def grade_class(paths, exercises, jobs, limit, done, sandboxed=True):
    """Grade all, `jobs` at a time, and call done(name, report) as soon as one is."""
    if sandboxed:
        check_bubblewrap()

    import torch  # here, so that a wrong command line is refused at once

    torch.set_num_threads(1)
    has_gpu()
    warnings.simplefilter("ignore")  # about what a submission answers
    with one_temporary_directory(), ThreadPoolExecutor(jobs) as pool:
        arguments = exercises, limit, sandboxed
        futures = {pool.submit(grade_apart, path, *arguments): path for path in paths}
        try:
            for future in as_completed(futures):
                done(name_of(futures[future]), future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C
            for child in multiprocessing.active_children():
                child.kill()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("submissions", type=Path, nargs="+", metavar="SUBMISSION")
    parser.add_argument("--out", type=Path, default=Path("."), help="where the files go: here")
    parser.add_argument("--exercises", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--public", action="store_true", help="the public tests only")
    parser.add_argument("--jobs", type=int, default=1, help="submissions at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a test")
    parser.add_argument("--gradescope", type=Path, help="write Gradescope's results.json here")
    parser.add_argument(
        "--unsandboxed", action="store_true", help="without bubblewrap: submissions run as you"
    )
    args = parser.parse_args(argv)
    try:
        exercises = chosen(args.exercises, args.public)
        check_submissions(args.submissions)
        if args.jobs < 1 or not 0 < args.limit < float("inf"):
            raise UsageError(f"--jobs {args.jobs} --limit {args.limit:g}: give more than 0")
        if args.gradescope and len(args.submissions) > 1:
            raise UsageError("--gradescope takes one submission")
        if not args.gradescope:
            check_out(args.out)
    except UsageError as error:
        sys.exit(f"grade_all.py: error: {error}")
    found = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def done(name, report):
        found[name] = report
        if args.gradescope:
            reports.write_json(args.gradescope, reports.gradescope(report))
        else:
            reports.add(args.out, name, report)
        graded = reports.in_words(reports.grades_of(report))
        print(f"{len(found)}/{len(args.submissions)} {name}: {graded}", file=sys.stderr)

    if args.unsandboxed:
        print("unsandboxed: submissions can read and change your files", file=sys.stderr)
    arguments = exercises, args.jobs, args.limit, done, not args.unsandboxed
    try:
        grade_class(args.submissions, *arguments)
    except SandboxError as error:
        sys.exit(f"grade_all.py: error: {error}")
    except KeyboardInterrupt:
        print("stopped: what is listed below was graded", file=sys.stderr)
    names = [name_of(path) for path in args.submissions if name_of(path) in found]
    notes = {name: reports.notes_of(found[name]) for name in names}
    print(reports.class_table({name: reports.grades_of(found[name]) for name in names}, notes))
    for name in names:
        for note in notes[name]:
            print(f"* {name}: {note}")
    sys.exit(130 * (len(found) < len(args.submissions)))


if __name__ == "__main__":
    main()
