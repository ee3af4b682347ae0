"""Safetensors of our own: every architecture comes back to the bit, and a sentence for every other folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_entropy.errors import UserError
from jax_entropy.export.native import from_safetensors, to_safetensors
from jax_entropy.model import Transformer
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
