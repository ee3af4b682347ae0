"""Attention on TPUs (Pallas, Mosaic): forward, and one backward kernel, the entropy and its gradient inside.

Heads narrower than the 128 lanes share them, in the order in which the projections write them. Tiles of logits lie with
keys before queries: a row's statistics are then lanes of one row, and no sum runs over lanes. The mathematics and its
names stand in the package's docstring, but that the largest is taken off before the scale: a TPU has no multiply-add,
so this costs nothing and holds logits of any size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_entropy.attention.blocks import blocks_for
from jax_entropy.attention.dense import MASKED, visible
from jax_entropy.attention.kernels import (
    HIDDEN,
    LN2,
    BlockRange,
    attend_on_shards,
    key_blocks,
    pack,
    query_blocks,
    unpack,
)
from jax_entropy.sharding import device_kind

LANES = 128
NARROWEST = 16  # head, of which eight share the lanes
_TILE_MEMORY = 16 * 2**20  # bytes of VMEM for tiles, beside those of a whole row


class Blocks(NamedTuple):
    """Queries and keys of a tile, and positions of the other side that are fetched at once, its span."""

    queries: int
    keys: int
    span: int


class Kernels(NamedTuple):
    """The tiles of the kernels; no dq: the kernel of dk and dv makes it too, with a row of it in memory."""

    forward: Blocks
    dkv: Blocks
    dq: Blocks | None


def attend(
    q_BxTxNxH: jax.Array,
    k_BxSxNxH: jax.Array,
    v_BxSxNxH: jax.Array,
    scale_NxT: jax.Array,
    position: int | jax.Array,
    window: int | jax.Array | None = None,
    num_slots: int = 0,
    *,
    kernels: Kernels | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns out [B, T, N, H] and, in nats, entropy, logsumexp and max logit [B, N, T] of softmax(scale · q·k).

    Args:
      window: keys that a query sees, with the first `num_slots`; blocks outside of both are skipped. None: all.
      kernels: the tiles; None: those of blocks.json for this device.
      interpret: run the kernels on the CPU, one by one, instead of compiling them.
    Raises:
      UserError: a head width or a type that there are no tiles for.
    """
    kernels = kernels or tiles(device_kind(), q_BxTxNxH, k_BxSxNxH.shape[1])
    kernel = functools.partial(_heads_in_lanes, kernels=kernels, interpret=interpret, num_slots=num_slots)
    return attend_on_shards(kernel, q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, pack(position, window))


def tiles(device_kind: str, q_BxTxNxH: jax.Array, S: int) -> Kernels:
    """Those of blocks.json."""
    found = blocks_for("tpu", device_kind, q_BxTxNxH.dtype, q_BxTxNxH.shape[-1], S)
    return Kernels(*(found[name] and Blocks(*found[name]) for name in Kernels._fields))


def _heads_in_lanes(q, k, v, scale_NxT, at, kernels: Kernels, interpret: bool, num_slots: int) -> tuple[jax.Array, ...]:
    """[B, T, N, H] as [B, T, G·128]: G groups of P heads; statistics and scales are [G, P, T] then."""
    B, T, N, H = q.shape
    W = max(NARROWEST, pl.next_power_of_2(H))
    P = LANES // W
    G = pl.cdiv(N, P)

    def lanes(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, G * P - N), (0, W - H))).reshape(*x.shape[:2], G * LANES)

    scale = jnp.pad(scale_NxT, ((0, G * P - N), (0, 0)), constant_values=1).reshape(G, P, T)
    out, *rows = _attention(lanes(q), lanes(k), lanes(v), scale, at, kernels, interpret, num_slots)
    return out.reshape(B, T, G * P, W)[:, :, :N, :H], *(x.reshape(B, G * P, T)[:, :N] for x in rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, scale, at, kernels: Kernels, interpret: bool, num_slots: int) -> tuple[jax.Array, ...]:
    return _forward(q, k, v, scale, at, kernels, interpret, num_slots)[0]


def _forward(q, k, v, scale, at, kernels: Kernels, interpret: bool, num_slots: int) -> tuple[tuple, tuple]:
    """Results, and the residuals of the backward pass; m is the largest q·k, before its scale."""
    (B, T, _), S, (G, P, _), blocks = q.shape, k.shape[1], scale.shape, kernels.forward
    (Q, _, end_T), (K, span, end_S) = _even(T, blocks.queries), _even(S, blocks.keys, blocks.span)
    grid = _OverKeys(Q, K, span, end_S, num_slots)
    queries, keys, rows, scales = grid.specs(P)
    row = jax.ShapeDtypeStruct((B, G, P, end_T), jnp.float32)
    out, *stats = _call(
        functools.partial(_forward_kernel, grid=grid),
        "attention_forward",
        grid=(B, G, end_T // Q, end_S // span),
        inputs=[(_padded(q, 1, end_T), queries), (_padded(k, 1, end_S), keys), (_padded(v, 1, end_S), keys),
                (_padded(scale / LN2, 2, end_T), scales)],
        outputs=[(jax.ShapeDtypeStruct((B, end_T, G * LANES), q.dtype), queries), *[(row, rows)] * 3],
        scratch=[((P, Q, LANES), q.dtype), ((LANES, Q), jnp.float32), *[((P, Q), jnp.float32)] * 3],
        interpret=interpret,
    )(at)  # fmt: skip
    out, entropy, m, log_l = checkpoint_name((out[:, :T], *(x[..., :T] for x in stats)), "attention")
    largest = m * scale[None]
    return (out, entropy, largest + LN2 * log_l, largest), (q, k, v, scale, at, out, entropy, m, log_l)


def _forward_kernel(
    at_ref, q_ref, k_ref, v_ref, a_ref, out_ref, entropy_ref, m_ref, log_l_ref, q_s, out_s, m_s, l_s, w_s, *, grid
) -> None:
    heads, span = _heads(a_ref), pl.program_id(3)

    @pl.when(span == 0)
    def _() -> None:
        for n, (_, lanes) in enumerate(heads):
            q_s[n] = _own(q_ref[...], lanes)
        out_s[...], l_s[...], w_s[...] = (jnp.zeros(ref.shape, jnp.float32) for ref in (out_s, l_s, w_s))
        m_s[...] = jnp.full(m_s.shape, MASKED, jnp.float32)

    def block(j: jax.Array, seen_KxQ: jax.Array | None) -> None:
        here = _positions(j, grid.keys)
        k_KxC, v_CxK = k_ref[here, :], v_ref[here, :].T
        for n, (row, lanes) in enumerate(heads):
            s_KxQ = _dot(k_KxC, q_s[n], (1, 1))
            if seen_KxQ is not None:
                s_KxQ = jnp.where(seen_KxQ, s_KxQ, MASKED)
            a_1xQ, old_m_1xQ, l_1xQ = a_ref[row, :], m_s[row, :], l_s[row, :]
            m_1xQ = jnp.maximum(old_m_1xQ, jnp.max(s_KxQ, axis=0, keepdims=True))
            x_KxQ = (s_KxQ - m_1xQ) * a_1xQ
            e_KxQ = jnp.exp2(x_KxQ)
            shift_1xQ = (old_m_1xQ - m_1xQ) * a_1xQ
            decay_1xQ = jnp.exp2(shift_1xQ)
            w_s[row, :] = decay_1xQ * (w_s[row, :] + l_1xQ * shift_1xQ) + _sum(e_KxQ * x_KxQ)
            l_s[row, :] = decay_1xQ * l_1xQ + _sum(e_KxQ)
            m_s[row, :] = m_1xQ
            out_s[lanes, :] = decay_1xQ * out_s[lanes, :] + _dot(v_CxK[lanes], e_KxQ.astype(v_CxK.dtype), (1, 0))

    grid.over(at_ref, block)

    @pl.when(span == pl.num_programs(3) - 1)
    def _() -> None:
        for row, lanes in heads:
            l_1xQ = l_s[row, :]
            log_l_1xQ = jnp.log2(l_1xQ)
            out_s[lanes, :] = out_s[lanes, :] / l_1xQ
            entropy_ref[row, :] = LN2 * (log_l_1xQ - w_s[row, :] / l_1xQ)
            log_l_ref[row, :] = log_l_1xQ
        m_ref[...] = m_s[...]
        out_ref[...] = out_s[...].T.astype(out_ref.dtype)


def _forward_rule(q, k, v, scale, at, kernels: Kernels, interpret: bool, num_slots: int) -> tuple[tuple, tuple]:
    results, residuals = _forward(*(x.value for x in (q, k, v, scale, at)), kernels, interpret, num_slots)
    has_temperature = () if scale.perturbed else None  # residuals are arrays; this one's structure speaks
    return results, (*residuals, has_temperature)


def _backward_rule(kernels: Kernels, interpret: bool, num_slots: int, residuals: tuple, cotangents: tuple) -> tuple:
    q, k, v, scale, at, out, entropy, m, log_l, has_temperature = residuals
    dout, dentropy, dlse, _ = cotangents
    # what a loss does not use is not in the kernels that it runs
    with_entropy, with_temperature = not isinstance(dentropy, SymbolicZero), has_temperature is not None
    dout, dlse = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in (dout, dlse))
    if with_entropy:
        g = -scale[None] * LN2 * dentropy
        rows = (m, log_l, scale[None] * (dlse - dentropy * entropy) - g * log_l, g)
    else:
        rows = (m, log_l, scale[None] * dlse)
    options = dict(interpret=interpret, num_slots=num_slots)
    dk, dv, c, *made = _dkv(q, k, v, scale, at, dout, out, rows, with_temperature, kernels, **options)
    if kernels.dq is None:
        dq, *made = made
    else:
        dq = _dq(q, k, v, scale, at, dout, (m, log_l, c, *rows[3:]), kernels.dq, **options)
    dscale = jnp.sum(made[0] * LN2 / scale[None] ** 2 + dlse * m, axis=0) if with_temperature else None
    return dq, dk, dv, dscale, None


def _dkv(
    q, k, v, scale, at, dout, out, rows, with_temperature: bool, kernels: Kernels, *, interpret: bool, num_slots: int
) -> tuple:
    """dk; dv; c with its last term, D; dq where no kernel of its own makes it; Σ scale·dS·x with a temperature."""
    (B, T, _), S, (G, P, _), blocks = q.shape, k.shape[1], scale.shape, kernels.dkv
    (Q, span, end_T), (K, _, end_S) = _even(T, blocks.queries, blocks.span), _even(S, blocks.keys)
    grid, with_dq = _OverQueries(Q, K, span, end_T, num_slots), kernels.dq is None
    queries, once, keys, rows_spec, scales = grid.specs(P)
    row = (
        jax.ShapeDtypeStruct((B, G, P, end_T), jnp.float32),
        pl.BlockSpec((None, None, P, end_T), lambda b, g, j, w, at: (b, g, 0, 0)),
    )
    dq = (
        jax.ShapeDtypeStruct((B, end_T, G * LANES), q.dtype),
        pl.BlockSpec((None, end_T, LANES), lambda b, g, j, w, at: (b, 0, g)),
    )
    dk, dv, c, *made = _call(
        functools.partial(
            _dkv_kernel, grid=grid, with_entropy=len(rows) == 4, with_dq=with_dq, with_temperature=with_temperature
        ),
        "attention_backward" if with_dq else "attention_dkv",
        grid=(B, G, end_S // K, end_T // span),
        inputs=[(_padded(q, 1, end_T), queries), (_padded(dout, 1, end_T), queries), (_padded(out, 1, end_T), once),
                (_padded(k, 1, end_S), keys), (_padded(v, 1, end_S), keys), (_padded(scale / LN2, 2, end_T), scales),
                *((_padded(x, 3, end_T), rows_spec) for x in rows)],
        outputs=[*((jax.ShapeDtypeStruct((B, end_S, G * LANES), x.dtype), keys) for x in (k, v)), row]
        + [dq] * with_dq + [row] * with_temperature,
        scratch=[((K, LANES), jnp.float32)] * 2 + [((end_T // Q, LANES, Q), jnp.float32)] * with_dq,
        interpret=interpret,
        row_memory=with_dq * end_T * LANES * (4 + 2 * q.dtype.itemsize),
    )(at)  # fmt: skip
    return dk[:, :S], dv[:, :S], c[..., :T], *([made.pop(0)[:, :T]] if with_dq else ()), *(x[..., :T] for x in made)


def _dkv_kernel(
    at_ref, q_ref, dout_ref, out_ref, k_ref, v_ref, a_ref, m_ref, log_l_ref, c_ref, *refs, grid, with_entropy,
    with_dq, with_temperature,
) -> None:  # fmt: skip
    """Tile by tile of keys; the first, which all queries see, also makes c of their rows whole."""
    g_refs, (dk_ref, dv_ref, whole_c_ref, *refs) = refs[:with_entropy], refs[with_entropy:]
    dq_refs, by_scale_refs = refs[:with_dq], refs[with_dq : with_dq + with_temperature]
    dk_s, dv_s, *dq_s = refs[with_dq + with_temperature :]
    (Q, K, *_), heads, count = grid, _heads(a_ref), grid.span // grid.queries
    tile, span = pl.program_id(2), pl.program_id(3)
    last = span == pl.num_programs(3) - 1
    k_KxC, v_KxC = k_ref[...], v_ref[...]
    k_CxK = k_KxC.T

    def prepare(i: jax.Array) -> None:
        here, there = _positions(i, Q), _positions(span * count + i, Q)
        terms_CxQ = (dout_ref[here, :].astype(jnp.float32) * out_ref[here, :].astype(jnp.float32)).T
        for row, lanes in heads:
            whole_c_ref[row, there] = c_ref[row, here] - LN2 * a_ref[row, here] * _sum(terms_CxQ[lanes])
        for ref in by_scale_refs:
            ref[:, there] = jnp.zeros((len(heads), Q), jnp.float32)
        for ref in dq_s:
            ref[span * count + i] = jnp.zeros((LANES, Q), jnp.float32)

    pl.when(tile == 0)(lambda: _loop(0, count, prepare))

    @pl.when(span == 0)
    def _() -> None:
        dk_s[...], dv_s[...] = jnp.zeros((K, LANES), jnp.float32), jnp.zeros((K, LANES), jnp.float32)

    def block(i: jax.Array, seen_KxQ: jax.Array | None) -> None:
        here, there = _positions(i, Q), _positions(span * count + i, Q)
        for row, lanes in heads:
            q_QxC, dout_QxC = _own(q_ref[here, :], lanes), _own(dout_ref[here, :], lanes)
            rows = [ref[row, here] for ref in (a_ref, m_ref, log_l_ref)]
            rows += [whole_c_ref[row, there], *(ref[row, here] for ref in g_refs)]
            p_KxQ, ds_KxQ, x_KxQ = _backward_tile(k_KxC, v_KxC, q_QxC, dout_QxC, rows, seen_KxQ)
            for ref in by_scale_refs:  # from the largest on: beside large logits the differences of q·dq would be lost
                ref[row, there] += _sum(ds_KxQ * x_KxQ)
            ds_KxQ = ds_KxQ.astype(q_QxC.dtype)
            dv_s[...] += _dot(p_KxQ.astype(dout_QxC.dtype), dout_QxC, (1, 0))
            dk_s[...] += _dot(ds_KxQ, q_QxC, (1, 0))
            for ref in dq_s:
                ref[span * count + i, lanes, :] += _dot(k_CxK[lanes], ds_KxQ, (1, 0))

    grid.over(at_ref, block)

    @pl.when(last)
    def _() -> None:
        dk_ref[...], dv_ref[...] = dk_s[...].astype(dk_ref.dtype), dv_s[...].astype(dv_ref.dtype)

    def store(i: jax.Array) -> None:
        for ref, total in zip(dq_refs, dq_s, strict=True):
            ref[_positions(i, Q), :] = total[i].T.astype(ref.dtype)

    pl.when(last & (tile == pl.num_programs(2) - 1))(lambda: _loop(0, grid.length // Q, store))


def _dq(q, k, v, scale, at, dout, rows, blocks: Blocks, *, interpret: bool, num_slots: int) -> jax.Array:
    """dq by tiles of queries, where memory does not hold a row of it."""
    (B, T, _), S, (G, P, _) = q.shape, k.shape[1], scale.shape
    (Q, _, end_T), (K, span, end_S) = _even(T, blocks.queries), _even(S, blocks.keys, blocks.span)
    grid = _OverKeys(Q, K, span, end_S, num_slots)
    queries, keys, rows_spec, scales = grid.specs(P)
    (dq,) = _call(
        functools.partial(_dq_kernel, grid=grid),
        "attention_dq",
        grid=(B, G, end_T // Q, end_S // span),
        inputs=[(_padded(q, 1, end_T), queries), (_padded(dout, 1, end_T), queries), (_padded(k, 1, end_S), keys),
                (_padded(v, 1, end_S), keys), (_padded(scale / LN2, 2, end_T), scales),
                *((_padded(x, 3, end_T), rows_spec) for x in rows)],
        outputs=[(jax.ShapeDtypeStruct((B, end_T, G * LANES), q.dtype), queries)],
        scratch=[((P, Q, LANES), q.dtype), ((P, Q, LANES), dout.dtype), ((LANES, Q), jnp.float32)],
        interpret=interpret,
    )(at)  # fmt: skip
    return dq[:, :T]


def _dq_kernel(at_ref, q_ref, dout_ref, k_ref, v_ref, a_ref, *refs, grid) -> None:
    row_refs, (dq_ref, q_s, dout_s, dq_s) = refs[:-4], refs[-4:]
    heads, span = _heads(a_ref), pl.program_id(3)

    @pl.when(span == 0)
    def _() -> None:
        for n, (_, lanes) in enumerate(heads):
            q_s[n], dout_s[n] = _own(q_ref[...], lanes), _own(dout_ref[...], lanes)
        dq_s[...] = jnp.zeros(dq_s.shape, jnp.float32)

    def block(j: jax.Array, seen_KxQ: jax.Array | None) -> None:
        here = _positions(j, grid.keys)
        k_KxC, v_KxC = k_ref[here, :], v_ref[here, :]
        k_CxK = k_KxC.T
        for n, (row, lanes) in enumerate(heads):
            rows = [ref[row, :] for ref in (a_ref, *row_refs)]
            _, ds_KxQ, _ = _backward_tile(k_KxC, v_KxC, q_s[n], dout_s[n], rows, seen_KxQ)
            dq_s[lanes, :] += _dot(k_CxK[lanes], ds_KxQ.astype(k_CxK.dtype), (1, 0))

    grid.over(at_ref, block)

    @pl.when(span == pl.num_programs(3) - 1)
    def _() -> None:
        dq_ref[...] = dq_s[...].T.astype(dq_ref.dtype)


def _backward_tile(k_KxC, v_KxC, q_QxC, dout_QxC, rows: list, seen_KxQ: jax.Array | None) -> tuple[jax.Array, ...]:
    """p, scale·dS and x of a head; of q and dout its own lanes; rows a, m, log l, c and, with the entropy, g."""
    a_1xQ, m_1xQ, log_l_1xQ, c_1xQ, *g = rows
    x_KxQ = (_dot(k_KxC, q_QxC, (1, 1)) - m_1xQ) * a_1xQ
    if seen_KxQ is not None:
        x_KxQ = jnp.where(seen_KxQ, x_KxQ, HIDDEN)
    p_KxQ = jnp.exp2(x_KxQ - log_l_1xQ)
    row_KxQ = c_1xQ + g[0] * x_KxQ if g else c_1xQ
    return p_KxQ, p_KxQ * (_dot(v_KxC, dout_QxC, (1, 1)) * (a_1xQ * LN2) + row_KxQ), x_KxQ


_attention.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


class _OverKeys(NamedTuple):
    """The grid of forward and dq: sequences, groups of heads, tiles of queries, and in order spans of the keys."""

    queries: int
    keys: int
    span: int
    length: int  # of all spans
    num_slots: int

    def specs(self, P: int) -> tuple[pl.BlockSpec, ...]:
        """Of queries, keys, rows and scales; spans that no query of a tile sees are not fetched."""
        Q, _, W, *_ = self

        def seen(i: jax.Array, w: jax.Array, at_ref: Any) -> jax.Array:
            position, windowed = unpack(at_ref, self.num_slots)
            last = jnp.minimum(w, lax.div(i * Q + Q - 1 + position, jnp.int32(W)))
            if not windowed:
                return last
            window, num_slots = windowed
            first = lax.div(jnp.maximum(i * Q + position + 1 - window, 0), jnp.int32(W))
            return jnp.where(w * W < num_slots, w, jnp.maximum(first, last))

        return (
            pl.BlockSpec((None, Q, LANES), lambda b, g, i, w, at: (b, i, g)),
            pl.BlockSpec((None, W, LANES), lambda b, g, i, w, at: (b, seen(i, w, at), g)),
            pl.BlockSpec((None, None, P, Q), lambda b, g, i, w, at: (b, g, 0, i)),
            pl.BlockSpec((None, P, Q), lambda b, g, i, w, at: (g, 0, i)),
        )

    def over(self, at_ref: Any, block: Callable) -> None:
        """Calls `block` for those of this program's span that its queries see."""
        Q, K, W, length, num_slots = self
        position, windowed = unpack(at_ref, num_slots)
        last_key, before = pl.program_id(2) * Q + position, pl.program_id(3) * W
        mask = lambda j: _seen(before + j * K, last_key, K, Q, *windowed)  # noqa: E731
        _over(key_blocks(last_key, Q, K, length, *windowed), W // K, block, mask)


class _OverQueries(NamedTuple):
    """The grid of dk and dv: sequences, groups of heads, and in order tiles of keys, spans of the queries."""

    queries: int
    keys: int
    span: int
    length: int  # of all spans
    num_slots: int

    def specs(self, P: int) -> tuple[pl.BlockSpec, ...]:
        """Of queries, of what the first tile alone reads, keys, rows, scales; no span that sees no key is fetched."""
        _, K, W, *_ = self
        final = self.length // W - 1

        def seeing(j: jax.Array, w: jax.Array, at_ref: Any) -> jax.Array:
            position, windowed = unpack(at_ref, self.num_slots)
            first = jnp.minimum(lax.div(jnp.maximum(j * K - position, 0), jnp.int32(W)), final)
            if not windowed:
                return jnp.maximum(w, first)
            window, num_slots = windowed
            last = lax.div(jnp.maximum(j * K - position + K - 2 + window, 0), jnp.int32(W))
            # the first tile makes c of all rows
            return jnp.where((j == 0) | (j * K < num_slots), w, jnp.clip(w, first, jnp.maximum(first, last)))

        return (
            pl.BlockSpec((None, W, LANES), lambda b, g, j, w, at: (b, seeing(j, w, at), g)),
            pl.BlockSpec((None, W, LANES), lambda b, g, j, w, at: (b, jnp.where(j == 0, w, final), g)),
            pl.BlockSpec((None, K, LANES), lambda b, g, j, w, at: (b, j, g)),
            pl.BlockSpec((None, None, P, W), lambda b, g, j, w, at: (b, g, 0, seeing(j, w, at))),
            pl.BlockSpec((None, P, W), lambda b, g, j, w, at: (g, 0, seeing(j, w, at))),
        )

    def over(self, at_ref: Any, block: Callable) -> None:
        """Calls `block` for those of this program's span that see its keys."""
        Q, K, W, length, num_slots = self
        position, windowed = unpack(at_ref, num_slots)
        first_key, before = pl.program_id(2) * K, pl.program_id(3) * W
        mask = lambda i: _seen(first_key, before + i * Q + position, K, Q, *windowed)  # noqa: E731
        _over(query_blocks(first_key, position, K, Q, length, *windowed), W // Q, block, mask)


def _call(kernel: Any, name: str, *, grid, inputs, outputs, scratch, interpret: bool, row_memory: int = 0) -> Any:
    """A function of `at`; pairs of arrays and specs, of shapes and specs, and of scratch shapes and types."""
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=[pltpu.VMEM(*one) for one in scratch],
        ),
        out_shape=[shape for shape, _ in outputs],
        interpret=interpret,
        name=name,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_TILE_MEMORY + row_memory,
        ),
    )
    return lambda at: call(at, *(array for array, _ in inputs))


def _even(length: int, tile: int, span: int = 0) -> tuple[int, int, int]:
    """Tile and span in whole lanes, as even as may be, and the padded length that both divide."""
    count = pl.cdiv(length, tile)
    tile = pl.cdiv(pl.cdiv(length, count), LANES) * LANES
    spans = pl.cdiv(count * tile, span or tile)
    in_span = pl.cdiv(count, spans)
    return tile, in_span * tile, spans * in_span * tile


def _padded(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Zeros at the end: queries and rows of 0 add nothing to any gradient, and no query sees keys there."""
    return jnp.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def _heads(rows_ref: Any) -> list[tuple[slice, slice]]:
    """Of each head of a group: its row of the statistics, and its lanes."""
    P = rows_ref.shape[0]
    return [(slice(n, n + 1), slice(n * (LANES // P), (n + 1) * (LANES // P))) for n in range(P)]


def _own(x_QxC: jax.Array, lanes: slice) -> jax.Array:
    """0 in the lanes of other heads: a product over all lanes is then one over this head's."""
    if lanes == slice(0, LANES):
        return x_QxC
    lane = lax.broadcasted_iota(jnp.int32, x_QxC.shape, 1)
    return jnp.where((lane >= lanes.start) & (lane < lanes.stop), x_QxC, jnp.zeros_like(x_QxC))


def _seen(first_key: jax.Array, last_key: jax.Array, K: int, Q: int, *windowed: Any) -> jax.Array:
    """Whether a query (column) sees a key (row); the first column sees keys up to `last_key`."""
    keys, queries = (lax.broadcasted_iota(jnp.int32, (K, Q), axis) for axis in (0, 1))
    return visible(keys + first_key, queries + last_key, *windowed)


def _over(visited: BlockRange, count: int, block: Callable, mask: Callable) -> None:
    """Calls `block(i, mask)`, the mask None where all is seen, for those visited among this span's `count`."""
    before = pl.program_id(3) * count
    for begin, end, masked in visited.runs():
        masks = mask if masked else lambda i: None
        _loop(*(jnp.clip(i - before, 0, count) for i in (begin, end)), lambda i, masks=masks: block(i, masks(i)))


def _positions(i: jax.Array, size: int) -> Any:
    return pl.ds(pl.multiple_of(i * size, size), size)


def _loop(begin: int | jax.Array, end: int | jax.Array, body: Any) -> None:
    lax.fori_loop(jnp.int32(begin), jnp.int32(end), lambda i, _: body(i), None)


def _sum(x_KxQ: jax.Array) -> jax.Array:
    return jnp.sum(x_KxQ, axis=0, keepdims=True)


def _dot(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """float32 sums of products; of float32 factors in true float32, not in the MXU's bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = tuple((axis,) for axis in contracted)
    return lax.dot_general(x, y, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)
