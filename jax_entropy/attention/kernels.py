"""What the GPU kernels share: powers of two in place of e, and the part of the operator that a device has.

A tile's weights are 2^x with x = s·a − m in one instruction, s = q·k, a = scale·log₂e, m the largest s·a of the row.
m may be rounded, by the same amount for a whole row, which takes nothing from the softmax; 2^x holds that rounding up
to logits of 5·10⁸.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_entropy.sharding import BATCH, on_shards

LN2 = math.log(2)
_LARGEST = 2.0**23  # products are not known to more digits: colder rows put all weight on their largest already


def base2(scale: jax.Array) -> jax.Array:
    """a, for logits in base 2."""
    return jnp.minimum(scale / LN2, _LARGEST)


def of_backward(m: jax.Array, log_l: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """m and log₂ l as the backward kernels take them.

    In a float16 dout/l of a long row would be too small to be exact: the powers of two of l go over to the weights, as
    far as m can take them up without rounding.
    """
    if dtype != jnp.float16:
        return m, log_l
    larger_m = m + jnp.floor(log_l)
    return larger_m, log_l - (larger_m - m)


def multiply_add(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """x·y + z without rounding x·y first, float32, where a CPU runs a kernel.

    The product's error comes from its halves, which multiply exactly (Dekker 1971).
    """
    product = x * y
    x_high, y_high = (lax.reduce_precision(part, exponent_bits=8, mantissa_bits=11) for part in (x, y))
    x_low, y_low = x - x_high, y - y_high
    error = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    return (product + z) + error


def attend_on_shards(
    kernel: Callable[..., tuple[jax.Array, ...]],
    q_BxTxNxH: jax.Array,
    k_BxSxNxH: jax.Array,
    v_BxSxNxH: jax.Array,
    scale_NxT: jax.Array,
    *scalars: jax.Array,
) -> tuple[jax.Array, ...]:
    """`kernel` of the sequences and heads that a device has; out, entropy, logsumexp and max logit."""
    rows, stats = PartitionSpec(BATCH, None, "tensor"), PartitionSpec(BATCH, "tensor")
    specs = (rows, rows, rows, PartitionSpec("tensor"), *(PartitionSpec() for _ in scalars))
    on_device = on_shards(kernel, in_specs=specs, out_specs=(rows, stats, stats, stats))
    return on_device(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, *scalars)
