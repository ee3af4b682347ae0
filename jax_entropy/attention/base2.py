"""Powers of two in place of e: what the GPU kernels share.

A tile's weights are 2^x with x = s·a − m in one instruction, s = q·k, a = scale·log₂e, m the largest s·a of the row.
m may be rounded, by the same amount for a whole row, which takes nothing from the softmax; 2^x holds that rounding up
to logits of 5·10⁸.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

LN2 = math.log(2)
_LARGEST = 2.0**23  # products are not known to more digits: colder rows put all weight on their largest already


def base2(scale: jax.Array) -> jax.Array:
    """a, for logits in base 2."""
    return jnp.minimum(scale / LN2, _LARGEST)


def multiply_add(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """x·y + z without rounding x·y first, float32, where a CPU runs a kernel.

    The product's error comes from its halves, which multiply exactly (Dekker 1971).
    """
    product = x * y
    x_high, y_high = (lax.reduce_precision(part, exponent_bits=8, mantissa_bits=11) for part in (x, y))
    x_low, y_low = x - x_high, y - y_high
    error = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    return (product + z) + error
