"""LayerNorm with its own backward pass, beside Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jax_entropy import norms
from jax_entropy.architecture import architecture
from jax_entropy.norms import layer_norm


def _flax(x_RxD, scale_D, bias_D, dtype):
    layer = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype)
    return layer.apply({"params": {"scale": scale_D, "bias": bias_D}}, x_RxD)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_layer_norm_and_its_gradients_are_those_of_the_definition(mean):
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = mean + jax.random.normal(keys[0], (7, 33)), jax.random.normal(keys[1], (7, 33))
    scale, bias = 1 + jax.random.normal(keys[2], (33,)), jax.random.normal(keys[3], (33,))
    ours, pull = jax.vjp(lambda *a: layer_norm(*a, 1e-5), x, scale, bias)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (x, scale, bias, dy)]
        theirs, pull_wide = jax.vjp(lambda *a: _flax(*a, jnp.float64), *wide[:3])
        expected = [theirs, *pull_wide(wide[3])]
    for found, number in zip([ours, *pull(dy)], expected, strict=True):
        # beside a mean of 1,000, x is known to 6e-5
        np.testing.assert_allclose(found, number, rtol=0, atol=1e-5 if mean == 0 else 2e-3)


def test_in_bfloat16_statistics_and_the_gradients_of_parameters_are_float32():
    x, dy = jax.random.normal(jax.random.key(0), (2, 512, 16), jnp.bfloat16)
    scale, bias = jnp.ones(16), jnp.zeros(16)
    y, pull = jax.vjp(lambda *a: layer_norm(*a, 1e-5), x, scale, bias)
    dx, dscale, dbias = pull(dy)
    wide, pull_wide = jax.vjp(lambda *a: _flax(*a, jnp.float32), x.astype(jnp.float32), scale, bias)
    expected = pull_wide(dy.astype(jnp.float32))
    assert y.dtype == dx.dtype == jnp.bfloat16 and dscale.dtype == dbias.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=2**-8, atol=0)
    np.testing.assert_allclose(dx.astype(jnp.float32), expected[0], rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(dscale, expected[1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dbias, expected[2], rtol=1e-5, atol=1e-4)


def test_a_checkpoint_is_the_same_on_a_gpu_and_elsewhere(monkeypatch):
    config = architecture("SM+LN+G", vocab_size=8, context_length=4, num_layers=1, num_heads=1, model_dim=16)
    x = jax.random.normal(jax.random.key(0), (2, 4, 16))
    here = norms.normalise("layer", config, None)
    variables = here.init(jax.random.key(1), x)
    monkeypatch.setattr(norms, "platform", lambda: "gpu")
    there = norms.normalise("layer", config, None)
    assert isinstance(there, norms.LayerNorm) and not isinstance(here, norms.LayerNorm)
    np.testing.assert_allclose(there.apply(variables, x), here.apply(variables, x), rtol=1e-5, atol=1e-6)
