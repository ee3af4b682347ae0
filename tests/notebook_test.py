"""The Colab notebook: paired with its script, its outputs kept, and executed."""

import re

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests import REPOSITORY

COLAB = REPOSITORY / "docs" / "colab"
NUM_PICTURES = 5


@pytest.fixture
def notebook():
    return nbformat.read(COLAB / "quickstart.ipynb", as_version=4)


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def printed(notebook):
    """What the cells print, and how many pictures they show."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def test_notebook_and_script_are_a_pair(notebook):
    assert sources(jupytext.read(COLAB / "quickstart.py")) == sources(notebook)


def test_the_outputs_that_are_kept_show_what_the_text_says(notebook):
    text, pictures = printed(notebook)
    assert pictures == NUM_PICTURES
    number = r"([\d.]+)"
    frequencies = float(re.search(rf"^frequencies only +perplexity +{number}$", text, re.M)[1])
    rows = re.findall(rf"^(\w+) +perplexity +{number} +collapse +(\d+)% +overload +(\d+)%$", text, re.M)
    found = {name: tuple(map(float, values)) for name, *values in rows}
    (broken, collapse, overload), (guided, *steered) = found["SM"], found["EReg"]
    assert collapse >= 50 and overload >= 25 and steered[0] == 0 and steered[1] < overload
    assert guided < frequencies < broken  # one has learned more than how often tokens occur, the other has not
    assert "/home/" not in text and "/root" not in text


@pytest.mark.slow
def test_the_notebook_runs(notebook, tmp_path):
    (cell,) = [cell for cell in notebook.cells if "STEPS = 250" in cell.source]
    cell.source = cell.source.replace("STEPS = 250", "STEPS = 6")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    text, pictures = printed(notebook)
    assert pictures == NUM_PICTURES and len(re.findall(r"^\w+ +perplexity", text, re.M)) == 2
