"""The tests of an exercise, and what came of them: for grade.py and the instructor's graders."""

import importlib.util
import inspect
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Outcome:
    """What came of one test. `status`: passed, failed, timeout or blocked."""

    name: str
    claim: str
    status: str
    message: str = ""
    seconds: float = 0.0


def tests_of(path: Path):
    """Name -> function of every test in a file, in its order."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: one for name, one in vars(module).items() if name.startswith("test_")}


def claim_of(test):
    return " ".join(inspect.getdoc(test).split())


def reason(error: BaseException):
    """Why a test failed, in one line; where the code raised, its place as well."""
    text = " ".join(str(error).split())
    if isinstance(error, (AssertionError, RemoteError)):
        return text
    if isinstance(error, SyntaxError):  # it says its place itself
        return f"{type(error).__name__}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    tree = Path(__file__).resolve().parent.parent
    # The last place in a file that a student may have written, or else the last of all.
    own = [one for one in frames if Path(one.filename).parent in (tree, tree / "kernels")]
    last = (own or frames)[-1]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}, line {last.lineno})"


class RemoteError(Exception):
    """What the code under test raised in another process."""


class Timeout(Exception):
    """The code under test took too long."""


def judge(test, student):
    """(status, message) of one test."""
    try:
        test(student)
    except Timeout as error:
        return "timeout", str(error)
    except Exception as error:
        return "failed", reason(error)
    return "passed", ""
