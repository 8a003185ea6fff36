"""Grade a class: `python grade_all.py DIR...`, one directory for each submission.

    python grade_all.py submissions/*                   table, grades.json and report.json
    python grade_all.py alice bob --exercises 6 7       these exercises only
    python grade_all.py alice --public                  the public tests only
    python grade_all.py DIR --gradescope results.json   one submission, for Gradescope

Of a submission only the files that a student may edit count. They go into a clean tree. Every test
runs with a process of its own for the submission (sandbox.py). points.toml says what it is worth.

    grades.json   name -> {"points", "max", "blocked", "exercises": {slug: the same three}}
    report.json   name -> {"sha256" of its files, "notes", "tests": [...]} with every claim

A test has passed, failed, timeout, or is blocked: it needs a GPU and there is none. Blocked points
are not in "max". `name` is the directory's name.
"""

import argparse
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import tomllib
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "clean" / "tests")]

os.environ.setdefault("TQDM_DISABLE", "1")

from grading import claim_of, judge, tests_of  # noqa: E402
from sandbox import Nursery  # noqa: E402

LIMIT = 60.0  # seconds a test
LARGEST = 2**20  # bytes of a file that a student may hand in
KINDS = {"public": HERE / "clean" / "tests", "hidden": HERE / "hidden"}


class UsageError(Exception):
    pass


# ---- one submission ---------------------------------------------------------------------------


def read_file(path: Path):
    """The bytes of a file that was handed in, or None and why it does not count."""
    try:
        status = path.lstat()
    except OSError:
        return None, "is missing"
    if not stat.S_ISREG(status.st_mode):
        return None, "is no regular file"
    if status.st_size > LARGEST:
        return None, f"has more than {LARGEST:,} bytes"
    return path.read_bytes(), None


def clean_tree(submission: Path, tree: Path, files):
    """A tree with these files of the submission. Returns (hash of them, notes)."""
    shutil.copytree(HERE / "clean", tree, ignore=shutil.ignore_patterns("__pycache__"))
    notes, digest = [], hashlib.sha256()
    for name in files:
        data, why = read_file(submission / name)
        inside = (submission / name).resolve().is_relative_to(submission.resolve())
        if data is None or not inside:
            notes.append(f"{name} {why or 'lies outside of the submission'}: graded as not written")
            continue
        digest.update(f"{name} {len(data)}\n".encode() + data)
        (tree / name).write_bytes(data)
    if not any((submission / name).exists() for name in files):
        notes = ["none of the files is there: do they lie one directory deeper?"]
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return digest.hexdigest(), notes


def has_gpu():
    import torch

    return torch.cuda.is_available()


def run_test(nursery, tree: Path, test, limit: float):
    """(status, message, seconds) of one test."""
    if test.gpu and not has_gpu():
        return "blocked", "it needs a GPU", 0.0
    began = time.monotonic()
    try:
        with nursery.worker(tree, limit, test.gpu) as student:
            status, message = judge(test, student)
    except RuntimeError as error:
        status, message = "failed", str(error)
    return status, message, time.monotonic() - began


def grade(submission: Path, exercises: dict, nursery, limit: float = LIMIT):
    """The report of one submission. `exercises`: slug -> its table of points.toml."""
    files = sorted({name for one in exercises.values() for name in one["files"]})
    report = []
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        tree = Path(place).resolve() / "tree"
        sha, notes = clean_tree(submission, tree, files)
        for slug, exercise in exercises.items():
            for kind, where in KINDS.items():
                tests = tests_of(where / f"test_{slug}.py") if exercise[kind] else {}
                for name, worth in exercise[kind].items():
                    status, message, seconds = run_test(nursery, tree, tests[name], limit)
                    report.append(
                        {
                            "exercise": slug,
                            "kind": kind,
                            "test": name,
                            "claim": claim_of(tests[name]),
                            "status": status,
                            "message": message,
                            "points": worth["points"] * (status == "passed"),
                            "worth": worth["points"],
                            "seconds": round(seconds, 2),
                        }
                    )
    return {"sha256": sha, "notes": notes, "tests": report}


def totals(tests):
    return {
        "points": sum(one["points"] for one in tests),
        "max": sum(one["worth"] for one in tests if one["status"] != "blocked"),
        "blocked": sum(one["worth"] for one in tests if one["status"] == "blocked"),
    }


def grades_of(report: dict):
    tests = report["tests"]
    slugs = dict.fromkeys(one["exercise"] for one in tests)
    by_slug = {slug: totals([one for one in tests if one["exercise"] == slug]) for slug in slugs}
    return totals(tests) | {"exercises": by_slug}


# ---- what is written --------------------------------------------------------------------------


def class_table(grades: dict):
    slugs = list(next(iter(grades.values()))["exercises"])
    width = max(len("submission"), *map(len, grades))
    lines = ["  ".join(["submission".ljust(width), *(slug[:2] for slug in slugs), "points"])]
    for name, one in grades.items():
        cells = [f"{one['exercises'][slug]['points']:2g}" for slug in slugs]
        total = f"{one['points']:g} of {one['max']:g}"
        if one["blocked"]:
            total += f" ({one['blocked']:g} blocked: no GPU)"
        lines.append("  ".join([name.ljust(width), *cells, total]))
    return "\n".join(lines)


def gradescope(report: dict):
    """results.json, as gradescope-autograders.readthedocs.io specifies it."""
    tests = []
    for number, one in enumerate(report["tests"], 1):
        is_blocked = one["status"] == "blocked"
        tests.append(
            {
                "number": str(number),
                "name": f"{one['exercise']} ({one['kind']}): {one['claim']}",
                "score": one["points"],
                "max_score": 0 if is_blocked else one["worth"],
                "status": "passed" if one["status"] in ("passed", "blocked") else "failed",
                "output": one["message"] or one["status"],
                "visibility": "visible" if one["kind"] == "public" else "after_published",
            }
        )
    notes = "\n".join(report["notes"])
    return {"output": notes, "stdout_visibility": "hidden", "tests": tests}


def write_json(path: Path, value):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


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


def check_directories(paths):
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path} is no directory: give one for each submission")
    names = [path.resolve().name for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two submissions have the name {name}: rename one")


def grade_class(paths, exercises, jobs, limit):
    """name -> report, in the order of `paths`. `jobs` submissions at a time."""
    if os.geteuid() == 0:
        HERE.chmod(0o700)  # closed to the user that submissions run as
    free = SimpleQueue()

    def one(path):
        nursery = free.get()
        try:
            return grade(path, exercises, nursery, limit)
        finally:
            free.put(nursery)

    import torch  # here, so that a wrong command line is refused at once

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about what a submission answers
    with ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        for _ in range(jobs):
            nursery = stack.enter_context(Nursery())
            free.put(nursery)
        print(f"submissions are guarded by: {nursery.guards}", file=sys.stderr)
        reports = {}
        for path, report in zip(paths, pool.map(one, paths)):
            reports[path.resolve().name] = report
        return reports


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("submissions", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("."), help="where the JSON files go")
    parser.add_argument("--exercises", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--public", action="store_true", help="the public tests only")
    parser.add_argument("--jobs", type=int, default=1, help="submissions at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a test")
    parser.add_argument("--gradescope", type=Path, help="write Gradescope's results.json here")
    args = parser.parse_args(argv)
    try:
        exercises = chosen(args.exercises, args.public)
        check_directories(args.submissions)
        if args.gradescope and len(args.submissions) > 1:
            raise UsageError("--gradescope takes one submission")
    except UsageError as error:
        sys.exit(f"grade_all.py: error: {error}")
    reports = grade_class(args.submissions, exercises, max(1, args.jobs), args.limit)
    grades = {name: grades_of(report) for name, report in reports.items()}
    if args.gradescope:
        write_json(args.gradescope, gradescope(next(iter(reports.values()))))
    else:
        write_json(args.out / "report.json", reports)
        write_json(args.out / "grades.json", grades)
    print(class_table(grades))
    for name, report in reports.items():
        for note in report["notes"]:
            print(f"{name}: {note}")


if __name__ == "__main__":
    main()
