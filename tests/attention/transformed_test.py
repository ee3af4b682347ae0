"""Attention whose logits pass through a function, against its definition in NumPy: power softmax and soft caps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_entropy import attention
from jax_entropy.attention.transformed import BLOCK, capped, power
from jax_entropy.errors import UserError

SHIFT_N = np.array([0.7, 4.0])
TRANSFORMS = {
    "power": (functools.partial(power, shift_N=SHIFT_N, exponent=6), lambda s, n: (1 + s / SHIFT_N[n]) ** 6),
    "cap": (functools.partial(capped, cap=2.0), lambda s, n: np.exp(2 * np.tanh(s / 2))),
}


def arguments(T, S):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, length, 2, 4)) for length in (T, S, S))
    return q, k, v, np.exp(rng.uniform(-1, 1, (2, T)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_is_its_definition_and_so_are_its_gradients(name):
    """Row by row, in more than one block, and along a random direction by central differences."""
    T = BLOCK + 7
    transform, weigh = TRANSFORMS[name]
    q, k, v, t = arguments(T, T + 3)
    rng = np.random.default_rng(1)
    along = [rng.standard_normal(x.shape) for x in (q, k, v, t)]
    by_out, by_entropy, by_lse = (rng.standard_normal(shape) for shape in (q.shape, (1, 2, T), (1, 2, T)))

    def run(q, k, v, t):
        out, stats = attention(q, k, v, t, transform=transform)
        weighted = jnp.sum(out * by_out) + jnp.sum(stats.entropy * by_entropy) + jnp.sum(stats.logsumexp * by_lse)
        return weighted, (out, stats)

    with jax.enable_x64(True):
        (_, (out, stats)), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True))(q, k, v, t)
        value = jax.jit(lambda *moved: run(*moved)[0])
        up, down = (float(value(*(x + h * d for x, d in zip((q, k, v, t), along, strict=True)))) for h in (1e-6, -1e-6))
    for n, i in np.ndindex(2, T):
        s = k[0, : i + 4, n] @ q[0, i, n] / (2 * t[n, i])
        weights = weigh(s, n)
        p = weights / weights.sum()
        np.testing.assert_allclose(out[0, i, n], p @ v[0, : i + 4, n], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats.entropy[0, n, i], -(p * np.log(p)).sum(), rtol=1e-9)
        np.testing.assert_allclose(stats.logsumexp[0, n, i], np.log(weights.sum()), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(stats.max_logit[0, n, i], s.max(), rtol=1e-9)
    slope = sum(np.sum(np.asarray(g) * d) for g, d in zip(gradients, along, strict=True))
    np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-5)


def test_a_score_that_is_exactly_the_shift_has_finite_gradients():
    gradient = jax.grad(lambda s: jnp.sum(jax.nn.softmax(power(s, jnp.ones(1), 4))[..., 1]))(
        jnp.array([[[[-1.0, 2.0]]]])
    )
    assert np.all(np.isfinite(gradient))


def test_kernels_of_the_plain_softmax_are_not_asked():
    q, k, v, t = (jnp.asarray(x, jnp.float32) for x in arguments(4, 4))
    with pytest.raises(UserError, match="'blockwise' is for the softmax of plain logits; PSM and Cap work with 'auto'"):
        attention(q, k, v, t, transform=functools.partial(capped, cap=2.0), implementation="blockwise")
    with pytest.raises(UserError, match="attention implementation='dens' is not known; did you mean 'dense'"):
        attention(q, k, v, t, transform=functools.partial(capped, cap=2.0), implementation="dens")
