"""Grade a class: `python grade_all.py SUBMISSION...`, a directory or a zip file for each student.

    python grade_all.py submissions/*                   the table, and files in the directory grades
    python grade_all.py alice bob.zip --exercises 6 7   these exercises only
    python grade_all.py alice --public                  the public tests only
    python grade_all.py DIR --gradescope results.json   one submission, for Gradescope

Of a submission only the files that a student may edit count. They go into a clean tree. Every test
runs with a process of its own for the submission (sandbox.py). points.toml says what it is worth.
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
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
import tomllib
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "clean" / "tests")]

os.environ.setdefault("TQDM_DISABLE", "1")

import reports  # noqa: E402
from grading import claim_of, judge, tests_of  # noqa: E402
from sandbox import Nursery  # noqa: E402

LIMIT = 60.0  # seconds a test
LARGEST = 2**20  # bytes of a file that a student may hand in
KINDS = {"public": HERE / "clean" / "tests", "hidden": HERE / "hidden"}


class UsageError(Exception):
    pass


# ---- one submission ---------------------------------------------------------------------------


def name_of(path: Path):
    """Of the student."""
    return path.stem if path.is_file() else path.resolve().name


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
    try:
        return path.read_bytes(), None
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"


def root_of(names, files):
    """Which directory of a submission has the files: "", or the only one in it that has some."""
    roots = {name[: -len(file)] for name in names for file in files if name.endswith("/" + file)}
    inside = [root for root in sorted(roots) if root.count("/") == 1]
    return "" if len(inside) != 1 or set(names) & set(files) else inside[0]


def unpack(archive: zipfile.ZipFile, place: Path, files):
    """Take the files out of a zip file, and no others. Returns the directory they were in."""
    root = root_of(archive.namelist(), files)
    for file in {root + file for file in files} & set(archive.namelist()):
        target = place / file.removeprefix(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(file) as member:
            target.write_bytes(member.read(LARGEST + 1))  # one more: read_file says why
    return root


def names_in(directory: Path, files):
    """Those of the files that the directory has, and those that a directory in it has. No links."""
    inside = [one for one in directory.iterdir() if one.is_dir() and not one.is_symlink()]
    places = [directory, *inside]
    found = [place / file for place in places for file in files]
    return [str(one.relative_to(directory)) for one in found if os.path.lexists(one)]


@contextmanager
def opened(path: Path, files):
    """(directory with the submission's files, notes)."""
    with tempfile.TemporaryDirectory() as directory:
        place, root, notes = Path(directory), "", []
        try:
            if path.is_file():
                with zipfile.ZipFile(path) as archive:
                    root = unpack(archive, place, files)
            else:
                root = root_of(names_in(path, files), files)
                place = path / root
        except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            notes.append(f"it cannot be read: {error}")
        if root:
            notes.append(f"the files are taken from {root}")
        yield place, notes


def clean_tree(submission: Path, tree: Path, files):
    """A tree with these files of the submission. Returns (file -> its bytes, notes)."""
    shutil.copytree(HERE / "clean", tree, ignore=shutil.ignore_patterns("__pycache__"))
    found, notes = {}, []
    for name in files:
        data, why = read_file(submission / name)
        inside = (submission / name).resolve().is_relative_to(submission.resolve())
        if data is None or not inside:
            notes.append(f"{name} {why or 'lies outside of the submission'}: graded as not written")
            continue
        found[name] = data
        (tree / name).write_bytes(data)
    if not any(os.path.lexists(submission / name) for name in files):
        notes = ["none of the files is there: graded as not written"]
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return found, notes


def hash_of(found: dict, files):
    """Of the files of one exercise. Equal hashes are equal files."""
    digest = hashlib.sha256()
    for name in files:
        data = found.get(name, b"")
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def has_gpu():
    import torch

    return torch.cuda.is_available()


def run_test(nursery, tree: Path, test, limit: float):
    """(status, message, seconds) of one test."""
    if test.gpu and not has_gpu():
        return "blocked", "it needs a GPU", 0.0
    began = time.monotonic()
    try:
        place = nursery.compiling() if test.compiled else nursery
        with place.worker(tree, limit, test.gpu) as student:
            status, message = judge(test, student)
    except RuntimeError as error:
        status, message = "failed", str(error)
    return status, message, time.monotonic() - began


def grade(submission: Path, exercises: dict, nursery, limit: float = LIMIT):
    """The report of one submission. `exercises`: slug -> its table of points.toml."""
    files = sorted({name for one in exercises.values() for name in one["files"]})
    report = []
    with opened(submission, files) as (root, notes), tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        tree = Path(place).resolve() / "tree"
        found, more = clean_tree(root, tree, files)
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
    hashes = {slug: hash_of(found, one["files"]) for slug, one in exercises.items()}
    return {"sha256": hashes, "notes": notes + more, "tests": report}


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
            raise UsageError(f"{path} is no directory and no zip file: give one for each submission")
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


def grade_class(paths, exercises, jobs, limit, done):
    """Grade all, `jobs` at a time, and call done(name, report) as soon as one is."""
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
    with ThreadPoolExecutor(jobs) as pool, ExitStack() as stack:
        for _ in range(jobs):
            nursery = stack.enter_context(Nursery())
            free.put(nursery)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # Ctrl-C
        print(f"submissions are guarded by: {nursery.guards}", file=sys.stderr)
        for path, report in zip(paths, pool.map(one, paths)):
            done(name_of(path), report)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("submissions", type=Path, nargs="+", metavar="SUBMISSION")
    parser.add_argument("--out", type=Path, default=Path("grades"), help="where the files go")
    parser.add_argument("--exercises", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--public", action="store_true", help="the public tests only")
    parser.add_argument("--jobs", type=int, default=1, help="submissions at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a test")
    parser.add_argument("--gradescope", type=Path, help="write Gradescope's results.json here")
    args = parser.parse_args(argv)
    try:
        exercises = chosen(args.exercises, args.public)
        check_submissions(args.submissions)
        if args.jobs < 1 or args.limit <= 0:
            raise UsageError(f"--jobs {args.jobs} --limit {args.limit:g}: give more than 0")
        if args.gradescope and len(args.submissions) > 1:
            raise UsageError("--gradescope takes one submission")
        if not args.gradescope:
            check_out(args.out)
    except UsageError as error:
        sys.exit(f"grade_all.py: error: {error}")
    found = {}

    def done(name, report):
        found[name] = report
        if args.gradescope:
            reports.write_json(args.gradescope, reports.gradescope(report))
        else:
            reports.add(args.out, name, report)
        graded = reports.in_words(reports.grades_of(report))
        print(f"{len(found)}/{len(args.submissions)} {name}: {graded}", file=sys.stderr)

    grade_class(args.submissions, exercises, args.jobs, args.limit, done)
    noted = [name for name, report in found.items() if report["notes"]]
    grades = {name: reports.grades_of(report) for name, report in found.items()}
    print(reports.class_table(grades, noted))
    for name in noted:
        for note in found[name]["notes"]:
            print(f"* {name}: {note}")


if __name__ == "__main__":
    main()
