"""Products and their gradients, also where the compiler needs them laid out: bfloat16 on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_entropy.products import add_bias, outer_product, product, transposed, wide_product

R = 48


@pytest.mark.parametrize(("K", "M"), [(8, 24), (24, 8)])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), (jnp.bfloat16, 2e-2)])
def test_a_product_and_its_gradients(K, M, dtype, rtol):
    """Whichever side is the narrower one, as the definition has it; compiled alone, where operands may be swapped."""
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((R, K), (K, M), (R, M)))

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(product, x, w)
        return y, *pull(dy), wide_product(dy, transposed(w)), outer_product(x, dy)

    found = run(x, w, dy)
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    expected = x @ w, dy @ w.T, x.T @ dy, dy @ w.T, x.T @ dy
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), two, atol=rtol * np.abs(two).max())
    assert [one.dtype for one in found] == [jnp.dtype(dtype)] * 3 + [jnp.dtype("float32")] * 2


def test_a_bias_is_added_in_the_type_of_the_product_and_its_gradient_summed_in_its_own():
    """A sum of 4,096 ones in bfloat16 would stop at 256."""
    y, bias = jnp.ones((4096, 3), jnp.bfloat16), jnp.asarray([0.0, 1.0, 2.0])
    biased, pull = jax.vjp(add_bias, y, bias)
    dy, dbias = pull(jnp.ones_like(y))
    assert biased.dtype == dy.dtype == jnp.bfloat16 and dbias.dtype == jnp.float32
    np.testing.assert_array_equal(biased[0], [1, 2, 3])
    np.testing.assert_array_equal(dbias, [4096] * 3)


def test_bfloat16_is_not_widened_for_a_product_on_cpu():
    """What XLA would do by itself, at a fifth of the speed: no product of a gradient has wide operands."""
    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 64), (64, 128), (256, 128)))
    text = jax.jit(lambda x, w, dy: jax.vjp(product, x, w)[1](dy)).lower(x, w, dy).compile().as_text()
    if "ynn" not in text:
        pytest.skip("this XLA multiplies bfloat16 in another way")
    products = [computation.partition("->")[0] for computation in text.split("\n\n") if " dot(" in computation]
    assert len(products) == 2 and all(head.count(": bf16[") == 2 for head in products)
