"""Grade the wrong solutions of course/wrong/: `python -m course.mutants [N...]`.

Each is the right solution with one edit. The hidden tests must catch every one, and the public
tests those that say so. Prints which test catches which (the table in course/wrong/README.md), and
exits non-zero if one gets through.
"""

import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from course import build, syntax


@dataclass
class Wrong:
    """One wrong solution. `public`: the public tests catch it."""

    name: str
    function: str
    old: str
    new: str
    public: bool


def load(exercise: build.Exercise):
    path = build.COURSE / "wrong" / f"{exercise.slug}.toml"
    return [Wrong(**one) for one in tomllib.loads(path.read_text())["wrong"]]


def mutated(files: dict, wrong: Wrong):
    """(path, text) of the file with the edit. Raises ValueError unless `old` occurs once."""
    path, inner = build.place_of(wrong.function)
    function = syntax.source(files[path], inner)
    if function.count(wrong.old) != 1:
        times = function.count(wrong.old)
        raise ValueError(
            f"{wrong.function}, {wrong.name}: {wrong.old!r} occurs {times} times, not once"
        )
    changed = function.replace(wrong.old, wrong.new)
    return path, files[path].replace(function, changed)


def graded(exercise: build.Exercise, wrongs):
    """For each wrong solution the tests that did not pass: [(kind, test, message)]."""
    others = {one.number for one in build.load_exercises()} - {exercise.number}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        build.build(place, others)
        sys.path.insert(0, str(place / "instructor"))
        for path in build.GRADER:
            sys.modules.pop(path.removesuffix(".py"), None)
        for name in ("grading", "claims", "tiny"):
            sys.modules.pop(name, None)
        import grade_all

        solution = build.solution_files()
        exercises = grade_all.chosen([])
        with grade_all.Sandbox(sandboxed=False) as sandbox:  # the code is ours
            right = grade_all.grade(place / "instructor" / "solution", exercises, sandbox)["tests"]
            failed = [one["test"] for one in right if one["status"] not in ("passed", "blocked")]
            if failed:
                raise ValueError(f"{exercise.slug}: the right solution fails {', '.join(failed)}")
            for wrong in wrongs:
                tree = place / "submission"
                shutil.rmtree(tree, ignore_errors=True)
                build.copy_tree(place / "instructor" / "solution", tree)
                path, text = mutated(solution, wrong)
                (tree / path).write_text(text)
                tests = grade_all.grade(tree, exercises, sandbox)["tests"]
                failed = [one for one in tests if one["status"] not in ("passed", "blocked")]
                yield wrong, [(one["kind"], one["test"], one["message"]) for one in failed]
        sys.path = [entry for entry in sys.path if not entry.startswith(directory)]


def tests_in_words(failed, kind: str):
    """The first test of this kind that caught it, and how many others did."""
    names = [test.removeprefix("test_").replace("_", " ") for one, test, _ in failed if one == kind]
    return names[0] + f" (+{len(names) - 1})" * (len(names) > 1) if names else "none"


def problem(wrong: Wrong, failed):
    """What is not as it should be; empty if all is."""
    kinds = {kind for kind, *_ in failed}
    if "hidden" not in kinds:
        return "NO HIDDEN TEST CATCHES IT"
    if wrong.public != ("public" in kinds):
        return f"public = {str(wrong.public).lower()} is not true"
    return ""


def main(numbers):
    found = []
    print("| exercise | wrong solution | public tests | hidden tests | what it is told |")
    print("|---|---|---|---|---|")
    for exercise in build.load_exercises():
        if numbers and exercise.number not in numbers:
            continue
        wrongs = load(exercise)
        if len(wrongs) < 4:
            found.append(f"{exercise.slug} has {len(wrongs)} wrong solutions")
        for wrong, failed in graded(exercise, wrongs):
            caught = [tests_in_words(failed, kind) for kind in ("public", "hidden")]
            message = failed[0][2].replace("|", "/") if failed else ""
            cells = [str(exercise.number), wrong.name, *caught, message]
            print(f"| {' | '.join(cells)} |", flush=True)
            if problem(wrong, failed):
                found.append(f"{exercise.slug}, {wrong.name}: {problem(wrong, failed)}")
    if found:
        sys.exit("\n".join(found))
    print("every wrong solution is caught", file=sys.stderr)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    if len(numbers) < len(sys.argv) - 1:
        sys.exit(__doc__)
    try:
        main(numbers)
    except ValueError as error:
        sys.exit(f"course.mutants: error: {error}")
