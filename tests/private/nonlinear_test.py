"""What the softmax consists of, in few rounds, is what it stands for."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_entropy.private.cost.work import Compared
from jax_entropy.private.program.nonlinear import at_once, bent, divided, halvings, largest, reciprocal, shifted, shifts


@pytest.mark.parametrize("most", [1, 2, 7, 128, 1024])
def test_reciprocals_of_all_that_a_softmax_sums_to(most):
    sums = np.linspace(1, most, 300, dtype=np.float32)
    unit = most * 2.0**-18  # of fixed point, beside 1 / most
    np.testing.assert_allclose(reciprocal(jnp.asarray(sums), most) * sums, 1, atol=max(5e-7, unit / 100))


@given(st.sampled_from([1, 2, 5, 16, 23, 40]), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_largest_of_any_number_with_equals_among_them(count, seed):
    values = np.random.default_rng(seed).integers(-5, 5, (2, count)).astype(np.float32)
    for groups in (halvings(count), at_once(count)):
        np.testing.assert_array_equal(largest(jnp.asarray(values), groups), values.max(-1))


@given(st.sampled_from([1, 40, 300]), st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_of_several_shifts_the_right_one_gives_the_softmax(size, spread, seed):
    """Whatever the exponentials of too small ones, which no number holds, have become."""
    rng, reach = np.random.default_rng(seed), 48.0
    scores = rng.uniform(-reach, reach, (4, size)) * spread
    scores[:, 0] = 0.0
    scores[0] = np.minimum(scores[0], 0)
    lowered = scores - shifts(reach, size)[:, None, None]
    e = np.where(lowered > 10, rng.uniform(-1e7, 1e7, lowered.shape), np.exp(np.minimum(lowered, 10)))
    found, values = shifted(jnp.asarray(e, jnp.float32)), rng.normal(size=(4, size, 5))
    assert np.all(np.abs(np.log(found.sums_N)) < 3.01)
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("ns,nsh->nh", expected / expected.sum(-1, keepdims=True), values)
    mixed = jnp.einsum("ns,nsh->nh", found.weights_NxS, jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(divided(mixed, found.sums_N, found.near_N), expected, atol=2e-5)


def test_work_of_a_maximum():
    """Of 16 values: 8 and 4 pairs are halved, and the last four meet in 6 pairs; of 8 at once, 28 pairs."""
    assert Compared.of(1, 16, halvings(16)) == ((12, 6, 8, 4), (2, 1, 2), (4, 4, 4))
    assert Compared.of(1, 8, at_once(8)) == ((0, 28, 48, 8), (0, 1, 3), (24, 16, 8, 8))
    assert Compared.of(3, 8, at_once(8)).sizes == (0, 3 * 28, 3 * 48, 3 * 8)


@pytest.mark.parametrize("squarings", [5, 6, 7])
def test_a_bent_argument_is_closer_by_an_order(squarings):
    x = np.linspace(-1.7 * 2**squarings, 0, 2000)
    power = lambda x: (1 + x / 2**squarings) ** (2**squarings)  # noqa: E731
    error = np.abs(power(np.asarray(bent(x, squarings=squarings, of_engine=squarings), np.float64)) - np.exp(x)).max()
    assert error < 0.3 / 4**squarings  # of the argument as it is: 0.27 / 2ⁿ⁺¹
    assert np.abs(power(x[-200:]) - np.exp(x[-200:])).max() > 5 * error


def test_what_the_engine_squares_less_the_program_squares():
    x = np.linspace(-20, 0, 500)
    y = x / 2**6
    expected = (1 + y + y**2 / 2) ** 2**6
    for of_engine in (4, 5, 6):
        b = np.asarray(bent(x, squarings=6, of_engine=of_engine), np.float64)
        np.testing.assert_allclose(
            ((1 + b / 2**of_engine) ** 2**of_engine) ** 2 ** (6 - of_engine), expected, atol=2e-5
        )
