"""Parts by their properties: where a convolution starts, what a rotation keeps, which keys are seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_entropy.parts import Convolution, log_factors, rotate, visible_keys
from tests.tiny_model import tiny


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_convolution_starts_as_the_identity_to_the_bit():
    x, layer = normal(2, 9, 3, 4), Convolution(4)
    variables = layer.init(jax.random.key(0), x, 0)
    assert variables["params"]["taps"].shape == (4, 3, 4)
    np.testing.assert_array_equal(layer.apply(variables, x, 0), x)


def test_before_the_first_position_there_is_nothing_whatever_the_cache_holds():
    x, layer = normal(2, 5, 3, 4), Convolution(3)
    params = {"taps": normal(3, 3, 4)}
    dirty = {"params": params, "cache": {"past": np.full((2, 2, 3, 4), 1e3, np.float32)}}
    read, changed = layer.apply(dirty, x, 0, mutable=["cache"])
    np.testing.assert_array_equal(read, layer.apply({"params": params}, x, 0))
    np.testing.assert_array_equal(changed["cache"]["past"], x[:, -2:])


def test_rotated_logits_depend_on_the_distance_alone():
    config = tiny("SM+RoPE", context_length=64)
    q, k = normal(1, 1, 2, 8), normal(1, 1, 2, 8)[..., ::-1]
    logits = [
        jnp.sum(rotate(q, at + distance, config) * rotate(k, at, config)) for distance in (0, 7) for at in (0, 5, 40)
    ]
    np.testing.assert_allclose(logits[:3], jnp.sum(q * k), rtol=1e-5)
    np.testing.assert_allclose(logits[3:], logits[3], rtol=1e-5)
    assert abs(logits[3] - logits[0]) > 0.1
    np.testing.assert_allclose(jnp.linalg.norm(rotate(q, 9, config), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_query_sees_the_slots_and_the_last_of_the_keys_up_to_its_own(layer):
    config = tiny("SM(log)+Mem3+Win(SL,5)")
    seen, window = visible_keys(config, layer), (5, 16)[layer]
    for i, row in enumerate(seen):
        assert np.flatnonzero(row).tolist() == [0, 1, 2, *range(3 + max(0, i - window + 1), 3 + i + 1)]
    np.testing.assert_allclose(log_factors(config, layer), np.log(3 + np.minimum(np.arange(16) + 1, window)))
