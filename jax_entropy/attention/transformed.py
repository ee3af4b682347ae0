"""Attention whose logits pass through a function on their way into the softmax, a block of queries at a time.

Of power softmax (PSM) and soft-capped logits (Cap). No T×T array outlives its block, forward or backward; a block's
gradients are those of dense attention, by autodiff.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from jax_entropy.attention import dense

BLOCK = 128  # queries
_SMALLEST = 1e-6  # of |1 + s/c|: its logarithm and the gradient stay finite where a score is exactly −c


def attend(
    q_BxTxNxH: jax.Array, k_BxSxNxH: jax.Array, v_BxSxNxH: jax.Array, scale_NxT: jax.Array, position: int | jax.Array,
    *windowed: int | jax.Array, transform: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """As `dense.attend`, with the logits transformed."""
    T = q_BxTxNxH.shape[1]
    count = -(-T // BLOCK)
    if count == 1:
        return dense.attend(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, position, *windowed, transform=transform)
    size = -(-T // count)
    # queries that fill up the last block see every key, and are cut off
    q_BxTxNxH = jnp.pad(q_BxTxNxH, ((0, 0), (0, count * size - T), (0, 0), (0, 0)))
    scale_NxT = jnp.pad(scale_NxT, ((0, 0), (0, count * size - T)), mode="edge")

    @jax.checkpoint
    def block(of_block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        index, q_BxQxNxH, scale_NxQ = of_block
        at = position + index * size
        return dense.attend(q_BxQxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxQ, at, *windowed, transform=transform)

    blocks = (
        jnp.arange(count),
        rearrange(q_BxTxNxH, "B (C Q) N H -> C B Q N H", C=count),
        rearrange(scale_NxT, "N (C Q) -> C N Q", C=count),
    )
    out_CxBxQxNxH, *stats_CxBxNxQ = lax.map(block, blocks)
    out_BxTxNxH = rearrange(out_CxBxQxNxH, "C B Q N H -> B (C Q) N H")[:, :T]
    return out_BxTxNxH, *(rearrange(x, "C B N Q -> B N (C Q)")[..., :T] for x in stats_CxBxNxQ)


def power(logits_BxNxTxS: jax.Array, shift_N: jax.Array, exponent: int) -> jax.Array:
    """The logarithm of (1 + s/c)^p, p even: what makes the softmax a power softmax (arXiv 2410.09457)."""
    shift_1xNx1x1 = shift_N.astype(logits_BxNxTxS.dtype)[None, :, None, None]
    return exponent * jnp.log(jnp.maximum(jnp.abs(1 + logits_BxNxTxS / shift_1xNx1x1), _SMALLEST))


def capped(logits_BxNxTxS: jax.Array, cap: float) -> jax.Array:
    """Soft-capped logits, cap·tanh(s/cap) (arXiv 2408.00118)."""
    return cap * jnp.tanh(logits_BxNxTxS / cap)
