"""The notebooks: paired with their scripts, their outputs kept and what the text says of them true, and executed.

`python -m tests.notebook_test quickstart` executes a script in full, and keeps what came out in its notebook.
"""

import asyncio
import re
import sys
import tempfile
from pathlib import Path

import IPython.display
import jax
import jupytext
import matplotlib
import nbformat
import pytest
from nbclient import NotebookClient

import jax_entropy as je
from jax_entropy.private.engine import environment
from jax_entropy.sweep.frontier import frontier
from tests import REPOSITORY
from tests.sweep.helpers import stub

COLAB = REPOSITORY / "docs" / "colab"
NAMES = ["quickstart", "collapse_and_overload", "your_flax_model", "private_inference", "reproduce_a_table"]
TINY = {
    "model.num_layers": 1, "model.num_heads": 2, "model.model_dim": 16, "model.scan_unroll": 1,
    "data.source": "files", "data.files": str(Path(asyncio.__file__).parent), "data.vocab_size": 512,
    "train.num_steps": 2, "train.log_every": 1, "train.evaluate_every": 2, "train.evaluate_chunks": 8,
}  # fmt: skip
FEW = {"STEPS": 2, "NEW_TOKENS": 2, "L": 1}  # what cells at the top set
NUMBER = r"([\d.]+)"


def kept(name):
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


def code(name):
    return [cell.source for cell in jupytext.read(COLAB / f"{name}.py").cells if cell.cell_type == "code"]


def printed(notebook):
    """What the cells print, and the kinds of what they show beside it."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return text, [kind for output in outputs for kind in output.get("data", {}) if kind != "text/plain"]


def test_the_notebooks_are_those_that_are_executed_here():
    assert {path.stem for path in COLAB.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_and_script_are_a_pair(name):
    script, notebook = jupytext.read(COLAB / f"{name}.py"), kept(name)
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]
    assert code(name)[0] == code("quickstart")[0]  # each installs what it needs, in the same way


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_that_are_kept_are_small_and_of_no_machine(name):
    assert (COLAB / f"{name}.ipynb").stat().st_size < 350_000
    text, kinds = printed(kept(name))
    assert not re.search(r"/home/|/root|/work", text)
    assert ("text/html" in kinds) == (name == "collapse_and_overload")


def check_quickstart(text):
    assert float(re.search(rf"^perplexity {NUMBER}, {NUMBER} bits per byte$", text, re.M)[1]) < 300


def check_collapse_and_overload(text):
    frequencies = float(re.search(rf"^frequencies only +perplexity +{NUMBER}$", text, re.M)[1])
    rows = re.findall(rf"^(\w+) +perplexity +{NUMBER} +collapse +(\d+)% +overload +(\d+)%$", text, re.M)
    found = {name: tuple(map(float, values)) for name, *values in rows}
    (broken, collapse, overload), (guided, *steered) = found["SM"], found["EReg"]
    assert collapse >= 40 and overload >= 20 and steered[0] == 0
    # one has learned more than how often tokens occur, another has not
    assert found["GPT"][0] < guided < frequencies < broken


def check_your_flax_model(text):
    rows = re.findall(rf"^(\w[\w -]+?) +loss {NUMBER} +overload +(\d+)% +largest logit {NUMBER}$", text, re.M)
    found = {name: tuple(map(float, values)) for name, *values in rows}
    (_, overload, logit), (_, steered, clipped) = found["as it was"], found["penalty and QK-clip"]
    assert steered < overload and clipped < logit


def check_private_inference(text):
    assert "the same:     True" in text
    gigabytes = re.findall(rf"^(\S+), (plain|optimised) +{NUMBER} GB", text, re.M)
    costs = {(name, export): float(cost) for name, export, cost in gigabytes}
    assert costs["SM+LN+G", "plain"] > 5 * costs["EReg(SM(t)+ScFuFFN)", "optimised"]


def check_reproduce_a_table(text):
    assert "[8/8]" in text and "failed" not in text


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_that_are_kept_show_what_the_text_says(name):
    text, _ = printed(kept(name))
    if not text:
        pytest.skip(f"without outputs so far; python -m tests.notebook_test {name} makes them")
    globals()[f"check_{name}"](text)


def skip_without_engine(name):
    if name == "private_inference" and (reason := environment.why_not()):
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs(name, tmp_path, monkeypatch, corpus_directory):
    """Every cell, with a tiny model in the place of each that it trains."""
    shown, train = [], je.train

    def train_tiny(config, *arguments):
        config.update_from_flattened_dict(TINY | {"data.directory": str(corpus_directory)})
        return train(config, *arguments)

    monkeypatch.setattr(je, "train", train_tiny)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if name == "reproduce_a_table":  # what trains is tried elsewhere, and takes eight processes
        stub(monkeypatch, tmp_path, {}, draw=frontier)
    skip_without_engine(name)
    variables = {}
    with jax.numpy_rank_promotion("allow"), matplotlib.rc_context({"backend": "agg"}):  # as in a user's process
        for cell in code(name):
            exec(cell, variables)
            variables |= {given: few for given, few in FEW.items() if given in variables}
    assert len(shown) == {"quickstart": 1, "collapse_and_overload": 1, "reproduce_a_table": 2}.get(name, 0)


def executed(name):
    """The notebook of a script, executed as Jupyter does."""
    notebook = jupytext.read(COLAB / f"{name}.py")
    where = {"metadata": {"path": tempfile.mkdtemp()}}
    NotebookClient(notebook, timeout=900, coalesce_streams=True, record_timing=False, resources=where).execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        for output in cell.get("outputs", ()):
            if "text" in output:
                output.text = output.text.replace(str(Path.home()), "~")
    return notebook


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs_whole(name):
    skip_without_engine(name)
    text, kinds = printed(executed(name))
    assert kinds == printed(kept(name))[1]
    globals()[f"check_{name}"](text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(executed(name), COLAB / f"{name}.ipynb")
