"""Attention block by block with an online softmax, its entropy included: no T×T array exists, forward or backward.

Flash attention with one more running sum, w = Σ e^x·x with x = s − max s, which gives the entropy log z − w/z.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jax_entropy.attention.dense import EXACT, MASKED, visible

# Positions a block, up to this length and beyond it. Measured on CPU (docs/benchmarks/attention.md): tiles of all heads
# should stay in the last-level cache, and a short context gains more from skipping what lies above the diagonal.
SHORT, SHORT_BLOCK, LONG_BLOCK = 256, 64, 128


@jax.custom_vjp
def attend(
    q_BxTxNxH: jax.Array, k_BxSxNxH: jax.Array, v_BxSxNxH: jax.Array, scale_NxT: jax.Array, position: int | jax.Array,
    *windowed: int | jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns out [B, T, N, H] and, in nats, entropy, logsumexp and max logit [B, N, T] of softmax(scale · q·k).

    With a window and a number of slots, blocks outside of both are skipped, forward and backward.
    """
    out_BxTxNxH, entropy_BxNxT, log_z_BxNxT, max_BxNxT = _attend(
        q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, position, *windowed
    )
    max_BxNxT *= scale_NxT[None]
    return out_BxTxNxH, entropy_BxNxT, max_BxNxT + log_z_BxNxT, max_BxNxT


def _forward(*arguments: CustomVJPPrimal) -> tuple[tuple[jax.Array, ...], Any]:
    """Largest q·k and log z are kept one by one: their sum has lost the digits that differences of large q·k need."""
    _, _, _, scale_NxT, *_ = values = [argument.value for argument in arguments]
    results = out_BxTxNxH, entropy_BxNxT, log_z_BxNxT, max_BxNxT = checkpoint_name(_attend(*values), "attention")
    has_temperature = () if arguments[3].perturbed else None  # residuals are arrays; this one's structure speaks
    max_BxNxT = max_BxNxT * scale_NxT[None]
    return (out_BxTxNxH, entropy_BxNxT, max_BxNxT + log_z_BxNxT, max_BxNxT), (values, results, has_temperature)


def _attend(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, position, *windowed) -> tuple[jax.Array, ...]:
    """out [B, T, N, H]; entropy, log z and largest q·k, each [B, N, T]."""
    T, S, dtype = q_BxTxNxH.shape[1], k_BxSxNxH.shape[1], scale_NxT.dtype
    (num_queries, Q), (num_keys, K) = _blocks(T), _blocks(S)
    q_BxTxNxH, scale_NxT = (_pad(x, num_queries * Q, 1) for x in (q_BxTxNxH, scale_NxT))
    k_BxSxNxH, v_BxSxNxH = (_pad(x, num_keys * K, 1) for x in (k_BxSxNxH, v_BxSxNxH))

    def query_block(i, results):
        q_BxNxQxH, scale_NxQ = _block(q_BxTxNxH, i, Q), _take(scale_NxT, i, Q, 1)
        last_key_Q = i * Q + position + jnp.arange(Q)

        def key_block(step, running):
            j = jnp.where(step < num_first, step, step + skipped) if windowed else step
            visible_QxK = visible(j * K + jnp.arange(K)[None], last_key_Q[:, None], *windowed)
            s_BxNxQxK = _dot("BNQH,BNKH->BNQK", q_BxNxQxH, _block(k_BxSxNxH, j, K), dtype)
            s_BxNxQxK = jnp.where(visible_QxK[None, None], s_BxNxQxK, MASKED)
            return _accumulate(running, s_BxNxQxK, scale_NxQ, _block(v_BxSxNxH, j, K))

        zeros_BxNxQxH = jnp.zeros_like(q_BxNxQxH, dtype)
        zeros_BxNxQ = zeros_BxNxQxH[..., 0]
        start = (zeros_BxNxQxH, zeros_BxNxQ, zeros_BxNxQ, zeros_BxNxQ + MASKED)
        num_visible = jnp.minimum(last_key_Q[-1] // K + 1, num_keys)
        num_first, skipped = _skipped(last_key_Q[0], K, *windowed)
        out_BxNxQxH, z_BxNxQ, w_BxNxQ, max_BxNxQ = lax.fori_loop(0, num_visible - skipped, key_block, start)
        out_BxQxNxH = (out_BxNxQxH / z_BxNxQ[..., None]).swapaxes(1, 2).astype(q_BxTxNxH.dtype)
        log_z_BxNxQ = jnp.log(z_BxNxQ)
        stats_BxNxQ = (log_z_BxNxQ - w_BxNxQ / z_BxNxQ, log_z_BxNxQ, max_BxNxQ)
        out_BxTxNxH, *stats_BxNxT = results
        stats_BxNxT = (_put(x, y, i, 2) for x, y in zip(stats_BxNxT, stats_BxNxQ, strict=True))
        return _put(out_BxTxNxH, out_BxQxNxH, i, 1), *stats_BxNxT

    zeros_BxNxT = jnp.zeros_like(q_BxTxNxH[..., 0].swapaxes(1, 2), dtype)
    start = (jnp.zeros_like(q_BxTxNxH), zeros_BxNxT, zeros_BxNxT, zeros_BxNxT)
    out_BxTxNxH, *stats_BxNxT = lax.fori_loop(0, num_queries, query_block, start)
    return out_BxTxNxH[:, :T], *(x[..., :T] for x in stats_BxNxT)


def _skipped(last_key, K, window=None, num_slots=0) -> tuple[int | jax.Array, int | jax.Array]:
    """How many blocks of keys hold slots, and how many after them come before the window of a query."""
    if window is None:
        return 0, 0
    num_first = -(-num_slots // K)
    return num_first, jnp.maximum((last_key - window + 1) // K - num_first, 0)


def _accumulate(running, s_BxNxQxK: jax.Array, scale_NxQ: jax.Array, v_BxNxKxH: jax.Array) -> tuple[jax.Array, ...]:
    """Adds a tile to the running Σ e^x·v, z = Σ e^x, w = Σ e^x·x, and the largest q·k, which x is counted from.

    Scaled after the maximum is taken off: what is exactly 0 then stays so, and no entropy falls below 0.
    """
    out_BxNxQxH, z_BxNxQ, w_BxNxQ, old_max_BxNxQ = running
    max_BxNxQ = jnp.maximum(old_max_BxNxQ, jnp.max(s_BxNxQxK, axis=-1))
    x_BxNxQxK = (s_BxNxQxK - max_BxNxQ[..., None]) * scale_NxQ[None, :, :, None]
    e_BxNxQxK = jnp.exp(x_BxNxQxK)
    shift_BxNxQ = (old_max_BxNxQ - max_BxNxQ) * scale_NxQ[None]
    decay_BxNxQ = jnp.exp(shift_BxNxQ)
    w_BxNxQ = decay_BxNxQ * (w_BxNxQ + z_BxNxQ * shift_BxNxQ) + jnp.sum(e_BxNxQxK * x_BxNxQxK, axis=-1)
    z_BxNxQ = decay_BxNxQ * z_BxNxQ + jnp.sum(e_BxNxQxK, axis=-1)
    values_BxNxQxH = _dot("BNQK,BNKH->BNQH", e_BxNxQxK.astype(v_BxNxKxH.dtype), v_BxNxKxH, z_BxNxQ.dtype)
    return decay_BxNxQ[..., None] * out_BxNxQxH + values_BxNxQxH, z_BxNxQ, w_BxNxQ, max_BxNxQ


def _backward(residuals: Any, cotangents: tuple[jax.Array | SymbolicZero, ...]) -> tuple[jax.Array | None, ...]:
    """With p = e^(x − log z): ds = p · (dout·v − dout·out + dlse − dentropy · (log p + entropy)), tile by tile."""
    (q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, position, *windowed), results, has_temperature = residuals
    out_BxTxNxH, entropy_BxNxT, log_z_BxNxT, max_BxNxT = results
    dout_BxTxNxH, dentropy_BxNxT, dlse_BxNxT, _ = (
        jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents
    )
    T, S, dtype = q_BxTxNxH.shape[1], k_BxSxNxH.shape[1], scale_NxT.dtype
    (num_queries, Q), (num_keys, K) = _blocks(T), _blocks(S)
    dot_BxNxT = jnp.sum(out_BxTxNxH.astype(dtype) * dout_BxTxNxH.astype(dtype), axis=-1).swapaxes(1, 2)
    row_BxNxT = dlse_BxNxT - dot_BxNxT - dentropy_BxNxT * entropy_BxNxT
    rows = (jnp.broadcast_to(scale_NxT, max_BxNxT.shape), max_BxNxT, log_z_BxNxT, row_BxNxT, dentropy_BxNxT)
    rows = [_pad(x_BxNxT, num_queries * Q, 2) for x_BxNxT in rows]
    q_BxTxNxH, dout_BxTxNxH = (_pad(x, num_queries * Q, 1) for x in (q_BxTxNxH, dout_BxTxNxH))
    k_BxSxNxH, v_BxSxNxH = (_pad(x, num_keys * K, 1) for x in (k_BxSxNxH, v_BxSxNxH))

    def key_block(j, gradients):
        dq_BxTxNxH, dk_BxSxNxH, dv_BxSxNxH, by_scale_BxNxT = gradients
        k_BxNxKxH, v_BxNxKxH = (_block(x, j, K) for x in (k_BxSxNxH, v_BxSxNxH))
        k_BxNxHxK = _block(k_BxSxNxH, j, K, order=(0, 2, 3, 1))

        def query_block(i, running):
            dq_BxTxNxH, dk_BxNxKxH, dv_BxNxKxH, by_scale_BxNxT = running
            q_BxNxQxH, dout_BxNxQxH = (_block(x, i, Q) for x in (q_BxTxNxH, dout_BxTxNxH))
            scale, largest, log_z, row, dentropy = (_take(x, i, Q, 2)[:, :, None] for x in rows)
            visible_KxQ = visible(j * K + jnp.arange(K)[:, None], i * Q + position + jnp.arange(Q)[None], *windowed)
            # Keys before queries: the products for dk and dv then need no transposed operand.
            s_BxNxKxQ = _dot("BNKH,BNQH->BNKQ", k_BxNxKxH, q_BxNxQxH, dtype)
            log_p_BxNxKxQ = jnp.where(visible_KxQ[None, None], (s_BxNxKxQ - largest) * scale - log_z, MASKED)
            p_BxNxKxQ = jnp.exp(log_p_BxNxKxQ)
            dp_BxNxKxQ = _dot("BNKH,BNQH->BNKQ", v_BxNxKxH, dout_BxNxQxH, dtype)
            ds_BxNxKxQ = p_BxNxKxQ * (dp_BxNxKxQ + row - dentropy * log_p_BxNxKxQ) * scale
            if has_temperature is not None:
                # From the largest on, and not Σ ds·s: beside large logits their differences would be lost.
                by_scale_BxNxQ = _take(by_scale_BxNxT, i, Q, 2) + jnp.sum(ds_BxNxKxQ * (s_BxNxKxQ - largest), axis=2)
                by_scale_BxNxT = _put(by_scale_BxNxT, by_scale_BxNxQ, i, 2)
            ds_BxNxKxQ = ds_BxNxKxQ.astype(q_BxTxNxH.dtype)
            dv_BxNxKxH += _dot("BNKQ,BNQH->BNKH", p_BxNxKxQ.astype(v_BxSxNxH.dtype), dout_BxNxQxH, dtype)
            dk_BxNxKxH += _dot("BNKQ,BNQH->BNKH", ds_BxNxKxQ, q_BxNxQxH, dtype)
            dq_BxNxHxQ = _dot("BNHK,BNKQ->BNHQ", k_BxNxHxK, ds_BxNxKxQ, dtype)
            dq_BxQxNxH = _take(dq_BxTxNxH, i, Q, 1) + dq_BxNxHxQ.transpose(0, 3, 1, 2)
            return _put(dq_BxTxNxH, dq_BxQxNxH, i, 1), dk_BxNxKxH, dv_BxNxKxH, by_scale_BxNxT

        start = (dq_BxTxNxH, jnp.zeros_like(k_BxNxKxH, dtype), jnp.zeros_like(v_BxNxKxH, dtype), by_scale_BxNxT)
        first_visible, end = jnp.maximum((j * K - position) // Q, 0), num_queries
        if windowed:
            window, num_slots = windowed
            last_query = jnp.minimum(((j + 1) * K + window - 2 - position) // Q + 1, num_queries)
            end = jnp.where(j * K < num_slots, num_queries, last_query)
        dq_BxTxNxH, dk_BxNxKxH, dv_BxNxKxH, by_scale_BxNxT = lax.fori_loop(first_visible, end, query_block, start)
        dk_BxSxNxH = _put(dk_BxSxNxH, dk_BxNxKxH.swapaxes(1, 2).astype(dk_BxSxNxH.dtype), j, 1)
        dv_BxSxNxH = _put(dv_BxSxNxH, dv_BxNxKxH.swapaxes(1, 2).astype(dv_BxSxNxH.dtype), j, 1)
        return dq_BxTxNxH, dk_BxSxNxH, dv_BxSxNxH, by_scale_BxNxT

    zeros = jnp.zeros_like(q_BxTxNxH, dtype), jnp.zeros_like(k_BxSxNxH), jnp.zeros_like(v_BxSxNxH)
    by_scale_BxNxT = None if has_temperature is None else jnp.zeros_like(rows[1])
    dq_BxTxNxH, dk_BxSxNxH, dv_BxSxNxH, by_scale_BxNxT = lax.fori_loop(0, num_keys, key_block, (*zeros, by_scale_BxNxT))
    dscale_NxT = None
    if has_temperature is not None:
        dscale_NxT = jnp.sum(by_scale_BxNxT[..., :T] / scale_NxT[None] + dlse_BxNxT * max_BxNxT, axis=0)
    dq_BxTxNxH = dq_BxTxNxH[:, :T].astype(q_BxTxNxH.dtype)
    return dq_BxTxNxH, dk_BxSxNxH[:, :S], dv_BxSxNxH[:, :S], dscale_NxT, None, *(None for _ in windowed)


attend.defvjp(_forward, _backward, symbolic_zeros=True)


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
    return jnp.einsum(equation, x, y, precision=EXACT, preferred_element_type=dtype)
