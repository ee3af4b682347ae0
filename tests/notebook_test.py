"""The Colab notebook: paired with its script, and executed."""

import re

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests import REPOSITORY

COLAB = REPOSITORY / "docs" / "colab"


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebook_and_script_are_a_pair():
    script, notebook = jupytext.read(COLAB / "quickstart.py"), nbformat.read(COLAB / "quickstart.ipynb", as_version=4)
    assert sources(script) == sources(notebook)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_says(tmp_path):
    notebook = nbformat.read(COLAB / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 3
    assert "the entropy's gradient reaches the queries: True" in text
    perplexity = {
        name: float(value) for name, value in re.findall(r"^(SM|EReg) +held-out perplexity ([\d.]+)$", text, re.M)
    }
    # an untrained model stands at the size of the vocabulary, 2048
    assert set(perplexity) == {"SM", "EReg"} and max(perplexity.values()) < 1024
