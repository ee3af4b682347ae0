"""What HookedTransformer gets computes our logits, by its documented names and shapes and in TransformerLens itself."""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_entropy.errors import UserError
from jax_entropy.export.transformer_lens import check_expressible, to_transformer_lens
from jax_entropy.model import Transformer
from tests.huggingface.native_test import random_variables
from tests.tiny_model import tiny

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))
CASES = {
    "SM": dict(bias="all"),
    "SM+G": dict(tied_head=False),
    "SM+R": dict(bias="none", embedding_scale=4.0),
    "SM+LR(layer)": dict(bias="all"),
    "SM+LR(global)^1": {},
    "EReg(SM+ScFFN^1)": dict(bias="all"),
    "SM+ScFuFFN": dict(bias="all"),
    "SM^2": {},
}


def model_of(name):
    config = tiny(name, final_norm="none", **CASES[name])
    variables = random_variables(config)
    return config, variables, np.asarray(jax.jit(Transformer(config).apply)(variables, TOKENS)[0])


def hooked(config, state):
    """HookedTransformer with normalization_type=None, written from its documentation: weights are [head, in, out]."""
    T, H = TOKENS.shape[1], config["d_head"]
    x = state["embed.W_E"][TOKENS] + state["pos_embed.W_pos"][:T]
    act = dict(relu=lambda x: np.maximum(x, 0), gelu=np.vectorize(lambda x: x * (1 + math.erf(x / 2**0.5)) / 2))
    for layer in range(config["n_layers"]):
        attn = {name: state[f"blocks.{layer}.attn.{name}"] for name in ("mask", "IGNORE", "W_O", "b_O")}
        q, k, v = (
            np.einsum("btd,ndh->bnth", x, state[f"blocks.{layer}.attn.W_{name}"])
            + state[f"blocks.{layer}.attn.b_{name}"][None, :, None]
            for name in "QKV"
        )
        scores = np.where(attn["mask"][:T, :T], q @ k.swapaxes(2, 3) / H**0.5, attn["IGNORE"])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + np.einsum("bnth,nhd->btd", weights / weights.sum(-1, keepdims=True) @ v, attn["W_O"]) + attn["b_O"]
        if not config.get("attn_only"):
            mlp = {name: state[f"blocks.{layer}.mlp.{name}"] for name in ("W_in", "b_in", "W_out", "b_out")}
            assert mlp["b_in"].shape == (config["d_mlp"],)
            x = x + act[config["act_fn"]](x @ mlp["W_in"] + mlp["b_in"]) @ mlp["W_out"] + mlp["b_out"]
    return x @ state["unembed.W_U"] + state["unembed.b_U"]


@pytest.mark.parametrize("name", CASES)
def test_its_state_computes_our_logits(tmp_path, name):
    config, variables, expected = model_of(name)
    to_transformer_lens(config, variables, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    np.testing.assert_allclose(
        hooked(settings, load_file(tmp_path / "model.safetensors")), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", CASES)
def test_hooked_transformer_loads_it(tmp_path, name):
    lens = pytest.importorskip("transformer_lens", reason="transformer_lens is not installed")
    from safetensors.torch import load_file as load_tensors
    from torch import from_numpy

    if int(getattr(lens, "__version__", "3").partition(".")[0]) > 3 or not hasattr(lens, "HookedTransformer"):
        pytest.skip("this TransformerLens has no HookedTransformer any more")
    config, variables, expected = model_of(name)
    to_transformer_lens(config, variables, tmp_path)
    settings = lens.HookedTransformerConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    model = lens.HookedTransformer(settings)
    model.load_state_dict(load_tensors(tmp_path / "model.safetensors"))
    np.testing.assert_allclose(model(from_numpy(TOKENS)).detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, fields, sentence",
    [
        ("SM+LN+G", {}, r"norm='layer' of SM\+LN\+G has no place in HookedTransformer, only 'none' has"),
        ("SM", {}, "final_norm='layer' of SM has no place"),
        ("SM(t)+ScFuFFN", dict(final_norm="none"), "learnable_temperature=True"),
        ("SM+BiFFN", dict(final_norm="none"), r"ffn='bilinear' of SM\+BiFFN"),
        ("SM+Mem2", dict(final_norm="none"), "num_slots=2"),
    ],
)
def test_what_it_has_no_place_for_is_named(name, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        check_expressible(tiny(name, **fields))


def test_a_scale_of_zero_cannot_go_into_a_matrix(tmp_path):
    config = tiny("SM+ScFuFFN", final_norm="none")
    variables = random_variables(config)
    variables["params"]["blocks"]["beta"] = variables["params"]["blocks"]["beta"].at[1].set(0)
    with pytest.raises(UserError, match="scales of SM.* 0 in a layer"):
        to_transformer_lens(config, variables, tmp_path / "out")
    assert not (tmp_path / "out").exists()
