"""Claims that README and docs make about the tree, and the budget that keeps it readable."""

import ast
import io
import re
import subprocess
import textwrap
import tokenize
from dataclasses import fields
from functools import cache

import pytest
from conftest import ROOT

TOKENS, CODE_LINES = 21_500, 2_300  # of the whole system, without comments and docstrings
WIDTH, TOKENS_PER_LINE, LONGEST_FILE = 100, 9.5, 400
OUTSIDE = ("tests/", "benchmarks/", "experiments/", "assets/", "docs/", "course/")
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FSTRING_START = getattr(
    tokenize, "FSTRING_START", None
)  # Python 3.12: an f-string is many tokens; they count as one
FSTRING_END = getattr(tokenize, "FSTRING_END", None)

BUDGETED = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]


def lines(path):
    return len(path.read_text().splitlines())


def test_the_readme_lists_every_file_with_its_line_count():
    table = dict(
        re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    )
    actual = {
        str(path.relative_to(ROOT)): str(lines(path))
        for path in BUDGETED
        if path.name != "__init__.py"
    }
    assert table == actual


# ---- the budget -------------------------------------------------------------------------------


@cache
def system():
    """Every tracked Python file of the system -> its source."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    paths = [ROOT / name for name in listed if not name.startswith(OUTSIDE)]
    return {
        path: path.read_text() for path in paths if path.exists()
    }  # one may be renamed just now


def docstring_lines(tree):
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def measure(source: str):
    """(tokens, code lines) without blanks, comments and docstrings."""
    docs, code, tokens, depth = docstring_lines(ast.parse(source)), set(), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in LAYOUT or token.start[0] in docs:
            continue
        code |= set(range(token.start[0], token.end[0] + 1))
        tokens += depth == 0
        depth += (token.type == FSTRING_START) - (token.type == FSTRING_END)
    return tokens, len(code)


def test_an_f_string_is_one_token_and_docstrings_are_none():
    source = (
        '"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return f"{x} and {f\'{x}\'!r}"  # why\n'
    )
    assert measure(source) == (8, 2)


def test_the_token_and_line_budget_is_kept():
    tokens, lines = (sum(counts) for counts in zip(*map(measure, system().values())))
    assert tokens <= TOKENS and lines <= CODE_LINES and tokens <= TOKENS_PER_LINE * lines, (
        tokens,
        lines,
        tokens / lines,
    )


def test_no_file_is_long_and_no_line_is_wide():
    for path, source in system().items():
        widths = [len(line) for line in source.splitlines()]
        assert len(widths) <= LONGEST_FILE and max(widths, default=0) <= WIDTH, path


def test_functions_are_short():
    nodes = [node for source in system().values() for node in ast.walk(ast.parse(source))]
    lengths = sorted(n.end_lineno - n.lineno + 1 for n in nodes if isinstance(n, ast.FunctionDef))
    assert (
        lengths[len(lengths) // 2] <= 9
        and lengths[int(0.9 * len(lengths))] <= 22
        and lengths[-1] <= 45
    )


# ---- what the pages say -----------------------------------------------------------------------


def find_excerpt(run: list[str], source: list[str], start: int):
    """Where the lines of `run` stand in `source` from line `start` on, whatever their indentation, or -1."""
    wanted = textwrap.dedent("\n".join(run))
    places = range(start, len(source) - len(run) + 1)
    return next(
        (i for i in places if textwrap.dedent("\n".join(source[i : i + len(run)])) == wanted), -1
    )


def check_excerpt(block: str):
    """Its first line names a file; each run of lines between `# ...` stands in that file, one after the other."""
    first, *body = block.splitlines()
    named = re.fullmatch(r"# ([\w/]+\.py)", first)
    assert named, f"an excerpt without a file name: {first}"
    source = (ROOT / named[1]).read_text().splitlines()
    end = 0
    for run in re.split(r"^\s*# \.\.\.$", "\n".join(body), flags=re.M):
        run = run.strip("\n").split("\n")
        start = find_excerpt(run, source, end)
        assert any(run) and start >= 0, f"not in {named[1]}, or not in this order:\n" + "\n".join(
            run
        )
        end = start + len(run)


def test_every_excerpt_in_the_walkthrough_stands_in_the_source():
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "walkthrough.md").read_text(), re.M | re.S
    )
    assert blocks
    for block in blocks:
        check_excerpt(block)


def test_an_excerpt_that_is_changed_out_of_order_or_without_a_file_is_found():
    good = "# channel.py\nversion = int(self.version)\n# ...\nif int(self.version) == version:\n    return version\n"
    check_excerpt(good)
    swapped = "# channel.py\nif int(self.version) == version:\n# ...\nversion = int(self.version)\n"
    for bad in (good.replace("version)", "versions)"), swapped, good.partition("\n")[2]):
        with pytest.raises(AssertionError):
            check_excerpt(bad)


def test_torchrun_leaves_our_flags_to_us():
    """It takes abbreviations of its own options, --signal for one, unless -- comes first."""
    for name in ("README.md", "Makefile", "config.py", "train.py", "docs/gpu-checklist.md"):
        text = (ROOT / name).read_text()
        assert re.findall(r"torchrun .*(?:-- )train\.py", text) == re.findall(
            r"torchrun .*[ /]train\.py", text
        ), name


def test_every_flag_in_the_readme_exists():
    from config import Config, new_option

    known = {new_option(item).opts[0] for item in fields(Config)} | {
        "--config",
        "--help",
        "--standalone",
        "--nproc-per-node",
        "--shutdown-timeout",
        "--nnodes",
        "--node-rank",
        "--master-addr",
        "--master-port",
        "--plan",
    }
    known |= {
        "--model",
        "--json",
        "--seeds",
        "--threads",
        "--quick",
        "--starts",
        "--losses",
        "--out",
        "--run",
        "--lags",
    }  # generate.py, benchmarks
    # not an arrow of the picture, --row#-->
    assert (
        set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)(?!#)\b", (ROOT / "README.md").read_text()))
        <= known
    )
