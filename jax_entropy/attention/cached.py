"""Attention of a few new queries to a fixed-size key-value cache, for generation; no statistics."""

import jax
import jax.numpy as jnp


def cached_attention(
    q_BxTxNxH: jax.Array,
    k_BxSxNxH: jax.Array,
    v_BxSxNxH: jax.Array,
    temperature_NxT: jax.Array | None = None,
    *,
    position: int | jax.Array,
) -> jax.Array:
    """Causal attention of queries that stand at `position`, `position`+1, … of the cache; out [B, T, N, H].

    Slots of the cache behind a query are not seen, so that they may hold anything finite.
    """
    T, S, H = q_BxTxNxH.shape[1], k_BxSxNxH.shape[1], q_BxTxNxH.shape[-1]
    scores_BxNxTxS = jnp.einsum("BTNH,BSNH->BNTS", q_BxTxNxH, k_BxSxNxH, preferred_element_type=jnp.float32)
    scores_BxNxTxS = scores_BxNxTxS / H**0.5
    if temperature_NxT is not None:
        scores_BxNxTxS = scores_BxNxTxS / temperature_NxT[None, :, :, None]
    visible_TxS = jnp.arange(S)[None] <= position + jnp.arange(T)[:, None]
    weights_BxNxTxS = jax.nn.softmax(jnp.where(visible_TxS[None, None], scores_BxNxTxS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BxNxTxS.astype(v_BxSxNxH.dtype), v_BxSxNxH)
