"""Attention block by block with an online softmax, its entropy included: no T×T array exists, forward or backward.

Flash attention with one more running sum, w = Σ e^(s−m)·(s−m), which gives the entropy log z − w/z.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Positions a block, up to this length and beyond it. Measured on CPU (docs/benchmarks/attention.md): tiles of all heads
# should stay in the last-level cache, and a short context gains more from skipping what lies above the diagonal.
SHORT, SHORT_BLOCK, LONG_BLOCK = 256, 64, 128

# Finite, so that a masked key adds 0 · finite to the entropy and to the gradients, never 0 · inf.
_MASKED = -1e30


@jax.custom_vjp
def blockwise_attention(
    q_BxTxNxH: jax.Array, k_BxSxNxH: jax.Array, v_BxSxNxH: jax.Array, scale_NxT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns out [B, T, N, H] and, in nats, entropy, logsumexp and max logit [B, N, T] of softmax(scale · q·k)."""
    T, S, dtype = q_BxTxNxH.shape[1], k_BxSxNxH.shape[1], scale_NxT.dtype
    (num_queries, Q), (num_keys, K) = _blocks(T), _blocks(S)
    q_BxTxNxH, scale_NxT = (_pad(x, num_queries * Q, 1) for x in (q_BxTxNxH, scale_NxT))
    k_BxSxNxH, v_BxSxNxH = (_pad(x, num_keys * K, 1) for x in (k_BxSxNxH, v_BxSxNxH))

    def query_block(i, results):
        q_BxNxQxH, scale_NxQ = _block(q_BxTxNxH, i, Q), _take(scale_NxT, i, Q, 1)
        last_key_Q = i * Q + S - T + jnp.arange(Q)

        def key_block(j, running):
            visible_QxK = j * K + jnp.arange(K)[None] <= last_key_Q[:, None]
            s_BxNxQxK = _dot("BNQH,BNKH->BNQK", q_BxNxQxH, _block(k_BxSxNxH, j, K), dtype)
            s_BxNxQxK = jnp.where(visible_QxK[None, None], s_BxNxQxK, _MASKED)
            return _accumulate(running, s_BxNxQxK, scale_NxQ, _block(v_BxSxNxH, j, K))

        zeros_BxNxQxH = jnp.zeros_like(q_BxNxQxH, dtype)
        zeros_BxNxQ = zeros_BxNxQxH[..., 0]
        start = (zeros_BxNxQxH, zeros_BxNxQ, zeros_BxNxQ, zeros_BxNxQ + _MASKED)
        num_visible = jnp.minimum(last_key_Q[-1] // K + 1, num_keys)
        out_BxNxQxH, z_BxNxQ, w_BxNxQ, max_BxNxQ = lax.fori_loop(0, num_visible, key_block, start)
        out_BxQxNxH = (out_BxNxQxH / z_BxNxQ[..., None]).swapaxes(1, 2).astype(q_BxTxNxH.dtype)
        log_z_BxNxQ = jnp.log(z_BxNxQ)
        max_BxNxQ *= scale_NxQ[None]
        stats_BxNxQ = (log_z_BxNxQ - w_BxNxQ / z_BxNxQ, max_BxNxQ + log_z_BxNxQ, max_BxNxQ)
        out_BxTxNxH, *stats_BxNxT = results
        stats_BxNxT = (_put(x, y, i, 2) for x, y in zip(stats_BxNxT, stats_BxNxQ))
        return _put(out_BxTxNxH, out_BxQxNxH, i, 1), *stats_BxNxT

    zeros_BxNxT = jnp.zeros_like(q_BxTxNxH[..., 0].swapaxes(1, 2), dtype)
    start = (jnp.zeros_like(q_BxTxNxH), zeros_BxNxT, zeros_BxNxT, zeros_BxNxT)
    out_BxTxNxH, *stats_BxNxT = lax.fori_loop(0, num_queries, query_block, start)
    return out_BxTxNxH[:, :T], *(x[..., :T] for x in stats_BxNxT)


def _accumulate(running, s_BxNxQxK: jax.Array, scale_NxQ: jax.Array, v_BxNxKxH: jax.Array):
    """Adds a tile to the running Σ e^(s−m)·v, z = Σ e^(s−m), w = Σ e^(s−m)·(s−m), and max q·k, which gives m.

    Scaled after the maximum is taken off: what is exactly 0 then stays so, and no entropy falls below 0.
    """
    out_BxNxQxH, z_BxNxQ, w_BxNxQ, old_max_BxNxQ = running
    max_BxNxQ = jnp.maximum(old_max_BxNxQ, jnp.max(s_BxNxQxK, axis=-1))
    s_BxNxQxK = (s_BxNxQxK - max_BxNxQ[..., None]) * scale_NxQ[None, :, :, None]
    e_BxNxQxK = jnp.exp(s_BxNxQxK)
    shift_BxNxQ = (old_max_BxNxQ - max_BxNxQ) * scale_NxQ[None]
    decay_BxNxQ = jnp.exp(shift_BxNxQ)
    w_BxNxQ = decay_BxNxQ * (w_BxNxQ + z_BxNxQ * shift_BxNxQ) + jnp.sum(e_BxNxQxK * s_BxNxQxK, axis=-1)
    z_BxNxQ = decay_BxNxQ * z_BxNxQ + jnp.sum(e_BxNxQxK, axis=-1)
    values_BxNxQxH = _dot("BNQK,BNKH->BNQH", e_BxNxQxK.astype(v_BxNxKxH.dtype), v_BxNxKxH, z_BxNxQ.dtype)
    return decay_BxNxQ[..., None] * out_BxNxQxH + values_BxNxQxH, z_BxNxQ, w_BxNxQ, max_BxNxQ


def _forward(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT):
    results = blockwise_attention(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT)
    out_BxTxNxH, entropy_BxNxT, logsumexp_BxNxT, _ = results
    return results, (q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, out_BxTxNxH, entropy_BxNxT, logsumexp_BxNxT)


def _backward(residuals, cotangents):
    """With p = e^(s−lse): ds = p · (dout·v − dout·out + dlse − dentropy · (log p + entropy)), tile by tile."""
    q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, out_BxTxNxH, entropy_BxNxT, lse_BxNxT = residuals
    dout_BxTxNxH, dentropy_BxNxT, dlse_BxNxT, _ = cotangents
    T, S, dtype = q_BxTxNxH.shape[1], k_BxSxNxH.shape[1], scale_NxT.dtype
    (num_queries, Q), (num_keys, K) = _blocks(T), _blocks(S)
    dot_BxNxT = jnp.sum(out_BxTxNxH.astype(dtype) * dout_BxTxNxH.astype(dtype), axis=-1).swapaxes(1, 2)
    row_BxNxT = dlse_BxNxT - dot_BxNxT - dentropy_BxNxT * entropy_BxNxT
    rows = (jnp.broadcast_to(scale_NxT, lse_BxNxT.shape), lse_BxNxT, row_BxNxT, dentropy_BxNxT)
    rows = [_pad(x_BxNxT, num_queries * Q, 2) for x_BxNxT in rows]
    q_BxTxNxH, dout_BxTxNxH = (_pad(x, num_queries * Q, 1) for x in (q_BxTxNxH, dout_BxTxNxH))
    k_BxSxNxH, v_BxSxNxH = (_pad(x, num_keys * K, 1) for x in (k_BxSxNxH, v_BxSxNxH))

    def key_block(j, gradients):
        dq_BxTxNxH, dk_BxSxNxH, dv_BxSxNxH = gradients
        k_BxNxKxH, v_BxNxKxH = (_block(x, j, K) for x in (k_BxSxNxH, v_BxSxNxH))
        k_BxNxHxK = _block(k_BxSxNxH, j, K, order=(0, 2, 3, 1))

        def query_block(i, running):
            dq_BxTxNxH, dk_BxNxKxH, dv_BxNxKxH = running
            q_BxNxQxH, dout_BxNxQxH = (_block(x, i, Q) for x in (q_BxTxNxH, dout_BxTxNxH))
            scale, lse, row, dentropy = (_take(x, i, Q, 2)[:, :, None] for x in rows)
            visible_KxQ = j * K + jnp.arange(K)[:, None] <= i * Q + S - T + jnp.arange(Q)[None]
            # Keys before queries: the products for dk and dv then need no transposed operand.
            log_p_BxNxKxQ = _dot("BNKH,BNQH->BNKQ", k_BxNxKxH, q_BxNxQxH, dtype) * scale - lse
            log_p_BxNxKxQ = jnp.where(visible_KxQ[None, None], log_p_BxNxKxQ, _MASKED)
            p_BxNxKxQ = jnp.exp(log_p_BxNxKxQ)
            dp_BxNxKxQ = _dot("BNKH,BNQH->BNKQ", v_BxNxKxH, dout_BxNxQxH, dtype)
            ds_BxNxKxQ = p_BxNxKxQ * (dp_BxNxKxQ + row - dentropy * log_p_BxNxKxQ) * scale
            ds_BxNxKxQ = ds_BxNxKxQ.astype(q_BxTxNxH.dtype)
            dv_BxNxKxH += _dot("BNKQ,BNQH->BNKH", p_BxNxKxQ.astype(v_BxSxNxH.dtype), dout_BxNxQxH, dtype)
            dk_BxNxKxH += _dot("BNKQ,BNQH->BNKH", ds_BxNxKxQ, q_BxNxQxH, dtype)
            dq_BxNxHxQ = _dot("BNHK,BNKQ->BNHQ", k_BxNxHxK, ds_BxNxKxQ, dtype)
            dq_BxQxNxH = _take(dq_BxTxNxH, i, Q, 1) + dq_BxNxHxQ.transpose(0, 3, 1, 2)
            return _put(dq_BxTxNxH, dq_BxQxNxH, i, 1), dk_BxNxKxH, dv_BxNxKxH

        start = (dq_BxTxNxH, jnp.zeros_like(k_BxNxKxH, dtype), jnp.zeros_like(v_BxNxKxH, dtype))
        first_visible = jnp.maximum((j * K - (S - T)) // Q, 0)
        dq_BxTxNxH, dk_BxNxKxH, dv_BxNxKxH = lax.fori_loop(first_visible, num_queries, query_block, start)
        dk_BxSxNxH = _put(dk_BxSxNxH, dk_BxNxKxH.swapaxes(1, 2).astype(dk_BxSxNxH.dtype), j, 1)
        dv_BxSxNxH = _put(dv_BxSxNxH, dv_BxNxKxH.swapaxes(1, 2).astype(dv_BxSxNxH.dtype), j, 1)
        return dq_BxTxNxH, dk_BxSxNxH, dv_BxSxNxH

    start = (jnp.zeros_like(q_BxTxNxH, dtype), jnp.zeros_like(k_BxSxNxH), jnp.zeros_like(v_BxSxNxH))
    dq_BxTxNxH, dk_BxSxNxH, dv_BxSxNxH = lax.fori_loop(0, num_keys, key_block, start)
    q_BxTxNxH, dq_BxTxNxH = q_BxTxNxH[:, :T], dq_BxTxNxH[:, :T]
    # q_i·dq_i is Σ_j dS_ij · s_ij: the temperature's gradient needs no pass of its own.
    dscale_NxT = jnp.sum(q_BxTxNxH * dq_BxTxNxH, axis=(0, 3)).T / scale_NxT
    return dq_BxTxNxH.astype(q_BxTxNxH.dtype), dk_BxSxNxH[:, :S], dv_BxSxNxH[:, :S], dscale_NxT


blockwise_attention.defvjp(_forward, _backward)


def _blocks(length: int) -> tuple[int, int]:
    """Even blocks that cover `length` positions: (how many, how long)."""
    count = -(-length // (SHORT_BLOCK if length <= SHORT else LONG_BLOCK))
    return count, -(-length // count)


def _block(x_BxTxNxH: jax.Array, i: jax.Array, size: int, order: tuple[int, ...] = (0, 2, 1, 3)) -> jax.Array:
    """Block i of the positions with its axes in another order, by default [B, N, size, H]."""
    block = _take(x_BxTxNxH, i, size, 1).transpose(order)
    # XLA's CPU backend folds a bare transpose into the product, and such a bfloat16 product is computed in float32.
    return jnp.where(block == block, block, jnp.nan)


def _take(x: jax.Array, i: jax.Array, size: int, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _put(x: jax.Array, block: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, block, i * block.shape[axis], axis)


def _pad(x: jax.Array, length: int, axis: int) -> jax.Array:
    return jnp.pad(x, [(0, length - size if a == axis else 0) for a, size in enumerate(x.shape)])


def _dot(equation: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=dtype)
