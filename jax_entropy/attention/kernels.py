"""What the kernels share: powers of two in place of e, which blocks a tile meets, the part that a device has.

A tile's weights are 2^x with x = s·a − m in one instruction, s = q·k, a = scale·log₂e, m the largest s·a of the row.
m may be rounded, by the same amount for a whole row, which takes nothing from the softmax; 2^x holds that rounding up
to logits of 5·10⁸.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_entropy.sharding import BATCH, on_shards

LN2 = math.log(2)
HIDDEN = -1e4  # 2 to this is 0, and 0 · this is 0: what a masked key adds to every sum
LOWEST = -(2.0**100)  # finite and exact, times any scale too: what a masked product is, and the largest of none
PART = 8  # columns of a row's running sums on a GPU: a thread's share of them is one pair for every row that it holds
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


Number = int | jax.Array


def pack(position: Number, window: Number | None) -> jax.Array:
    """What programs read of both: [1], or [2] where there is a window."""
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (position, window) if x is not None])


def unpack(at_ref: Any, num_slots: int) -> tuple[jax.Array, tuple]:
    """The key of the first query; window and slots where there is a window."""
    return at_ref[0], (at_ref[1], num_slots) if at_ref.shape[0] > 1 else ()


class BlockRange(NamedTuple):
    """Blocks of one side that a tile of the other meets, in order; none outside of its window is among them.

    slots: so many of the first, of keys that all queries see.
    begin, end: those after them; from `whole` to `edge` every query sees every key.
    """

    slots: int
    begin: Number
    whole: Number
    edge: Number
    end: Number

    def runs(self) -> list[tuple[Number, Number, bool]]:
        """From where, to where, and whether keys are masked there; without runs that are empty for every tile."""
        runs = (
            (0, self.slots, True),
            (self.begin, self.whole, True),
            (self.whole, self.edge, False),
            (self.edge, self.end, True),
        )
        return [run for run in runs if run[0] is not run[1]]

    @property
    def length(self) -> Number:
        """How many there are."""
        return self.slots + self.end - self.begin

    def nth(self, i: jax.Array) -> jax.Array:
        """Block i of all."""
        later = i + (self.begin - self.slots)
        return jnp.where(i < self.slots, i, later) if self.slots else later

    def nth_masked(self, i: jax.Array) -> jax.Array:
        """Block i of those in which keys are masked."""
        block = self.nth(i)
        return jnp.where(block < self.whole, block, block + (self.edge - self.whole))


def key_blocks(
    last_key: jax.Array, Q: int, K: int, S: int, window: jax.Array | None = None, num_slots: int = 0
) -> BlockRange:
    """Blocks of K keys, of S, for a tile of Q queries, of which the first sees keys up to `last_key`."""
    edge, end = lax.div(jnp.minimum(last_key + 1, S), jnp.int32(K)), _cdiv(jnp.minimum(last_key + Q, S), K)
    if window is None:
        return BlockRange(0, 0, 0, edge, end)
    slots = -(-num_slots // K)
    begin = jnp.maximum(lax.div(jnp.maximum(last_key + 1 - window, 0), jnp.int32(K)), slots)
    whole = jnp.clip(_cdiv(jnp.maximum(last_key + Q - window, 0), K), begin, end)
    return BlockRange(slots, begin, whole, jnp.maximum(edge, whole), end)


def query_blocks(
    first_key: jax.Array, position: jax.Array, K: int, Q: int, T: int, window: jax.Array | None = None,
    num_slots: int = 0,
) -> BlockRange:  # fmt: skip
    """Blocks of Q queries, of T, for the tile of K keys from `first_key` on; the first query is at key `position`."""
    count, first = -(-T // Q), first_key - position
    begin = jnp.minimum(lax.div(jnp.maximum(first, 0), jnp.int32(Q)), count)
    whole = jnp.minimum(_cdiv(jnp.maximum(first + K - 1, 0), Q), count)
    if window is None:
        return BlockRange(0, begin, whole, count, count)
    end = jnp.minimum(_cdiv(jnp.maximum(first + K - 1 + window, 0), Q), count)
    end = jnp.where(first_key < num_slots, count, end)
    whole = jnp.minimum(whole, end)
    edge = jnp.clip(lax.div(jnp.maximum(first + window, 0), jnp.int32(Q)), whole, end)
    return BlockRange(0, begin, whole, edge, end)


def _cdiv(x: jax.Array, y: int) -> jax.Array:
    return lax.div(x + (y - 1), jnp.int32(y))


def attend_on_shards(
    kernel: Callable[..., tuple[jax.Array, ...]],
    q_BxTxNxH: jax.Array,
    k_BxSxNxH: jax.Array,
    v_BxSxNxH: jax.Array,
    scale_NxT: jax.Array,
    scalars: Any,
) -> tuple[jax.Array, ...]:
    """`kernel` of the sequences and heads that a device has; out, entropy, logsumexp and max logit."""
    rows, stats = PartitionSpec(BATCH, None, "tensor"), PartitionSpec(BATCH, "tensor")
    specs = (rows, rows, rows, PartitionSpec("tensor"), PartitionSpec())
    on_device = on_shards(kernel, in_specs=specs, out_specs=(rows, stats, stats, stats))
    return on_device(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, scalars)
