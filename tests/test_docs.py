"""Claims that README and docs make about the tree, and the size that keeps it readable."""

import ast
import io
import re
import subprocess
import sys
import textwrap
import tokenize
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

from support.config import Config, new_option

CODE_LINES, WIDTH, LONGEST_FILE = 2_827, 100, 400  # 2,300 were planned: docs/decisions.md
MEDIAN, NINE_IN_TEN, LONGEST = 9, 22, 45  # lines of a function
OUTSIDE = {"experiments", "benchmarks", "tests", "course", "assets"}
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
LOADED = """
import sys, train, serial
files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
print(*filter(None, files), sep="\\n")
"""

# ---- the size ---------------------------------------------------------------------------------


@cache
def tracked():
    """Python files of the project -> their sources."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [path for path in listed.stdout.splitlines() if (ROOT / path).is_file()]
    return {path: (ROOT / path).read_text() for path in paths}


@cache
def core():
    """What train.py and serial.py load, and what these files import inside of functions."""
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = {Path(line).resolve() for line in done.stdout.splitlines()}
    found = [path for path in tracked() if (ROOT / path).resolve() in files]
    for path in found:  # grows
        found += [other for other in imports_of(path) if other not in found]
    return {path: tracked()[path] for path in found}


def names_imported(source: str):
    """Every dotted name that an import statement, wherever it stands, may have loaded."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import relative to its package"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(path: str):
    """The project's files that a file imports."""
    places = [name.replace(".", "/") for name in names_imported(tracked()[path])]
    files = {file for place in places for file in (f"{place}.py", f"{place}/__init__.py")}
    return sorted(files & tracked().keys() - {path})


def docstring_lines(tree):
    found = set()
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def code_lines(source: str):
    """Lines that hold code: no blanks, comments or docstrings."""
    docs, code = docstring_lines(ast.parse(source)), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and token.start[0] not in docs:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code)


def test_a_line_of_code_is_none_of_blanks_comments_and_docstrings():
    source = '"""Doc."""\n\n\ndef f(x):\n    """Doc.\n\n    More.\n    """\n    # why\n'
    assert code_lines(source) == 1 and code_lines(source + '    return """a\n\nb"""\n') == 4


def test_the_core_is_what_the_two_programs_load():
    expected = {"serial.py", "train.py", "losses.py", "kernels/terms.py", "support/ranks.py"}
    assert core().keys() > expected and not core().keys() & {"tests/conftest.py", "course/build.py"}


def test_the_core_has_no_more_code_than_its_budget():
    total = sum(map(code_lines, core().values()))
    assert total <= CODE_LINES, f"{total} lines of code"


def test_no_file_of_the_core_is_long():
    lengths = {path: len(source.splitlines()) for path, source in core().items()}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_of_the_core_are_short():
    nodes = [node for source in core().values() for node in ast.walk(ast.parse(source))]
    lengths = sorted(n.end_lineno - n.lineno + 1 for n in nodes if isinstance(n, ast.FunctionDef))
    found = lengths[len(lengths) // 2], lengths[int(0.9 * len(lengths))], lengths[-1]
    assert all(map(int.__le__, found, (MEDIAN, NINE_IN_TEN, LONGEST))), found


def test_no_line_of_any_file_is_wide():
    lines = [(path, line) for path, source in tracked().items() for line in source.splitlines()]
    assert [(path, line) for path, line in lines if len(line) > WIDTH] == []


# ---- who imports whom -------------------------------------------------------------------------


def test_the_core_imports_nothing_from_outside_of_it():
    strays = {(path, other) for path in core() for other in imports_of(path)}
    assert {(path, other) for path, other in strays if other.split("/")[0] in OUTSIDE} == set()


def test_no_files_of_the_core_import_each_other_in_a_circle():
    left = {path: set(imports_of(path)) for path in core()}
    while free := {path for path, others in left.items() if not others & left.keys()}:
        left = {path: others for path, others in left.items() if path not in free}
    assert left == {}


def test_the_losses_need_nothing_but_torch_and_the_standard_library():
    roots = {name.split(".")[0] for name in names_imported(tracked()["losses.py"])}
    assert roots - sys.stdlib_module_names == {"torch"}


# ---- what the pages say -----------------------------------------------------------------------


def test_the_readme_lists_every_file_of_the_core_with_its_line_count():
    """A row is a file, or a folder with the names of its files."""
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"<!-- files -->\n(.*?)<!-- /files -->", text, re.S)
    rows = re.findall(r"^\| `([\w/.]+)` \| ([\d,]+) \| (.*) \|$", table, re.M)
    lengths = {path: len(source.splitlines()) for path, source in core().items()}
    lengths = {path: length for path, length in lengths.items() if "__init__" not in path}
    listed = []
    for name, count, what in rows:
        files = [name]
        if name.endswith("/"):
            files = [name + file for file in re.findall(r"`(\w+\.py)`", what)]
        assert f"{sum(lengths[file] for file in files):,}" == count, name
        listed += files
    assert sorted(listed) == sorted(lengths)


def find_excerpt(run: list[str], source: list[str], start: int):
    """Where `run` stands in `source` from line `start` on, whatever its indentation, or -1."""
    wanted = textwrap.dedent("\n".join(run))
    for i in range(start, len(source) - len(run) + 1):
        if textwrap.dedent("\n".join(source[i : i + len(run)])) == wanted:
            return i
    return -1


def check_excerpt(block: str):
    """Its first line names a file. Each run of lines between `# ...` stands there, in order."""
    first, *body = block.splitlines()
    named = re.fullmatch(r"# ([\w/]+\.py)", first)
    assert named, f"an excerpt without a file name: {first}"
    source = (ROOT / named[1]).read_text().splitlines()
    end = 0
    for run in re.split(r"^\s*# \.\.\.$", "\n".join(body), flags=re.M):
        run = run.strip("\n").split("\n")
        start = find_excerpt(run, source, end)
        where = f"not in {named[1]}, or not in this order:\n"
        assert any(run) and start >= 0, where + "\n".join(run)
        end = start + len(run)


def test_every_excerpt_in_the_walkthrough_stands_in_the_source():
    text = (ROOT / "docs" / "walkthrough.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks
    for block in blocks:
        check_excerpt(block)


def test_an_excerpt_that_is_changed_out_of_order_or_without_a_file_is_found():
    first = "version = int(self.version)\n"
    then = "if int(self.version) == version:\n    return version\n"
    good = f"# channel.py\n{first}# ...\n{then}"
    check_excerpt(good)
    swapped = f"# channel.py\n{then}# ...\n{first}"
    for bad in (good.replace("version)", "versions)"), swapped, good.partition("\n")[2]):
        with pytest.raises(AssertionError):
            check_excerpt(bad)


# ---- flags ------------------------------------------------------------------------------------


def flags():
    """Every flag of train.py, those that switch something off included."""
    options = [new_option(item) for item in fields(Config)]
    return [flag for option in options for flag in (*option.opts, *option.secondary_opts)]


@pytest.mark.parametrize("flag", [*flags(), "--config"])
def test_torchrun_leaves_our_flags_to_us(flag):
    """It takes abbreviations of its own options, so none of ours may be one."""
    found = get_args_parser().parse_args(["--standalone", "train.py", flag, "x"])
    assert found.training_script == "train.py" and found.training_script_args == [flag, "x"]


OF_OTHERS = set(
    """--config --help --standalone --nproc-per-node --shutdown-timeout --nnodes --node-rank
    --master-addr --master-port --plan --model --json --seeds --threads --quick --starts --losses
    --out --run --lags --mix --to""".split()
)  # torchrun, experiments, benchmarks


def test_every_flag_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    # No arrow of the picture, --row#-->.
    named = re.findall(r"(?<![\w-])(--[a-z][a-z-]+)(?!#)\b", text)
    assert {*named} - {*flags()} - OF_OTHERS == set()
