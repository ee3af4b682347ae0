"""Safetensors of our own: every architecture comes back to the bit, and a sentence for every other folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_entropy.config import model_config
from jax_entropy.errors import UserError
from jax_entropy.huggingface.convert import folder_config, import_run
from jax_entropy.huggingface.native import from_safetensors, to_safetensors
from jax_entropy.model import Transformer
from jax_entropy.runs.load import load_model
from jax_entropy.runs.workdir import Workdir
from jax_entropy.training.warm_start import source_config
from tests.tiny_model import VARIED, tiny


def random_variables(config):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes, rng = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens), np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), shapes)


@pytest.mark.parametrize("name", VARIED)
def test_every_model_comes_back_to_the_bit(tmp_path, name):
    config = tiny(name, bias="all", tied_head=False)
    variables = random_variables(config)
    to_safetensors(config, variables, tmp_path)
    read, found = from_safetensors(tmp_path)
    assert read == config and str(read) == json.loads((tmp_path / "config.json").read_text())["architecture"]
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert model_config(folder_config(tmp_path), config.vocab_size) == config


def test_what_was_published_is_a_run_again(tmp_path):
    """With what its run took out still out, and its singular vectors; without a tokenizer it cannot be asked."""
    config = tiny("EReg(SM(t)+FN+SReparam(QKV+FFN)+BiFFN+Conv4+QKN^1)", final_norm="layer", threshold_init=0.4)
    variables = random_variables(config)
    to_safetensors(config, variables, tmp_path / "published")
    import_run(tmp_path / "published", tmp_path / "run", lambda line: None)
    workdir = Workdir(tmp_path / "run")
    read, found, step, _ = load_model(workdir, workdir.read_config(), config.vocab_size, pytest.fail)
    assert (read, step) == (config, 0) and set(found) == {"params", "spectral"}
    with pytest.raises(UserError, match="has no good checkpoint with a finite validation loss; the newest is loaded"):
        load_model(workdir, workdir.read_config(), config.vocab_size, pytest.fail, best=True)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert source_config(tmp_path / "published").architecture == str(config)
    for source, target, sentence in (("published", "run", "holds a run already"), ("run", "new", "model_type=None")):
        with pytest.raises(UserError, match=sentence):
            import_run(tmp_path / source, tmp_path / target, pytest.fail)


def test_a_model_between_two_architectures_is_no_run(tmp_path):
    config = tiny("SM")
    on_its_way = random_variables(config) | {"annealing": {"final_norm": {"amount": jnp.zeros(())}}}
    to_safetensors(config, on_its_way, tmp_path)
    with pytest.raises(UserError, match="while its run still took nonlinearities out"):
        import_run(tmp_path, tmp_path / "run")


def test_the_variables_of_another_model_are_not_written(tmp_path):
    for overrides, sentence in (
        (dict(num_layers=3), r"have \[2, 2, 8\] for params/blocks/attention/key/bias, but SM .* \[3, 2, 8\]"),
        (dict(learned_positions=False), "have the tensor 'params/position_embedding', which is no part of SM"),
    ):
        with pytest.raises(UserError, match=f"^the variables {sentence}"):
            to_safetensors(tiny("SM", **overrides), random_variables(tiny("SM")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def folder(tmp_path):
    config = tiny("SM")
    to_safetensors(config, random_variables(config), tmp_path)
    return tmp_path


def change_config(folder, **changes):
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | changes))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def reshape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["params/token_embedding"] = tensors["params/token_embedding"][1:]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda folder: change_config(folder, model_type="gpt2"), "model_type='gpt2', which is not a folder of to_saf"),
        (lambda folder: change_config(folder, numlayers=3), "the field 'numlayers', .* did you mean 'num_layers'?"),
        (lambda folder: change_config(folder, norm="batch"), "norm='batch' is not known"),
        (lambda folder: change_config(folder, num_slots=2), "nothing for params/blocks/attention/slot_key, but SM"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read: No such file"),
        (cut, "model.safetensors is damaged"),
        (reshape, r"has \[60, 16\] for params/token_embedding, but SM of this size has \[61, 16\]"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(folder, change, sentence):
    change(folder)
    with pytest.raises(UserError, match=sentence):
        from_safetensors(folder)
