"""Attention by its definition: every weight of every head in memory, gradients by autodiff.

The reference that the other implementations are held to.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# of products: an accelerator would round operands in float32 to fewer digits first
EXACT = jax.lax.Precision.HIGHEST
# q·k of a key that is not seen: below every row's largest, and times any temperature still finite, so that it adds
# 0 · finite to the entropy and to every gradient, never 0 · inf.
MASKED = -1e20


def attend(
    q_BxTxNxH: jax.Array, k_BxSxNxH: jax.Array, v_BxSxNxH: jax.Array, scale_NxT: jax.Array, position: int | jax.Array,
    *windowed: int | jax.Array, transform: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns out [B, T, N, H] and, in nats, entropy, logsumexp and max logit [B, N, T] of softmax(scale · q·k).

    transform: of the logits [B, N, T, S] on their way into the softmax; max logit is the largest before it.
    """
    T, S = q_BxTxNxH.shape[1], k_BxSxNxH.shape[1]
    visible_TxS = visible(jnp.arange(S)[None], jnp.arange(T)[:, None] + position, *windowed)
    products = dict(precision=EXACT, preferred_element_type=scale_NxT.dtype)
    s_BxNxTxS = jnp.einsum("BTNH,BSNH->BNTS", q_BxTxNxH, k_BxSxNxH, **products)
    if transform is not None:
        logits_BxNxTxS = s_BxNxTxS * scale_NxT[None, :, :, None]
        largest_BxNxT = jnp.max(jnp.where(visible_TxS[None, None], logits_BxNxTxS, MASKED), axis=-1)
        s_BxNxTxS, scale_NxT = transform(logits_BxNxTxS), jnp.ones_like(scale_NxT)
    s_BxNxTxS = jnp.where(visible_TxS[None, None], s_BxNxTxS, MASKED)
    max_BxNxT = jax.lax.stop_gradient(jnp.max(s_BxNxTxS, axis=-1))
    # Scaled after the maximum is taken off: what is exactly 0 then stays so, and no entropy falls below 0.
    x_BxNxTxS = (s_BxNxTxS - max_BxNxT[..., None]) * scale_NxT[None, :, :, None]
    max_BxNxT = max_BxNxT * scale_NxT[None]
    e_BxNxTxS = jnp.exp(x_BxNxTxS)
    z_BxNxT = jnp.sum(e_BxNxTxS, axis=-1)
    entropy_BxNxT = jnp.log(z_BxNxT) - jnp.sum(e_BxNxTxS * x_BxNxTxS, axis=-1) / z_BxNxT
    p_BxNxTxS = (e_BxNxTxS / z_BxNxT[..., None]).astype(v_BxSxNxH.dtype)
    out_BxTxNxH = jnp.einsum("BNTS,BSNH->BTNH", p_BxNxTxS, v_BxSxNxH, **products)
    lse_BxNxT = max_BxNxT + jnp.log(z_BxNxT)
    largest_BxNxT = max_BxNxT if transform is None else largest_BxNxT
    return out_BxTxNxH.astype(q_BxTxNxH.dtype), entropy_BxNxT, lse_BxNxT, largest_BxNxT


def visible(key: jax.Array, last: jax.Array, window: int | jax.Array | None = None, num_slots: int = 0) -> jax.Array:
    """Whether a query whose own key is `last` sees a key: one of the `window` up to there, or of the first slots."""
    if window is None:
        return key <= last
    unseen_from = jnp.where(key < num_slots, jnp.iinfo(jnp.int32).max, key + window)
    return (key <= last) & (last < unseen_from)
