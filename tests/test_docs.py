"""Claims the README makes about the tree."""

import re

from conftest import ROOT

BUDGETED = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]


def lines(path):
    return len(path.read_text().splitlines())


def test_the_readme_lists_every_file_with_its_line_count():
    table = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M))
    actual = {str(path.relative_to(ROOT)): str(lines(path)) for path in BUDGETED if path.name != "__init__.py"}
    assert table == actual


def test_the_line_budget_is_kept():
    """2,200 lines over the files of the design, 2,650 with the three that it does not name."""
    extra = [ROOT / name for name in ("attention.py", "model.py", "log.py")]
    assert sum(map(lines, BUDGETED)) - sum(map(lines, extra)) <= 2200 and sum(map(lines, BUDGETED)) <= 2650
    assert max(map(lines, BUDGETED)) <= 400


def test_torchrun_leaves_our_flags_to_us():
    """It takes abbreviations of its own options, --signal for one, unless -- comes first."""
    for name in ("README.md", "Makefile", "config.py", "train.py", "docs/gpu-checklist.md"):
        text = (ROOT / name).read_text()
        assert re.findall(r"torchrun .*(?:-- )train\.py", text) == re.findall(r"torchrun .*[ /]train\.py", text), name


def test_every_flag_in_the_readme_exists():
    from config import Config, flag

    known = {flag(name) for name in Config.__dataclass_fields__} | {"--config", "--help", "--standalone", "--nproc-per-node", "--shutdown-timeout"}
    known |= {"--model", "--json", "--seeds", "--threads", "--quick", "--starts", "--losses", "--out"}  # generate.py, benchmarks
    # not an arrow of the picture, --row#-->
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)(?!#)\b", (ROOT / "README.md").read_text())) <= known
