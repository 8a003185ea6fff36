"""Cut an assignment out of the source: `python -m course.build --out DIR` (or `make assignment`).

    DIR/student/      what students get: the source with the exercises blank, public tests, grade.py
    DIR/instructor/   solution/ (the student's tree with the solutions), hidden tests, the graders

exercises.toml says what is blank. `--solved 3 7` leaves those exercises in, as for a course that
does without them; their tests and points go too. DIR/student and DIR/instructor must not exist.
"""

import argparse
import ast
import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from course import syntax

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
ASSETS = ("*.json", "*.jinja", "*.safetensors")
GRADER = ("grade_all.py", "reports.py", "sandbox.py", "submission.py")


@dataclass
class Exercise:
    """One entry of exercises.toml."""

    number: int
    name: str
    title: str
    week: int
    hours: int
    functions: list[str]
    success: str
    twins: list[str] = field(default_factory=list)
    docstrings: dict[str, str] = field(default_factory=dict)

    @property
    def slug(self):
        return f"{self.number:02d}_{self.name}"

    @property
    def files(self):
        """The files that a student edits for it."""
        return sorted({place_of(name)[0] for name in self.functions})


def place_of(name: str):
    """(file, qualified name in it): "kernels.head.CandidateLoss.forward" -> kernels/head.py and
    CandidateLoss.forward. The second is empty where `name` is a file's."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = "/".join(parts[:count]) + ".py"
        if (ROOT / path).is_file() or (COURSE / "student" / path).is_file():
            return path, ".".join(parts[count:])
    raise KeyError(f"exercises.toml: no file has {name}")


def read_toml():
    return tomllib.loads((COURSE / "exercises.toml").read_text())


def load_exercises():
    return [Exercise(**one) for one in read_toml()["exercise"]]


# ---- blanking ---------------------------------------------------------------------------------


def blanked(files: dict, exercise: Exercise):
    """The files (path -> text) with one exercise blank."""
    files = dict(files)
    docstrings = dict(exercise.docstrings)
    stubs = {path: COURSE / "student" / path for path in exercise.files}
    if all(stub.is_file() for stub in stubs.values()):  # a file that exists for the course alone
        return files | {path: stub.read_text() for path, stub in stubs.items()}
    said = f"exercise {exercise.number}: {exercise.title}"
    messages = dict.fromkeys(exercise.functions, said)
    said = f"shows the answer to exercise {exercise.number}"
    messages |= dict.fromkeys(exercise.twins, said)
    for name, message in messages.items():
        path, inner = place_of(name)
        files[path] = syntax.blank(files[path], inner, message, docstrings.pop(name, None))
    for name, docstring in docstrings.items():
        path, inner = place_of(name)
        files[path] = syntax.set_docstring(files[path], inner, docstring)
    return files


def solution_files():
    """path -> text of the student's Python files with every solution in."""
    toml = read_toml()
    files = {path: (ROOT / path).read_text() for path in toml["source"] if path.endswith(".py")}
    for name, new in toml["replace"].items():
        path, inner = place_of(name)
        files[path] = syntax.graft(files[path], inner, new.lstrip())
    return files | {"estimator.py": (COURSE / "instructor" / "estimator.py").read_text()}


def all_blank(files: dict, exercises):
    """Two exercises may show each other's answer: a twin that one asks for is that one's alone."""
    asked = {name for one in exercises for name in one.functions}
    for one in exercises:
        twins = [name for name in one.twins if name not in asked]
        others = asked - set(one.functions)
        docstrings = {name: text for name, text in one.docstrings.items() if name not in others}
        files = blanked(files, replace(one, twins=twins, docstrings=docstrings))
    return files


def with_solutions(files: dict, solution: dict, names):
    """The files with the functions `names` taken from the solution."""
    files = dict(files)
    for name in names:
        path, inner = place_of(name)
        if (COURSE / "student" / path).is_file():
            files[path] = solution[path]
        else:
            files[path] = syntax.graft(files[path], inner, solution[path])
    return files


# ---- the two trees ----------------------------------------------------------------------------


def copy(source: Path, target: Path):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def copy_tree(source: Path, target: Path):
    """Without compiled leftovers."""
    shutil.copytree(
        source,
        target,
        ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".pytest_cache"),
        copy_function=shutil.copyfile,
    )


def write_tree(tree: Path, files: dict, exercises):
    """A student's tree with these Python files."""
    copy_tree(COURSE / "student", tree)
    for path in read_toml()["source"]:
        if path not in files:
            copy(ROOT / path, tree / path)
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    for name in ("student", "teacher"):
        for pattern in ASSETS:
            for file in (ROOT / "assets" / name).glob(pattern):
                copy(file, tree / "assets" / name / file.name)
    for file in (COURSE / "tests").glob("*.py"):
        if not file.name.startswith("test_"):
            copy(file, tree / "tests" / file.name)
    copy(COURSE / "fixture" / "rollouts.safetensors", tree / "tests" / "rollouts.safetensors")
    for exercise in exercises:
        copy(COURSE / f"{exercise.slug}.md", tree / "handouts" / f"{exercise.slug}.md")
        test = f"test_{exercise.slug}.py"
        copy(COURSE / "tests" / test, tree / "tests" / test)
        picture = COURSE / "pictures" / f"{exercise.slug}.png"
        if picture.exists():
            copy(picture, tree / "handouts" / "pictures" / picture.name)
    package = tree / "package.py"
    names = sorted({path for exercise in exercises for path in exercise.files})
    lines = "".join(f"    {toml_text(name)},\n" for name in names)
    package.write_text(package.read_text().replace("FILES = ()", f"FILES = (\n{lines})"))
    readme = tree / "README.md"
    readme.write_text(readme.read_text().replace("<!-- exercises -->", table(exercises)))


def table(exercises):
    """The exercises, for the student's README."""
    lines = ["| | exercise | week | hours | you write in |", "|---|---|---|---|---|"]
    for one in exercises:
        link = f"[{one.title}](handouts/{one.slug}.md)"
        files = ", ".join(f"`{path}`" for path in one.files)
        lines.append(f"| {one.number} | {link} | {one.week} | {one.hours} | {files} |")
    return "\n".join(lines)


def points_of(path: Path):
    """test -> (points, what it needs), from the decorator `worth` of each."""
    found = {}
    for name, node in syntax.functions(path.read_text()).items():
        if name.startswith("test_"):
            calls = [one for one in node.decorator_list if ast.unparse(one).startswith("worth(")]
            if len(calls) != 1:
                raise ValueError(f"{path.name}: {name} needs one @worth, not {len(calls)}")
            (call,) = calls
            needs = [keyword.arg for keyword in call.keywords if keyword.value.value]
            found[name] = call.args[0].value, needs
    return found


def points_toml(instructor: Path, exercises, out: Path, kinds=("public", "hidden")):
    """points.toml: what every test is worth. grade_all.py reads it, so it can be edited."""
    lines = ["# points of every test; `gpu`: it is blocked where there is no GPU"]
    for one in exercises:
        lines += ["", f"[{one.slug}]", f"title = {toml_text(one.title)}"]
        lines += [f"files = [{', '.join(map(toml_text, one.files))}]"]
        places = {"public": instructor / "solution" / "tests", "hidden": instructor / "hidden"}
        for kind, place in places.items():
            lines.append(f"[{one.slug}.{kind}]")
            tests = points_of(place / f"test_{one.slug}.py") if kind in kinds else {}
            for name, (points, needs) in tests.items():
                said = "".join(f", {word} = true" for word in needs)
                lines.append(f"{name} = {{ points = {points}{said} }}")
    out.write_text("\n".join(lines) + "\n")


def toml_text(text: str):
    return f'"{text}"'


def build(out: Path, solved=()):
    """Write both trees. Raises FileExistsError if one is there."""
    exercises = load_exercises()
    unknown = set(solved) - {one.number for one in exercises}
    if unknown:
        raise KeyError(f"--solved {sorted(unknown)}: there are 1 to {len(exercises)}")
    exercises = [one for one in exercises if one.number not in solved]
    for name in ("student", "instructor"):
        if (out / name).exists():
            raise FileExistsError(f"{out / name} exists: delete it or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: what is interrupted leaves nothing.
    with tempfile.TemporaryDirectory(dir=out) as place:
        made = Path(place)
        solution = solution_files()
        write_tree(made / "student", all_blank(solution, exercises), exercises)
        copy_tree(COURSE / "instructor", made / "instructor")
        for name in ("setup.sh", "run_autograder"):
            (made / "instructor" / name).chmod(0o755)
        (made / "instructor" / "estimator.py").unlink()
        write_tree(made / "instructor" / "solution", solution, exercises)
        for exercise in exercises:
            test = f"test_{exercise.slug}.py"
            copy(COURSE / "hidden" / test, made / "instructor" / "hidden" / test)
        copy_tree(made / "student", made / "instructor" / "clean")
        points_toml(made / "instructor", exercises, made / "instructor" / "points.toml")
        bundle = made / "instructor" / "classroom50"  # students can download it: no hidden tests
        copy_tree(made / "student", bundle / "clean")
        for name in GRADER:
            copy(made / "instructor" / name, bundle / name)
        points_toml(made / "instructor", exercises, bundle / "points.toml", ("public",))
        for name in ("student", "instructor"):
            (made / name).rename(out / name)
    return exercises


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/assignment"))
    parser.add_argument("--solved", type=int, nargs="+", default=[], metavar="N")
    args = parser.parse_args()
    try:
        exercises = build(args.out, args.solved)
    except (FileExistsError, KeyError, ValueError) as error:
        sys.exit(f"course.build: error: {error.args[0]}")
    print(f"{args.out}/student: {len(exercises)} exercises, none solved")
    print(f"{args.out}/instructor: solutions, hidden tests, graders; read docs/teaching.md")


if __name__ == "__main__":
    main()
