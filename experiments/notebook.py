"""Make docs/tour.ipynb of docs/tour.py: `python -m experiments.notebook`

Cells begin with `# %%` or `# %% [markdown]`. `--execute` runs them and keeps what they print and
draw (`pip install nbclient ipykernel matplotlib`).
"""

import argparse
import json
import re
from pathlib import Path

from experiments.study import ROOT

SCRIPT, NOTEBOOK = ROOT / "docs" / "tour.py", ROOT / "docs" / "tour.ipynb"
META = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def cells(script: str) -> list[dict]:
    """The cells of a script, without outputs."""
    found = []
    for number, part in enumerate(re.split(r"^# %%", script, flags=re.M)[1:]):
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        cell = {"cell_type": "code", "id": f"cell-{number}", "metadata": {}}
        if head.strip() == "[markdown]":
            cell["cell_type"] = "markdown"
            body = re.sub(r"^# ?", "", body, flags=re.M)
        else:
            cell |= {"execution_count": None, "outputs": []}
        found.append(cell | {"source": body.splitlines(keepends=True)})
    return found


def notebook(script: str) -> dict:
    return {"cells": cells(script), "metadata": META, "nbformat": 4, "nbformat_minor": 5}


def execute(content: dict, seconds: int = 1200) -> dict:
    """The notebook with the outputs of its cells. Raises what a cell raises."""
    import nbformat
    from nbclient import NotebookClient

    found = nbformat.reads(json.dumps(content), as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return NotebookClient(found, timeout=seconds, resources=where).execute()


def write(content: dict, path: Path = NOTEBOOK):
    """Without what differs from machine to machine."""
    content = json.loads(json.dumps(content))
    content["metadata"] = META
    for cell in content["cells"]:
        cell["metadata"] = {}
        if isinstance(cell["source"], str):  # nbclient joins the lines
            cell["source"] = cell["source"].splitlines(keepends=True)
        if cell["cell_type"] == "code":  # warnings name paths
            cell["outputs"] = [x for x in cell["outputs"] if x.get("name") != "stderr"]
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser("python -m experiments.notebook", description=__doc__)
    parser.add_argument("--execute", action="store_true", help="run the cells, keep the outputs")
    args = parser.parse_args()
    content = notebook(SCRIPT.read_text())
    write(execute(content) if args.execute else content)


if __name__ == "__main__":
    main()
