"""A run's folder for other programs: what its card says is what was logged, and mistakes are sentences."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_entropy as je
from jax_entropy.commands.main import main
from jax_entropy.config import default_config, model_config
from jax_entropy.data.tokenizer import train_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.export import FORMATS, export_run
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.workdir import Workdir
from jax_entropy.state import init_state
from tests.report.helpers import write_run

NAME = "EReg(SM+ScFuFFN)"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of which every format can be written but GPT-2: three evaluations, checkpoints at 500 and 1,000."""
    folder = tmp_path_factory.mktemp("runs") / "a|run"
    write_run(folder, L=2, N=2, steps=20, incidents=(430,))
    config = default_config(NAME)
    config.model.update(num_layers=2, num_heads=2, model_dim=16, context_length=32, final_norm="none")
    workdir = Workdir(folder)
    (folder / "config.json").unlink()
    workdir.claim(config, train_tokenizer(["def f(x):\n    return x\n"], 300))
    workdir.write_status("complete", 1000, 1000, devices="2 × CPU", command="train --config=quickstart")
    model = je.Transformer(model_config(config, workdir_vocabulary(workdir)))
    state = jax.jit(functools.partial(init_state, config, model))()
    with Checkpointer(workdir.checkpoints) as checkpointer:
        for step, loss in ((500, 1.0), (1000, 2.0)):
            params = jax.tree.map(lambda x, step=step: x + step / 1e4, state.params)
            checkpointer.save(step, state._replace(step=jnp.int32(step), params=params), None, {}, loss)
    return folder


def workdir_vocabulary(workdir):
    return len(json.loads(workdir.tokenizer.read_text())["model"]["vocab"])


def test_safetensors_of_a_run_give_equal_logits(run, tmp_path):
    assert main(["convert", str(run), "--to=safetensors", f"--safetensors={tmp_path}/out", "--best"]) == 0
    trained = je.load_run(run, pytest.fail, best=True)
    config, variables = je.from_safetensors(tmp_path / "out")
    tokens = np.arange(20)[None]
    expected = jax.jit(trained.model.apply)(trained.variables, tokens)[0]
    np.testing.assert_array_equal(jax.jit(je.Transformer(config).apply)(variables, tokens)[0], expected)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # whoever may read the settings may read the weights
    assert trained.step == 500 and (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("to", ["safetensors", "transformer_lens"])
def test_the_card_says_what_was_logged(run, tmp_path, to):
    export_run(run, tmp_path / "out", to, pytest.fail, best=True)
    text = (tmp_path / "out" / "README.md").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [line for line in lines if line["kind"] == "evaluate" and line["step"] == 500]
    entropy_LxN = np.asarray(evaluation["head_entropy"])
    batch = default_config(NAME).train.batch_size
    for fact in (
        f"# {NAME}, ", "| data | Python standard library |", f"| tokens | {500 * batch * 32:,} (",
        "| sent back by the guard | 1 × |", "| command | train --config=quickstart |",
        f"| perplexity | {math.exp(evaluation['validation_loss']):.4g} |", "| evaluated at step | 500 |",
        f"Mean head entropy {entropy_LxN.mean():.3f} nats", f"| 1 | {entropy_LxN[1].mean():.3f} |",
        "under secure computation (32 tokens, semi2k, predicted)", "| softmax | ",
    ):  # fmt: skip
        assert fact in text, fact
    assert text.startswith("---\nlibrary_name: ") and ("HookedTransformer(" in text) == (to == "transformer_lens")


def test_a_card_without_measurements_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Workdir, "read_status", lambda self: None)
    (run / "metrics.jsonl").rename(run / "aside")
    try:
        export_run(run, tmp_path / "out", "safetensors", pytest.fail)
    finally:
        (run / "aside").rename(run / "metrics.jsonl")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing is known of its training: " in text and r"a\|run" in text and "## Held-out text" not in text


def test_mistakes_are_sentences(run, tmp_path, capfd):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for flags, sentence in (
        (["--to=safetensor", "--safetensors=out"], "--to='safetensor' is not known; did you mean 'safetensors'?"),
        (["--to=safetensors"], "--safetensors is missing"),
        (["--to=workdir"], "--huggingface or --safetensors is missing"),
        (
            ["--to=workdir", "--safetensors=in", "--huggingface=in"],
            "--huggingface or --safetensors: each names a folder",
        ),
        (["--to=workdir", "--transformer_lens=in"], "whose folder is --huggingface or --safetensors"),
        (["--to=workdir", "--safetensors=in"], "holds a run already"),
        (["--to=safetensors", "--safetensors=out", "--huggingface=out"], "--huggingface does not go with --to=safeten"),
        (["--to=safetensors", f"--safetensors={tmp_path}/full"], "is not an empty folder"),
        (["--to=safetensors", f"--safetensors={tmp_path}/full/thesis.tex"], "is not an empty folder"),
        (["--to=safetensors", "--safetensors=gs://bucket"], "is an address on a network"),
        (["--to=huggingface", f"--huggingface={tmp_path}/out"], "safetensors have a place for every model"),
    ):
        assert main(["convert", str(run), *flags]) == 2
        error = capfd.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="to='tl' is not known; did you mean 'transformer_lens'"):
        export_run(run, tmp_path / "out", "tl")
    assert set(FORMATS) == {"huggingface", "safetensors", "transformer_lens"}
