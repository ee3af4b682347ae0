"""Products of rows with a matrix, and their gradients, laid out for the device that computes them.

XLA's CPU backend multiplies bfloat16 as it is where the result is float32 and both operands lie in memory in the
product's order; else it widens them first, which takes five times as long (docs/benchmarks/step.md).
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jax_entropy.sharding import platform


def product(x_RxK: jax.Array, w_KxM: jax.Array) -> jax.Array:
    """x·W in their type, [R, M]."""
    return _product(x_RxK, w_KxM) if _in_order(x_RxK.dtype) else x_RxK @ w_KxM


@jax.custom_vjp
def add_bias(y_RxM: jax.Array, bias_M: jax.Array) -> jax.Array:
    """y + b in the type of y, as a GPU's product does on its way; b's gradient is summed in float32 or better."""
    return y_RxM + bias_M.astype(y_RxM.dtype)[None]


def _add_bias_forward(y_RxM: jax.Array, bias_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    return add_bias(y_RxM, bias_M), bias_M


def _add_bias_backward(bias_M: jax.Array, dy_RxM: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dy_RxM, jnp.sum(dy_RxM, axis=0, dtype=jnp.promote_types(dy_RxM.dtype, bias_M.dtype)).astype(bias_M.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def wide_product(x_RxK: jax.Array, w_KxM: jax.Array) -> jax.Array:
    """x·W in float32 or better, [R, M]; not to be differentiated."""
    wide = jnp.promote_types(x_RxK.dtype, jnp.float32)
    if not _in_order(x_RxK.dtype):
        return jnp.matmul(x_RxK, w_KxM, preferred_element_type=wide)
    # left to itself, the compiler swaps operands or takes them transposed, and then cannot compute the product at all
    return _ordered(jnp.matmul(_ordered(x_RxK), _ordered(w_KxM), preferred_element_type=wide))


def outer_product(x_RxK: jax.Array, y_RxM: jax.Array) -> jax.Array:
    """xᵀ·y in float32 or better, [K, M]; not to be differentiated. The narrower one is transposed."""
    if x_RxK.shape[1] <= y_RxM.shape[1] or not _in_order(x_RxK.dtype):
        return wide_product(x_RxK.T, y_RxM)
    return wide_product(y_RxM.T, x_RxK).T


def transposed(x: jax.Array) -> jax.Array:
    """xᵀ for products to come, in memory too where they need it so."""
    return _ordered(x.T) if _in_order(x.dtype) else x.T


def _in_order(dtype: jnp.dtype) -> bool:
    return dtype == jnp.bfloat16 and platform() == "cpu"


def _ordered(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1)))


@jax.custom_vjp
def _product(x_RxK: jax.Array, w_KxM: jax.Array) -> jax.Array:
    return wide_product(x_RxK, w_KxM).astype(x_RxK.dtype)


def _forward(x_RxK: jax.Array, w_KxM: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x_RxK, w_KxM), (x_RxK, w_KxM)


def _backward(residuals: tuple[jax.Array, jax.Array], dy_RxM: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_RxK, w_KxM = residuals
    dx_RxK, dw_KxM = wide_product(dy_RxM, w_KxM.T), outer_product(x_RxK, dy_RxM)
    return dx_RxK.astype(x_RxK.dtype), dw_KxM.astype(w_KxM.dtype)


_product.defvjp(_forward, _backward)
