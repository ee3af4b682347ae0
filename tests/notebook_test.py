"""The Colab notebook: paired with its script."""

from pathlib import Path

import jupytext
import nbformat

COLAB = Path(__file__).parents[1] / "docs" / "colab"


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebook_and_script_are_a_pair():
    script, notebook = jupytext.read(COLAB / "quickstart.py"), nbformat.read(COLAB / "quickstart.ipynb", as_version=4)
    assert sources(script) == sources(notebook)
