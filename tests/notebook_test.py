"""The Colab notebook: paired with its script, and executed on CPU as a reader would."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

COLAB = Path(__file__).parents[1] / "docs" / "colab"


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebook_and_script_are_a_pair():
    script, notebook = jupytext.read(COLAB / "quickstart.py"), nbformat.read(COLAB / "quickstart.ipynb", as_version=4)
    assert sources(script) == sources(notebook)


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    notebook = nbformat.read(COLAB / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    text = "".join(output.get("text", "") for output in outputs)
    perplexities = [float(line.split()[-1]) for line in text.splitlines() if "held-out perplexity" in line]
    assert len(perplexities) == 2 and perplexities[1] < perplexities[0] < 2048
    assert "gradient reaches the queries: True" in text
