"""Our operator inside Flax's layers: the same numbers as theirs, entropies and gradients through the intermediates."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_entropy as je
from tests import REPOSITORY

X = jax.random.normal(jax.random.key(0), (2, 3, 8, 16))  # two batch axes
PADDED = jnp.arange(8) != 2
MASKS = {
    "causal": nn.make_causal_mask(jnp.ones((2, 3, 8))),
    "padded": nn.combine_masks(nn.make_causal_mask(jnp.ones((2, 3, 8))), PADDED[None, None, None, None]),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_linen_layer_computes_what_it_did_and_shows_its_entropies(mask):
    theirs = nn.MultiHeadDotProductAttention(num_heads=4)
    ours = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=je.attention_fn)
    variables = jax.jit(theirs.init)(jax.random.key(1), X)
    given = None if mask == "causal" else MASKS[mask]

    def loss(variables, layer, mask, entropies):
        out, kept = layer.apply(variables, X, mask=mask, sow_weights=True, mutable=["intermediates"])
        entropy = entropies(kept["intermediates"])
        return jnp.sum(out**2) + jnp.sum(entropy**2), (out, entropy)

    of_weights = lambda kept: je.row_entropy(kept["attention_weights"][0]).reshape(6, 4, 8)  # noqa: E731
    of_stats = lambda kept: kept["attention_stats"][0].entropy  # noqa: E731
    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=(1, 3))
    gradients, results = zip(
        gradient(variables, theirs, MASKS[mask], of_weights), gradient(variables, ours, given, of_stats), strict=True
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), *gradients)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert "attention_stats" not in ours.apply(variables, X, mutable=["intermediates"])[1].get("intermediates", {})


@pytest.mark.parametrize("is_causal", [True, False])
def test_an_nnx_layer_computes_what_it_did_with_shared_keys_too(is_causal):
    def layer(**options):
        sizes = {"num_heads": 4, "num_kv_heads": 2, "in_features": 16, "decode": False}
        return nnx.MultiHeadAttention(**sizes, **options, rngs=nnx.Rngs(0))

    theirs = layer()(X, is_causal=is_causal)
    np.testing.assert_allclose(
        layer(attention_fn=je.attention_fn)(X, is_causal=is_causal), theirs, rtol=1e-5, atol=1e-5
    )


def test_dropout_of_the_weights_is_refused():
    layer = nn.MultiHeadDotProductAttention(num_heads=4, dropout_rate=0.1, attention_fn=je.attention_fn)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(je.UserError, match=r"dropout_rate=0\.1 .*je\.attention_fn"):
        layer.init(keys, X, deterministic=False)


def test_a_bias_is_refused_and_not_left_out():
    q = jnp.ones((2, 8, 4, 4))
    with pytest.raises(je.UserError, match=r"bias=float32\[8,8\] .*je\.attention_fn"):
        je.attention_fn(q, q, q, bias=jnp.zeros((8, 8)))


def test_the_page_on_your_own_model_runs_and_adds_ten_lines():
    page = (REPOSITORY / "docs" / "your_model.md").read_text()
    linen = page.partition("\n## NNX\n")[0]
    assert linen.partition("```python")[2].count("# new") <= 10
    names = {"LIMIT": 100.0}
    with jax.numpy_rank_promotion("allow"):  # as in a user's process
        exec("".join(re.findall(r"```python\n(.*?)```", page, flags=re.S)), names)
        assert names["loss"] < 3.5 < np.log(64)  # below that of a guess: the model learns
        assert np.ptp(names["params"]["threshold"]) > 0  # the penalty has gradients
        assert names["stats"].entropy.shape == (8, 4, 16)
        # the same step with a limit that every head passes: its next logits are at most there
        before, names["LIMIT"] = names["params"], 1e-3
        after, *_ = jax.jit(lambda *state: names["step"].__wrapped__(*state))(before, names["opt_state"])  # traced anew
    _, (_, stats) = names["loss_fn"](after)
    assert stats.max_logit.max() < 0.1 < names["loss_fn"](before)[1][1].max_logit.max()
