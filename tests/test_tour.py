"""Claims about the tour: the notebook is what its script says, and it runs."""

import json
from importlib.util import find_spec

import pytest
from conftest import ROOT

from experiments.notebook import NOTEBOOK, SCRIPT, execute, notebook

MISSING = [name for name in ("nbclient", "ipykernel", "matplotlib") if not find_spec(name)]


def test_the_notebook_is_made_of_the_script_and_holds_outputs_of_no_machine():
    committed = json.loads(NOTEBOOK.read_text())
    made = notebook(SCRIPT.read_text())
    fields = ("cell_type", "source", "id")
    assert [[cell[f] for f in fields] for cell in committed["cells"]] == [
        [cell[f] for f in fields] for cell in made["cells"]
    ], "python -m experiments.notebook --execute"
    outputs = [x for cell in committed["cells"] for x in cell.get("outputs", [])]
    assert sum("image/png" in x.get("data", {}) for x in outputs) == 4
    assert not [x for x in outputs if x["output_type"] == "error"]
    assert str(ROOT) not in NOTEBOOK.read_text() and "site-packages" not in NOTEBOOK.read_text()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}, then this test runs")
def test_the_tour_runs_and_its_estimators_are_unbiased_but_for_the_top_k(monkeypatch, tmp_path):
    script = SCRIPT.read_text().replace("runs/tour", str(tmp_path))
    found = execute(notebook(script))
    text = "".join(
        x.text for cell in found.cells for x in cell.get("outputs", []) if x.get("name") == "stdout"
    )
    errors = [line.split() for line in text.splitlines() if "bias^2" in line]
    assert len(errors) == 8
    for line in errors:
        name, bias, variance = " ".join(line[:-4]), float(line[-3]), float(line[-1])
        assert (bias < 0.1) or name == "top 32"
        assert (variance == 0) == (name == "top 32") or (name == "16 + 16" and variance < 1e-3)
    images = [x for cell in found.cells for x in cell.get("outputs", []) if "data" in x]
    assert sum("image/png" in x.data for x in images) == 4
