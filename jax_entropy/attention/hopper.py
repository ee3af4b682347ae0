"""Attention on Hopper (sm_90a, Pallas for Mosaic): forward, dq, and dk with dv, the entropy and its gradient inside.

Two warpgroups compute and take turns, so that the softmax of one runs under the products of the other; a third fetches
tiles ahead of them. The mathematics and its names stand in the package's docstring.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_entropy.attention.blocks import blocks_for
from jax_entropy.attention.dense import visible
from jax_entropy.attention.kernels import (
    HIDDEN,
    LN2,
    LOWEST,
    PART,
    attend_on_shards,
    base2,
    key_blocks,
    multiply_add,
    of_backward,
    query_blocks,
)
from jax_entropy.errors import UserError
from jax_entropy.sharding import device_kind

WARPGROUPS = 2  # that compute
WIDTHS = (32, 64, 96, 128)  # of heads

_TILE = plgpu.Layout.WGMMA
_ROWS, _COLUMNS = _TILE.reduce(1), _TILE.reduce(0)  # a number for each row, or column, of a tile
_ALL_OF_IT = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # an index, which jax 0.12 has not


class Blocks(NamedTuple):
    """Rows of a warpgroup's tile, its columns, and how many tiles are on their way at once."""

    rows: int
    columns: int
    stages: int


class Kernels(NamedTuple):
    """The tiles of the three kernels: rows are queries, in dkv keys."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


class Given(NamedTuple):
    """What is known when the kernels are compiled."""

    position: int  # key at which the first query stands
    num_slots: int
    kernels: Kernels
    with_entropy: bool = True
    interpret: Any = False


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
    with_entropy: bool = True,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns out [B, T, N, H] and, in nats, entropy, logsumexp and max logit [B, N, T] of softmax(scale · q·k).

    Args:
      position: S − T; a cache of fixed size is for "gpu".
      window: keys that a query sees, with the first `num_slots`; blocks outside of both are skipped. None: all.
      kernels: the tiles; None: those of blocks.json for this device.
      with_entropy: False leaves it out of the forward pass, to measure what it costs; what stands for it is not it.
      interpret: False, or Pallas' `InterpretGPUParams` to run on the CPU.
    Raises:
      UserError: a position, a head width or a type that these kernels do not take.
    """
    T, S, H = q_BxTxNxH.shape[1], *k_BxSxNxH.shape[1::2]
    if not isinstance(position, int) or position != S - T:
        raise UserError("attention 'hopper' takes the queries at the end of the keys; a cache is for 'gpu'")
    if H not in WIDTHS:
        raise UserError(
            f"attention 'hopper' takes heads of {', '.join(map(str, WIDTHS))}, not {H}; 'gpu' takes any up to 128"
        )
    q_BxTxNxH, k_BxSxNxH, v_BxSxNxH = (_whole(x) for x in (q_BxTxNxH, k_BxSxNxH, v_BxSxNxH))
    kernels = kernels or tiles(device_kind(), q_BxTxNxH, S)
    given = Given(position, num_slots, kernels, with_entropy, interpret)
    windows = () if window is None else (jnp.asarray(window, jnp.int32)[None],)
    kernel = functools.partial(_attention, given=given)
    out_BxTxNxH, *rows = attend_on_shards(kernel, q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, _whole(scale_NxT, 1.0), windows)
    return out_BxTxNxH[:, :T], *(x_BxNxT[..., :T] for x_BxNxT in rows)


def _whole(x: jax.Array, value: float = 0.0) -> jax.Array:
    """Axis 1 in whole groups of 8, as the copy engine takes rows: nobody sees such a key, such a query goes."""
    padding = [(0, -size % 8 if axis == 1 else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, padding, constant_values=value) if x.shape[1] % 8 else x


def tiles(device_kind: str, q_BxTxNxH: jax.Array, S: int) -> Kernels:
    """Those of blocks.json."""
    found = blocks_for("hopper", device_kind, q_BxTxNxH.dtype, q_BxTxNxH.shape[-1], S)
    return Kernels(*(Blocks(*found[name]) for name in Kernels._fields))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, scale_NxT, windows, given: Given) -> tuple[jax.Array, ...]:
    return _forward(q, k, v, scale_NxT, windows, given)[0]


def _forward(q, k, v, scale_NxT, windows, given: Given) -> tuple[tuple, tuple]:
    """Results, and the residuals of the backward pass."""
    (B, T, N, H), S, (Q, K, stages) = q.shape, k.shape[1], given.kernels.forward
    tiles, offset, num_slots = pl.cdiv(T, WARPGROUPS * Q), given.position, given.num_slots
    rows = jax.ShapeDtypeStruct((B, N, tiles * WARPGROUPS * Q), jnp.float32)
    products = _Products(q.dtype, given.interpret)

    def attention_forward(q_g, k_g, v_g, a_g, *refs):
        windowed, refs = _windowed(refs, windows, num_slots)
        out_g, entropy_g, m_g, log_l_g, q_s, rows_s, q_arrived, turn = refs
        wg, n, b = (lax.axis_index(name) for name in ("wg", "n", "b"))
        tile = tiles - 1 - lax.axis_index("tile")  # the longest rows first: the last to start are short
        first = tile * (WARPGROUPS * Q) + wg * Q
        mine = pl.ds(first, Q)
        visited = key_blocks(tile * (WARPGROUPS * Q) + offset, WARPGROUPS * Q, K, S, *windowed)

        def take_turns() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute(pipeline: Callable) -> None:
            plgpu.copy_gmem_to_smem(q_g.at[b, mine, n], q_s.at[wg], q_arrived.at[wg])
            a_Q = _load(a_g.at[n, mine], _ROWS, optimized=False)
            plgpu.barrier_wait(q_arrived.at[wg])
            zeros_QxC = plgpu.layout_cast(jnp.zeros((Q, PART), jnp.float32), _TILE)
            out_QxH = plgpu.layout_cast(jnp.zeros((Q, H), jnp.float32), _TILE)
            lowest_Q = plgpu.layout_cast(jnp.full((Q,), LOWEST, jnp.float32), _ROWS)
            pl.when(wg == 1)(take_turns)
            out_QxH, m_Q, l_QxC, w_QxC, _ = pipeline((out_QxH, lowest_Q, zeros_QxC, zeros_QxC, a_Q))
            pl.when(wg == 0)(take_turns)
            l_Q, w_Q = l_QxC.sum(axis=1), w_QxC.sum(axis=1)
            log_l_Q = _log2(l_Q)
            q_s.at[wg][...] = (out_QxH / _over_rows(l_Q, H)).astype(q.dtype)
            # a rounding of the one product may leave −4e-8 where there is a single key
            rows_s.at[wg, 0][...] = jnp.maximum(LN2 * (log_l_Q - w_Q / l_Q), 0.0)
            rows_s.at[wg, 1][...] = m_Q
            rows_s.at[wg, 2][...] = log_l_Q
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[wg], out_g.at[b, mine, n], commit_group=False)
            for i, ref in enumerate((entropy_g, m_g, log_l_g)):
                plgpu.copy_smem_to_gmem(rows_s.at[wg, i], ref.at[b, n, mine], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        def step(indices, k_s, v_s, k_free, v_free, running):
            j = visited.nth(indices[0])
            out_QxH, m_Q, l_QxC, w_QxC, a_Q = running
            s_QxK = products.of_tiles(q_s.at[wg], k_s, Q, K, take_turns)
            plgpu.barrier_arrive(k_free)

            def whole(s_QxK, m_Q, a_Q):
                m_Q = jnp.maximum(m_Q, s_QxK.max(axis=1) * a_Q)
                return products.scaled(s_QxK, _over_rows(a_Q, K), _over_rows(m_Q, K)), m_Q

            def edge(s_QxK, m_Q, a_Q):
                seen_QxK = _seen(first + offset, j * K, (Q, K), *windowed)
                return whole(jnp.where(seen_QxK, s_QxK, LOWEST), m_Q, a_Q)

            all_seen = _all_seen(first + offset, Q, (j + 1) * K, K, S, *windowed)
            x_QxK, new_m_Q = lax.cond(all_seen, whole, edge, s_QxK, m_Q, a_Q)
            e_QxK = jnp.exp2(x_QxK)
            shift_Q = m_Q - new_m_Q
            decay_Q = jnp.exp2(shift_Q)
            decay_QxC, parts = _over_rows(decay_Q, PART), _parts(e_QxK)
            if given.with_entropy:
                w_QxC = decay_QxC * (w_QxC + l_QxC * _over_rows(shift_Q, PART))
                for e_QxC, x_QxC in zip(parts, _parts(x_QxK), strict=True):
                    w_QxC = w_QxC + e_QxC * x_QxC
            l_QxC = sum(parts, decay_QxC * l_QxC)
            out_QxH = out_QxH * _over_rows(decay_Q, H)
            p_QxK = e_QxK.astype(q.dtype)
            out_QxH, l_QxC, w_QxC, new_m_Q, p_QxK = lax.optimization_barrier((out_QxH, l_QxC, w_QxC, new_m_Q, p_QxK))
            take_turns()
            out_QxH = products.added(out_QxH, p_QxK, v_s)
            plgpu.barrier_arrive(v_free)
            return out_QxH, new_m_Q, l_QxC, w_QxC, a_Q

        specs = [_tile_spec(K, H, q.dtype, lambda i: (visited.nth(i), 0))] * 2
        _pipeline(step, visited.length, stages, compute, specs)(k_g.at[b, :, n], v_g.at[b, :, n])

    out, entropy, m, log_l = plgpu.kernel(
        attention_forward,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), rows, rows, rows),
        scratch_types=[
            _shared((WARPGROUPS, Q, H), q.dtype),
            plgpu.SMEM((WARPGROUPS, 3, Q), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        **_launch(N, tiles, B, given.interpret),
    )(q, k, v, _padded(base2(scale_NxT), rows.shape[-1]), *windows)
    entropy, m, log_l = (x[..., :T] for x in (entropy, m, log_l))
    out, entropy, m, log_l = checkpoint_name((out, entropy, m, log_l), "attention")
    results = out, entropy, LN2 * (m + log_l), LN2 * m
    return results, (q, k, v, scale_NxT, windows, out, entropy, *of_backward(m, log_l, q.dtype))


def _forward_rule(q, k, v, scale_NxT, windows, given: Given) -> tuple[tuple, tuple]:
    arrays, windows = (x.value for x in (q, k, v, scale_NxT)), tuple(x.value for x in windows)
    results, residuals = _forward(*arrays, windows, given)
    has_temperature = () if scale_NxT.perturbed else None  # residuals are arrays; this one's structure speaks
    return results, (*residuals, has_temperature)


def _backward_rule(given: Given, residuals: tuple, cotangents: tuple) -> tuple:
    q, k, v, scale_NxT, windows, out, entropy, m, log_l, has_temperature = residuals
    dout, dentropy, dlse, _ = cotangents
    # what a loss does not use is not in the kernels that it runs
    with_entropy, with_temperature = not isinstance(dentropy, SymbolicZero), has_temperature is not None
    dout, dlse = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in (dout, dlse))
    rows = (m, log_l, dlse, *((entropy, dentropy) if with_entropy else ()))
    dout = dout.astype(q.dtype)
    dq, scaled_dout, c, *made = _dq(q, k, v, scale_NxT, windows, dout, out, rows, with_temperature, given)
    g = made[0] if with_entropy else None
    dk, dv = _dkv(q, k, v, scale_NxT, windows, m, scaled_dout, c, g, given)
    dscale = jnp.sum(made[-1] + dlse * m, axis=0) / base2(scale_NxT) if with_temperature else None
    return dq, dk, dv, dscale, None


def _dq(q, k, v, scale_NxT, windows, dout, out, rows, with_temperature: bool, given: Given) -> tuple:
    """dq; what the other kernel needs of each row: dout/l, c and, with the entropy, g; Σ dS·x with a temperature."""
    (B, T, N, H), S, (Q, K, stages) = q.shape, k.shape[1], given.kernels.dq
    tiles, offset, num_slots, count = pl.cdiv(T, WARPGROUPS * Q), given.position, given.num_slots, len(rows)
    padded, with_entropy, products = tiles * WARPGROUPS * Q, count == 5, _Products(q.dtype, given.interpret)
    made = 1 + with_entropy + with_temperature

    def attention_dq(q_g, k_g, v_g, a_g, dout_g, out_g, *refs):
        windowed, refs = _windowed(refs, windows, num_slots)
        rows_g, (dq_g, scaled_g, *made_g), (q_s, dout_s, out_s, made_s, arrived) = (
            refs[:count], refs[count : count + 2 + made], refs[count + 2 + made :]
        )  # fmt: skip
        wg, n, b = (lax.axis_index(name) for name in ("wg", "n", "b"))
        tile = tiles - 1 - lax.axis_index("tile")
        first = tile * (WARPGROUPS * Q) + wg * Q
        mine = pl.ds(first, Q)
        visited = key_blocks(tile * (WARPGROUPS * Q) + offset, WARPGROUPS * Q, K, S, *windowed)

        def compute(pipeline: Callable) -> None:
            for ref, to in ((q_g, q_s), (dout_g, dout_s), (out_g, out_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, mine, n], to.at[wg], arrived.at[wg])
            a_Q = _load(a_g.at[n, mine], _ROWS, optimized=False)
            m_Q, log_l_Q, dlse_Q, *entropies = (_load(ref.at[b, n, mine], _ROWS, optimized=False) for ref in rows_g)
            plgpu.barrier_wait(arrived.at[wg])
            dout_QxH = _load(dout_s.at[wg], _TILE).astype(jnp.float32)
            out_QxH = _load(out_s.at[wg], _TILE).astype(jnp.float32)
            scale_Q, part_Q = a_Q * LN2, jnp.exp2(-log_l_Q)  # part: 1/l, what makes e a weight
            row_Q, g_Q = dlse_Q - (dout_QxH * out_QxH).sum(axis=1), None
            if entropies:
                entropy_Q, dentropy_Q = entropies
                g_Q = -part_Q * scale_Q * LN2 * dentropy_Q
                c_Q = part_Q * scale_Q * (row_Q - dentropy_Q * entropy_Q) - g_Q * log_l_Q
            else:
                c_Q = part_Q * scale_Q * row_Q
            dout_s.at[wg][...] = (dout_QxH * _over_rows(part_Q, H)).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dout_s.at[wg], scaled_g.at[b, mine, n])
            zeros_QxH = plgpu.layout_cast(jnp.zeros((Q, H), jnp.float32), _TILE)
            g = [g_Q] if entropies else []
            by_scale = [plgpu.layout_cast(jnp.zeros((Q, PART), jnp.float32), _TILE)] * with_temperature
            dq_QxH, by_scale, *_ = pipeline((zeros_QxH, by_scale, a_Q, m_Q, c_Q, g))
            q_s.at[wg][...] = dq_QxH.astype(q.dtype)
            for i, made_Q in enumerate((c_Q, *g, *(total_QxC.sum(axis=1) / scale_Q for total_QxC in by_scale))):
                made_s.at[wg, i][...] = made_Q
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[wg], dq_g.at[b, mine, n], commit_group=False)
            for i, ref in enumerate(made_g):
                plgpu.copy_smem_to_gmem(made_s.at[wg, i], ref.at[b, n, mine], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        def step(indices, k_s, v_s, k_free, v_free, running):
            j = visited.nth(indices[0])
            dq_QxH, by_scale, a_Q, m_Q, c_Q, g_Q = running
            s_QxK = products.of_tiles(q_s.at[wg], k_s, Q, K)
            x_QxK = products.scaled(s_QxK, _over_rows(a_Q, K), _over_rows(m_Q, K))
            x_QxK = lax.cond(
                _all_seen(first + offset, Q, (j + 1) * K, K, S, *windowed),
                lambda x_QxK: x_QxK,
                lambda x_QxK: jnp.where(_seen(first + offset, j * K, (Q, K), *windowed), x_QxK, HIDDEN),
                x_QxK,
            )
            e_QxK = jnp.exp2(x_QxK)
            dp_QxK = products.of_tiles(dout_s.at[wg], v_s, Q, K)
            plgpu.barrier_arrive(v_free)
            row_QxK = _over_rows(c_Q, K)
            if g_Q:
                row_QxK = row_QxK + _over_rows(g_Q[0], K) * x_QxK
            ds_QxK = e_QxK * (dp_QxK * _over_rows(a_Q * LN2, K) + row_QxK)
            # from the largest on, and not q·dq: beside large logits, or in bfloat16, their differences would be lost
            if by_scale:
                for ds_QxC, x_QxC in zip(_parts(ds_QxK), _parts(x_QxK), strict=True):
                    by_scale = [by_scale[0] + ds_QxC * x_QxC]
            dq_QxH = products.added(dq_QxH, ds_QxK.astype(q.dtype), k_s)
            plgpu.barrier_arrive(k_free)
            return dq_QxH, by_scale, a_Q, m_Q, c_Q, g_Q

        specs = [_tile_spec(K, H, q.dtype, lambda i: (visited.nth(i), 0))] * 2
        _pipeline(step, visited.length, stages, compute, specs)(k_g.at[b, :, n], v_g.at[b, :, n])

    row = jax.ShapeDtypeStruct((B, N, padded), jnp.float32)
    dq, scaled_dout, *made_rows = plgpu.kernel(
        attention_dq,
        out_type=(*[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 2, *[row] * made),
        scratch_types=[
            *[_shared((WARPGROUPS, Q, H), q.dtype)] * 3,
            plgpu.SMEM((WARPGROUPS, made, Q), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
        ],
        **_launch(N, tiles, B, given.interpret),
    )(q, k, v, _padded(base2(scale_NxT), padded, 1.0), dout, out, *windows, *(_padded(x, padded) for x in rows))
    return dq, scaled_dout, *(x[..., :T] for x in made_rows)


def _dkv(q, k, v, scale_NxT, windows, m, scaled_dout, c, g, given: Given) -> tuple[jax.Array, jax.Array]:
    """dk and dv; keys before queries, so that no operand of a product is turned."""
    (B, T, N, H), S, (K, Q, stages) = q.shape, k.shape[1], given.kernels.dkv
    tiles, offset, num_slots = pl.cdiv(S, WARPGROUPS * K), given.position, given.num_slots
    with_entropy, products = g is not None, _Products(q.dtype, given.interpret)

    def attention_dkv(q_g, k_g, v_g, dout_g, *refs):
        windowed, (a_g, m_g, c_g, *refs) = _windowed(refs, windows, num_slots)
        g_g, (dk_g, dv_g, k_s, v_s, arrived) = refs[:with_entropy], refs[with_entropy:]
        wg, n, b = (lax.axis_index(name) for name in ("wg", "n", "b"))
        tile = lax.axis_index("tile")
        first = tile * (WARPGROUPS * K) + wg * K
        mine = pl.ds(first, K)
        visited = query_blocks(tile * (WARPGROUPS * K), offset, WARPGROUPS * K, Q, T, *windowed)
        from_end = lambda i: (visited.end - 1 - i,)  # noqa: E731

        def compute(pipeline: Callable) -> None:
            for ref, to in ((k_g, k_s), (v_g, v_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, mine, n], to.at[wg], arrived.at[wg])
            plgpu.barrier_wait(arrived.at[wg])
            zeros_KxH = plgpu.layout_cast(jnp.zeros((K, H), jnp.float32), _TILE)
            dk_KxH, dv_KxH = pipeline((zeros_KxH, zeros_KxH))
            k_s.at[wg][...] = dk_KxH.astype(k.dtype)
            v_s.at[wg][...] = dv_KxH.astype(v.dtype)
            plgpu.commit_smem()
            for shared, ref in ((k_s, dk_g), (v_s, dv_g)):
                plgpu.copy_smem_to_gmem(shared.at[wg], ref.at[b, mine, n], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

        def step(indices, q_s, dout_s, *refs):
            rows_s, (*free, gradients) = refs[: 3 + with_entropy], refs[3 + with_entropy :]
            dk_KxH, dv_KxH = gradients
            start = from_end(*indices)[0] * Q
            s_KxQ = products.of_tiles(k_s.at[wg], q_s, K, Q)
            a_Q, m_Q = (_load(ref, _COLUMNS) for ref in rows_s[:2])
            x_KxQ = products.scaled(s_KxQ, _over_columns(a_Q, K), _over_columns(m_Q, K))
            x_KxQ = lax.cond(
                _all_seen(start + offset, Q, first + K, K, first + K, *windowed),
                lambda x_KxQ: x_KxQ,
                lambda x_KxQ: jnp.where(_seen_by_columns(start + offset, first, (K, Q), *windowed), x_KxQ, HIDDEN),
                x_KxQ,
            )
            dp_KxQ = products.of_tiles(v_s.at[wg], dout_s, K, Q)
            a_Q, c_Q, *g_Q = (_load(ref, _COLUMNS) for ref in (rows_s[0], *rows_s[2:]))  # a again: registers are scarce
            plgpu.commit_smem()  # what was loaded from shared memory may be overwritten only now
            for barrier in free[2:]:
                plgpu.barrier_arrive(barrier)
            row_KxQ = _over_columns(c_Q, K)
            if g_Q:
                row_KxQ = row_KxQ + _over_columns(g_Q[0], K) * x_KxQ
            e_KxQ = jnp.exp2(x_KxQ)
            ds_KxQ = e_KxQ * (dp_KxQ * _over_columns(a_Q * LN2, K) + row_KxQ)
            weights = (e_KxQ.astype(q.dtype), ds_KxQ.astype(q.dtype))
            dv_KxH, dk_KxH = products.both_added((dv_KxH, dk_KxH), weights, (dout_s, q_s))
            for barrier in free[:2]:
                plgpu.barrier_arrive(barrier)
            return dk_KxH, dv_KxH

        specs = [_tile_spec(Q, H, q.dtype, lambda i: (*from_end(i), 0))] * 2
        specs += [plgpu.BlockSpec(block_shape=(Q,), index_map=from_end)] * (3 + with_entropy)
        _pipeline(step, visited.length, stages, compute, specs)(
            q_g.at[b, :, n], dout_g.at[b, :, n], a_g.at[n], *(ref.at[b, n] for ref in (m_g, c_g, *g_g))
        )

    rows = (_padded(x, pl.cdiv(T, Q) * Q) for x in (base2(scale_NxT), m, c, *([g] if with_entropy else [])))
    return plgpu.kernel(
        attention_dkv,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=[
            *[_shared((WARPGROUPS, K, H), k.dtype)] * 2,
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
        ],
        **_launch(N, tiles, B, given.interpret),
    )(q, k, v, scaled_dout, *windows, *rows)


_attention.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


class _Products(NamedTuple):
    """Products of tiles: on the tensor cores, or by jnp where a CPU runs the kernel."""

    dtype: Any
    interpret: Any

    def of_tiles(
        self, x_s: Any, y_s: Any, rows: int, columns: int, after: Callable[[], None] = lambda: None
    ) -> jax.Array:
        """x·yᵀ of two tiles in shared memory; `after` is called between its start and its end."""
        if self.interpret:
            after()
            return _interpreted_dot(x_s[...], y_s[...].T)

        def product(accumulator):
            plgpu.wgmma(accumulator, x_s, y_s.T)
            after()
            return accumulator[...]

        return pl.run_scoped(product, plgpu.ACC((rows, columns), jnp.float32))

    def scaled(self, s: jax.Array, a: jax.Array, m: jax.Array) -> jax.Array:
        """s·a − m, in one rounding: approximate mathematics makes it one instruction."""
        return multiply_add(s, a, -m) if self.interpret else s * a - m

    def added(self, total: jax.Array, x: jax.Array, y_s: Any) -> jax.Array:
        """total + x·y, x in registers."""
        if self.interpret:
            return total + _interpreted_dot(x, y_s[...])
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, x, y_s))(plgpu.ACC.init(total))

    def both_added(self, totals: tuple, xs: tuple, ys_s: tuple) -> tuple[jax.Array, ...]:
        """Two of `added`, waited for together."""
        if self.interpret:
            return tuple(map(self.added, totals, xs, ys_s))

        def both(accumulators):
            for accumulator, x, y_s in zip(accumulators, xs, ys_s, strict=True):
                plgpu.wgmma(accumulator, x, y_s)

        return pl.run_state(both)(tuple(map(plgpu.ACC.init, totals)))


def _interpreted_dot(x: jax.Array, y: jax.Array) -> jax.Array:
    plgpu.commit_smem()  # the tensor cores read shared memory in order with its copies, a load does not
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _pipeline(step: Callable, length: jax.Array, stages: int, compute: Callable, specs: list) -> Callable:
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(length,),
        in_specs=specs,
        max_concurrent_steps=stages,
        num_compute_wgs=WARPGROUPS,
        memory_registers=40,
        wg_axis="wg",
        manual_consumed_barriers=True,
        compute_context=compute,
    )


def _windowed(refs: tuple, windows: tuple, num_slots: int) -> tuple[tuple, tuple]:
    """Window and slots, where there is a window, and the references after it."""
    return (refs[0][0], num_slots) if windows else (), refs[len(windows) :]


def _launch(N: int, tiles: int, B: int, interpret: Any) -> dict[str, Any]:
    """How every kernel is launched: a program for each head, tile and sequence, of three warpgroups."""
    options = dict(interpret=interpret) if interpret else {}
    return dict(
        grid=(N, tiles, B), grid_names=("n", "tile", "b"), num_threads=WARPGROUPS + 1, thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True), **options,
    )  # fmt: skip


def _transforms(H: int, dtype: Any) -> tuple[Any, ...]:
    """How a tile of H columns lies in shared memory, so that the tensor cores read it without conflicts."""
    swizzle = plgpu.find_swizzle(H * jnp.dtype(dtype).itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_transforms(shape[-1], dtype))


def _tile_spec(rows: int, H: int, dtype: Any, index_map: Callable = lambda i: (i, 0)) -> Any:
    return plgpu.BlockSpec(block_shape=(rows, H), index_map=index_map, transforms=_transforms(H, dtype))


def _load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """A tile or a row vector into registers."""
    return plgpu.load(ref, *_ALL_OF_IT, layout=layout, optimized=optimized)


def _parts(x_QxK: jax.Array) -> list[jax.Array]:
    """Columns `PART` by `PART`: running sums of rows stay apart by these, and threads exchange none in the loop."""
    Q, K = x_QxK.shape
    return [lax.slice(x_QxK, (0, i), (Q, i + PART)) for i in range(0, K, PART)]


def _over_rows(x_Q: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(x_Q, (x_Q.shape[0], columns), [0])


def _over_columns(x_Q: jax.Array, rows: int) -> jax.Array:
    return lax.broadcast_in_dim(x_Q, (rows, x_Q.shape[0]), [1])


def _seen(last_key: jax.Array, first_key: jax.Array, shape: tuple[int, int], *windowed: Any) -> jax.Array:
    """Whether a query (row) sees a key (column); the first row sees keys up to `last_key`."""
    rows, columns = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_TILE) for axis in (0, 1))
    return visible(columns + first_key, rows + last_key, *windowed)


def _seen_by_columns(last_key: jax.Array, first_key: jax.Array, shape: tuple[int, int], *windowed: Any) -> jax.Array:
    """Whether a query (column) sees a key (row); the first column sees keys up to `last_key`."""
    rows, columns = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_TILE) for axis in (0, 1))
    return visible(rows + first_key, columns + last_key, *windowed)


def _all_seen(
    last_key: jax.Array, Q: int, end_key: jax.Array, K: int, S: Any, window: Any = None, num_slots: int = 0
) -> jax.Array:
    """Whether each of Q queries sees each of the K keys before `end_key`; the first query sees those to `last_key`."""
    below = end_key <= jnp.minimum(last_key + 1, S)
    return below if window is None else below & (end_key - K + window >= last_key + Q)


def _padded(x: jax.Array, length: int, value: float = 0.0) -> jax.Array:
    """Row statistics up to whole tiles."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=value)


def _log2(x: jax.Array) -> jax.Array:
    return jnp.log(x) * (1 / LN2)
