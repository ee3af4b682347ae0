"""Attention block by block with an online softmax, its entropy included: no T×T array exists, forward or backward.

Flash attention with one more running sum, w = Σ e^(s−m)·(s−m), which gives the entropy log z − w/z.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Keys and queries a tile. Measured (docs/benchmarks/attention.md): larger tiles of all heads leave the CPU's cache.
BLOCK = 128

# Finite, so that a masked key adds 0 · finite to the entropy and to the gradients, never 0 · inf.
_MASKED = -1e30


@jax.custom_vjp
def blockwise_attention(
    q_BxTxNxH: jax.Array, k_BxSxNxH: jax.Array, v_BxSxNxH: jax.Array, scale_NxT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns out [B, T, N, H] and, in nats, entropy, logsumexp and max logit [B, N, T] of softmax(scale · q·k)."""
    B, T, N, H = q_BxTxNxH.shape
    S = k_BxSxNxH.shape[1]
    dtype = scale_NxT.dtype
    num_queries, Q = _blocks(T)
    num_keys, K = _blocks(S)
    q_BxTxNxH, scale_NxT = _pad(q_BxTxNxH, num_queries * Q, 1), _pad(scale_NxT, num_queries * Q, 1)
    k_BxSxNxH, v_BxSxNxH = _pad(k_BxSxNxH, num_keys * K, 1), _pad(v_BxSxNxH, num_keys * K, 1)

    def query_block(i, results):
        q_BxNxQxH = _take(q_BxTxNxH, i, Q, 1).swapaxes(1, 2)
        scale_NxQx1 = _take(scale_NxT, i, Q, 1)[..., None]
        first_key = i * Q + S - T

        def key_block(j, running):
            out_BxNxQxH, z_BxNxQ, w_BxNxQ, max_BxNxQ = running
            k_BxNxKxH, v_BxNxKxH = (_take(x, j, K, 1).swapaxes(1, 2) for x in (k_BxSxNxH, v_BxSxNxH))
            visible_QxK = j * K + jnp.arange(K)[None] <= first_key + jnp.arange(Q)[:, None]
            s_BxNxQxK = _dot("BNQH,BNKH->BNQK", q_BxNxQxH, k_BxNxKxH, dtype) * scale_NxQx1[None]
            s_BxNxQxK = jnp.where(visible_QxK[None, None], s_BxNxQxK, _MASKED)
            new_max_BxNxQ = jnp.maximum(max_BxNxQ, jnp.max(s_BxNxQxK, axis=-1))
            s_BxNxQxK -= new_max_BxNxQ[..., None]
            e_BxNxQxK = jnp.exp(s_BxNxQxK)
            shift_BxNxQ = max_BxNxQ - new_max_BxNxQ
            decay_BxNxQ = jnp.exp(shift_BxNxQ)
            w_BxNxQ = decay_BxNxQ * (w_BxNxQ + z_BxNxQ * shift_BxNxQ) + jnp.sum(e_BxNxQxK * s_BxNxQxK, axis=-1)
            z_BxNxQ = decay_BxNxQ * z_BxNxQ + jnp.sum(e_BxNxQxK, axis=-1)
            out_BxNxQxH *= decay_BxNxQ[..., None]
            out_BxNxQxH += _dot("BNQK,BNKH->BNQH", e_BxNxQxK.astype(v_BxSxNxH.dtype), v_BxNxKxH, dtype)
            return out_BxNxQxH, z_BxNxQ, w_BxNxQ, new_max_BxNxQ

        zeros_BxNxQ = jnp.zeros((B, N, Q), dtype)
        start = (jnp.zeros((B, N, Q, H), dtype), zeros_BxNxQ, zeros_BxNxQ, zeros_BxNxQ + _MASKED)
        num_visible = jnp.minimum((first_key + Q - 1) // K + 1, num_keys)
        out_BxNxQxH, z_BxNxQ, w_BxNxQ, max_BxNxQ = lax.fori_loop(0, num_visible, key_block, start)
        out_BxQxNxH = (out_BxNxQxH / z_BxNxQ[..., None]).swapaxes(1, 2).astype(q_BxTxNxH.dtype)
        log_z_BxNxQ = jnp.log(z_BxNxQ)
        stats = (log_z_BxNxQ - w_BxNxQ / z_BxNxQ, max_BxNxQ + log_z_BxNxQ, max_BxNxQ)
        out_BxTxNxH, *stats_BxNxT = results
        return _put(out_BxTxNxH, out_BxQxNxH, i, 1), *(_put(x, y, i, 2) for x, y in zip(stats_BxNxT, stats))

    zeros_BxNxT = jnp.zeros((B, N, num_queries * Q), dtype)
    start = (jnp.zeros_like(q_BxTxNxH), zeros_BxNxT, zeros_BxNxT, zeros_BxNxT)
    out_BxTxNxH, *stats_BxNxT = lax.fori_loop(0, num_queries, query_block, start)
    return out_BxTxNxH[:, :T], *(x[..., :T] for x in stats_BxNxT)


def _forward(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT):
    out_BxTxNxH, entropy_BxNxT, lse_BxNxT, max_BxNxT = blockwise_attention(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT)
    residuals = (q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, out_BxTxNxH, entropy_BxNxT, lse_BxNxT)
    return (out_BxTxNxH, entropy_BxNxT, lse_BxNxT, max_BxNxT), residuals


def _backward(residuals, cotangents):
    """With p = e^(s−lse): dS = p · (dP − Σ dout·out + dlse − dentropy · (log p + entropy)), tile by tile."""
    q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, out_BxTxNxH, entropy_BxNxT, lse_BxNxT = residuals
    dout_BxTxNxH, dentropy_BxNxT, dlse_BxNxT, _ = cotangents
    B, T, N, H = q_BxTxNxH.shape
    S = k_BxSxNxH.shape[1]
    dtype = scale_NxT.dtype
    num_queries, Q = _blocks(T)
    num_keys, K = _blocks(S)
    row_BxNxT = jnp.sum(out_BxTxNxH.astype(dtype) * dout_BxTxNxH.astype(dtype), axis=-1).swapaxes(1, 2)
    row_BxNxT = dlse_BxNxT - row_BxNxT - dentropy_BxNxT * entropy_BxNxT
    q_BxTxNxH, dout_BxTxNxH = _pad(q_BxTxNxH, num_queries * Q, 1), _pad(dout_BxTxNxH, num_queries * Q, 1)
    rows = (jnp.broadcast_to(scale_NxT, (B, N, T)), lse_BxNxT, row_BxNxT, dentropy_BxNxT)
    rows = tuple(_pad(x, num_queries * Q, 2) for x in rows)
    k_BxSxNxH, v_BxSxNxH = _pad(k_BxSxNxH, num_keys * K, 1), _pad(v_BxSxNxH, num_keys * K, 1)

    def key_block(j, gradients):
        dq_BxTxNxH, dk_BxSxNxH, dv_BxSxNxH = gradients
        k_BxNxKxH, v_BxNxKxH = (_take(x, j, K, 1).swapaxes(1, 2) for x in (k_BxSxNxH, v_BxSxNxH))

        def query_block(i, running):
            dq_BxTxNxH, dk_BxNxKxH, dv_BxNxKxH = running
            q_BxNxQxH, dout_BxNxQxH = (_take(x, i, Q, 1).swapaxes(1, 2) for x in (q_BxTxNxH, dout_BxTxNxH))
            scale, lse, row, dentropy = (_take(x, i, Q, 2)[:, :, None] for x in rows)
            visible_KxQ = j * K + jnp.arange(K)[:, None] <= i * Q + S - T + jnp.arange(Q)[None]
            # Keys before queries, so that the products for dk and dv need no transposed operand.
            log_p_BxNxKxQ = _dot("BNKH,BNQH->BNKQ", k_BxNxKxH, q_BxNxQxH, dtype) * scale - lse
            log_p_BxNxKxQ = jnp.where(visible_KxQ[None, None], log_p_BxNxKxQ, _MASKED)
            p_BxNxKxQ = jnp.exp(log_p_BxNxKxQ)
            dp_BxNxKxQ = _dot("BNKH,BNQH->BNKQ", v_BxNxKxH, dout_BxNxQxH, dtype)
            ds_BxNxKxQ = p_BxNxKxQ * (dp_BxNxKxQ + row - dentropy * log_p_BxNxKxQ) * scale
            p_BxNxKxQ, ds_BxNxKxQ = p_BxNxKxQ.astype(v_BxSxNxH.dtype), ds_BxNxKxQ.astype(q_BxTxNxH.dtype)
            dv_BxNxKxH += _dot("BNKQ,BNQH->BNKH", p_BxNxKxQ, dout_BxNxQxH, dtype)
            dk_BxNxKxH += _dot("BNKQ,BNQH->BNKH", ds_BxNxKxQ, q_BxNxQxH, dtype)
            dq_BxQxNxH = _dot("BNKH,BNKQ->BNHQ", k_BxNxKxH, ds_BxNxKxQ, dtype).transpose(0, 3, 1, 2)
            dq_BxTxNxH = _put(dq_BxTxNxH, _take(dq_BxTxNxH, i, Q, 1) + dq_BxQxNxH, i, 1)
            return dq_BxTxNxH, dk_BxNxKxH, dv_BxNxKxH

        zeros_BxNxKxH = jnp.zeros((B, N, K, H), dtype)
        first_query = jnp.maximum((j * K - (S - T)) // Q, 0)
        dq_BxTxNxH, *block = lax.fori_loop(first_query, num_queries, query_block, (dq_BxTxNxH, zeros_BxNxKxH, zeros_BxNxKxH))
        dk_BxKxNxH, dv_BxKxNxH = (x.swapaxes(1, 2).astype(k_BxSxNxH.dtype) for x in block)
        return dq_BxTxNxH, _put(dk_BxSxNxH, dk_BxKxNxH, j, 1), _put(dv_BxSxNxH, dv_BxKxNxH, j, 1)

    start = (jnp.zeros((B, num_queries * Q, N, H), dtype), jnp.zeros_like(k_BxSxNxH), jnp.zeros_like(v_BxSxNxH))
    dq_BxTxNxH, dk_BxSxNxH, dv_BxSxNxH = lax.fori_loop(0, num_keys, key_block, start)
    q_BxTxNxH, dq_BxTxNxH = q_BxTxNxH[:, :T], dq_BxTxNxH[:, :T]
    # Σ_j dS_ij · q_i·k_j without another pass over the tiles.
    dscale_NxT = jnp.sum(q_BxTxNxH * dq_BxTxNxH, axis=(0, 3)).T / scale_NxT
    return dq_BxTxNxH.astype(q_BxTxNxH.dtype), dk_BxSxNxH[:, :S], dv_BxSxNxH[:, :S], dscale_NxT


blockwise_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> tuple[int, int]:
    """Even blocks of at most BLOCK positions: (how many, how long)."""
    count = -(-length // BLOCK)
    return count, -(-length // count)


def _pad(x: jax.Array, length: int, axis: int) -> jax.Array:
    return jnp.pad(x, [(0, length - size if a == axis else 0) for a, size in enumerate(x.shape)])


def _take(x: jax.Array, block: int | jax.Array, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _put(x: jax.Array, y: jax.Array, block: int | jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, y, block * y.shape[axis], axis)


def _dot(equation: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=dtype)
