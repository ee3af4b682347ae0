"""Attention on GPUs from sm_80 on (Pallas, Triton): forward, dq, and dk with dv, the entropy and its gradient inside.

The mathematics and its names stand in the package's docstring. Tiles of logits live in registers; nothing of size T×S
exists, no pass over k or v is added for the entropy, and two runs give the same bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_entropy.attention.blocks import blocks_for
from jax_entropy.attention.dense import visible
from jax_entropy.attention.kernels import (
    HIDDEN,
    LN2,
    LOWEST,
    PART,
    BlockRange,
    attend_on_shards,
    base2,
    key_blocks,
    multiply_add,
    of_backward,
    pack,
    query_blocks,
    unpack,
)
from jax_entropy.sharding import device_kind


class Blocks(NamedTuple):
    """Queries and keys of a tile, warps of a program, and how many loads are on their way while one is used."""

    queries: int
    keys: int
    warps: int
    stages: int


class Kernels(NamedTuple):
    """The tiles of the three kernels."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns out [B, T, N, H] and, in nats, entropy, logsumexp and max logit [B, N, T] of softmax(scale · q·k).

    Args:
      window: keys that a query sees, with the first `num_slots`; blocks outside of both are skipped. None: all.
      kernels: the tiles; None: those of blocks.json for this device.
      with_entropy: False leaves it out of the forward pass, to measure what it costs; what stands for it is not it.
      interpret: run the kernels on the CPU, one by one, instead of compiling them.
    Raises:
      UserError: a head width or a type that there are no tiles for.
    """
    kernels = kernels or tiles(device_kind(), q_BxTxNxH, k_BxSxNxH.shape[1])
    kernel = functools.partial(
        _attention, kernels=kernels, with_entropy=with_entropy, interpret=interpret, num_slots=num_slots
    )
    return attend_on_shards(kernel, q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, pack(position, window))


def tiles(device_kind: str, q_BxTxNxH: jax.Array, S: int) -> Kernels:
    """Those of blocks.json; few queries, as in decoding, need no tile of many."""
    _, T, _, H = q_BxTxNxH.shape
    found = blocks_for("gpu", device_kind, q_BxTxNxH.dtype, H, S)
    most = max(16, pl.next_power_of_2(T))
    sizes = (Blocks(*found[name]) for name in Kernels._fields)
    return Kernels(*(blocks._replace(queries=min(blocks.queries, most)) for blocks in sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attention(
    q, k, v, scale_NxT, at, kernels: Kernels, with_entropy: bool, interpret: bool, num_slots: int
) -> tuple[jax.Array, ...]:
    return _forward(q, k, v, scale_NxT, at, kernels, with_entropy, interpret, num_slots)[0]


def _forward(
    q, k, v, scale_NxT, at, kernels: Kernels, with_entropy: bool, interpret: bool, num_slots: int
) -> tuple[tuple, tuple]:
    """Results, and the residuals of the backward pass; `at`: position and window."""
    (B, T, N, H), S, blocks = q.shape, k.shape[1], kernels.forward
    tiles = pl.cdiv(T, blocks.queries)
    kernel = functools.partial(
        _forward_kernel, blocks=blocks, shape=(T, S, H), num_slots=num_slots, with_entropy=with_entropy,
        interpret=interpret,
    )  # fmt: skip
    rows = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    out, entropy, m, log_l = pl.pallas_call(
        kernel,
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), rows, rows, rows),
        grid=(tiles, N, B),
        in_specs=[_positions(T, H), _positions(S, H), _positions(S, H), _by_head(T), _scalars(at)],
        out_specs=[_positions(T, H), *[_rows(T)] * 3],
        interpret=interpret,
        name="attention_forward",
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
    )(q, k, v, base2(scale_NxT), at)
    out, entropy, m, log_l = checkpoint_name((out, entropy, m, log_l), "attention")
    results = out, entropy, LN2 * (m + log_l), LN2 * m
    return results, (q, k, v, scale_NxT, at, out, entropy, *of_backward(m, log_l, q.dtype))


def _forward_kernel(
    q_ref, k_ref, v_ref, a_ref, at_ref, out_ref, entropy_ref, m_ref, log_l_ref, *, blocks, shape, num_slots,
    with_entropy, interpret,
) -> None:  # fmt: skip
    (T, S, H), (Q, K, *_) = shape, blocks
    W = _width(H)
    fma, fms, exp2 = _arithmetic(interpret)
    tile = pl.num_programs(0) - 1 - pl.program_id(0)  # the longest rows first: the last to start are short
    position, windowed = unpack(at_ref, num_slots)
    first, last_key_Q = tile * Q, tile * Q + position + jnp.arange(Q, dtype=jnp.int32)
    q_QxH = _load(q_ref, first, Q, T, H, T % Q > 0)
    a_Q = _load_rows(a_ref, first, Q, T, 1.0)

    def block(j, running, *, masked: bool):
        out_QxH, m_Q, l_QxC, w_QxC = running
        k_KxH = _load(k_ref, j * K, K, S, H, masked and S % K > 0)
        v_KxH = _load(v_ref, j * K, K, S, H, masked and S % K > 0)
        s_QxK = _dot(q_QxH, k_KxH, ((1,), (1,)))
        if masked:
            seen_QxK = visible((j * K + jnp.arange(K, dtype=jnp.int32))[None, :], last_key_Q[:, None], *windowed)
            s_QxK = jnp.where(seen_QxK, s_QxK, LOWEST)
        new_m_Q = jnp.maximum(m_Q, jnp.max(s_QxK, axis=1) * a_Q)
        x_QxK = fms(s_QxK, a_Q[:, None], new_m_Q[:, None])
        e_QxK = exp2(x_QxK)
        shift_Qx1 = (m_Q - new_m_Q)[:, None]
        decay_Qx1 = exp2(shift_Qx1)
        parts = _parts(e_QxK)
        if with_entropy:
            w_QxC = decay_Qx1 * fma(l_QxC, shift_Qx1, w_QxC)
            for e_QxC, x_QxC in zip(parts, _parts(x_QxK), strict=True):
                w_QxC = fma(e_QxC, x_QxC, w_QxC)
        l_QxC = sum(parts, decay_Qx1 * l_QxC)
        out_QxH = out_QxH * decay_Qx1 + _dot(e_QxK.astype(v_KxH.dtype), v_KxH, ((1,), (0,)))
        return out_QxH, new_m_Q, l_QxC, w_QxC

    zeros_QxC = jnp.zeros((Q, PART), jnp.float32)
    running = (jnp.zeros((Q, W), jnp.float32), jnp.full((Q,), LOWEST, jnp.float32), zeros_QxC, zeros_QxC)
    out_QxH, m_Q, l_QxC, w_QxC = _over(key_blocks(first + position, Q, K, S, *windowed), block, running)
    l_Q, w_Q = jnp.sum(l_QxC, axis=1), jnp.sum(w_QxC, axis=1)
    log_l_Q = jnp.log2(l_Q)
    _store(out_ref, first, Q, T, H, out_QxH / l_Q[:, None])
    # a rounding of the one product may leave −4e-8 where there is a single key
    _store_rows(entropy_ref, first, Q, T, jnp.maximum(LN2 * (log_l_Q - w_Q / l_Q), 0.0))
    _store_rows(m_ref, first, Q, T, m_Q)
    _store_rows(log_l_ref, first, Q, T, log_l_Q)


def _forward_rule(
    q, k, v, scale_NxT, at, kernels: Kernels, with_entropy: bool, interpret: bool, num_slots: int
) -> tuple[tuple, tuple]:
    arrays = (x.value for x in (q, k, v, scale_NxT, at))
    results, residuals = _forward(*arrays, kernels, with_entropy, interpret, num_slots)
    has_temperature = () if scale_NxT.perturbed else None  # residuals are arrays; this one's structure speaks
    return results, (*residuals, has_temperature)


def _backward_rule(
    kernels: Kernels, _: bool, interpret: bool, num_slots: int, residuals: tuple, cotangents: tuple
) -> tuple:
    q, k, v, scale_NxT, at, out, entropy, m, log_l, has_temperature = residuals
    (B, T, N, H), S = q.shape, k.shape[1]
    dout, dentropy, dlse, _ = cotangents
    # what a loss does not use is not in the kernels that it runs
    with_entropy, with_temperature = not isinstance(dentropy, SymbolicZero), has_temperature is not None
    dout, dlse = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in (dout, dlse))
    rows, a_NxT = jax.ShapeDtypeStruct((B, N, T), jnp.float32), base2(scale_NxT)
    params = lambda blocks: plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)  # noqa: E731
    entropies = (entropy, dentropy) if with_entropy else ()

    uses = dict(shape=(T, S, H), num_slots=num_slots, with_entropy=with_entropy, interpret=interpret)
    dq, scaled_dout, c, *made = pl.pallas_call(
        functools.partial(_dq_kernel, blocks=kernels.dq, with_temperature=with_temperature, **uses),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(dout.shape, q.dtype))
        + (rows,) * (1 + with_entropy + with_temperature),
        grid=(pl.cdiv(T, kernels.dq.queries), N, B),
        in_specs=[
            _positions(T, H),
            _positions(S, H),
            _positions(S, H),
            _by_head(T),
            _scalars(at),
            *[_positions(T, H)] * 2,
        ]
        + [_rows(T)] * (3 + 2 * with_entropy),
        out_specs=[*[_positions(T, H)] * 2, *[_rows(T)] * (1 + with_entropy + with_temperature)],
        interpret=interpret,
        name="attention_dq",
        compiler_params=params(kernels.dq),
    )(q, k, v, a_NxT, at, dout, out, m, log_l, dlse, *entropies)
    g = made[:with_entropy]

    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, blocks=kernels.dkv, **uses),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(pl.cdiv(S, kernels.dkv.keys), N, B),
        in_specs=[_positions(T, H), _positions(S, H), _positions(S, H), _by_head(T), _scalars(at), _positions(T, H)]
        + [_rows(T)] * (2 + with_entropy),
        out_specs=[_positions(S, H)] * 2,
        interpret=interpret,
        name="attention_dkv",
        compiler_params=params(kernels.dkv),
    )(q, k, v, a_NxT, at, scaled_dout, m, c, *g)
    dscale = jnp.sum(made[-1] + dlse * m, axis=0) / a_NxT if with_temperature else None
    return dq, dk, dv, dscale, None


def _dq_kernel(
    q_ref, k_ref, v_ref, a_ref, at_ref, dout_ref, out_ref, m_ref, log_l_ref, dlse_ref, *refs, blocks, shape, num_slots,
    with_entropy, with_temperature, interpret,
) -> None:  # fmt: skip
    """dq by rows of tiles; what the other kernel needs of each row: dout/l, c, g; and Σ dS·x for the temperature."""
    entropy_refs, (dq_ref, scaled_dout_ref, *made_refs) = refs[: 2 * with_entropy], refs[2 * with_entropy :]
    (T, S, H), (Q, K, *_) = shape, blocks
    fma, fms, exp2 = _arithmetic(interpret)
    tile, (position, windowed) = pl.num_programs(0) - 1 - pl.program_id(0), unpack(at_ref, num_slots)
    first, last_key_Q = tile * Q, tile * Q + position + jnp.arange(Q, dtype=jnp.int32)
    ragged = T % Q > 0
    q_QxH, dout_QxH, out_QxH = (_load(ref, first, Q, T, H, ragged) for ref in (q_ref, dout_ref, out_ref))
    a_Q = _load_rows(a_ref, first, Q, T, 1.0)
    m_Q, log_l_Q, dlse_Q = (_load_rows(ref, first, Q, T, 0.0) for ref in (m_ref, log_l_ref, dlse_ref))
    scale_Q, part_Q = a_Q * LN2, jnp.exp2(-log_l_Q)  # part: 1/l, what makes e a weight
    row_Q = dlse_Q - jnp.sum(dout_QxH.astype(jnp.float32) * out_QxH.astype(jnp.float32), axis=1)
    g_Q = None
    if with_entropy:
        entropy_Q, dentropy_Q = (_load_rows(ref, first, Q, T, 0.0) for ref in entropy_refs)
        g_Q = -part_Q * scale_Q * LN2 * dentropy_Q
        c_Q = part_Q * scale_Q * (row_Q - dentropy_Q * entropy_Q) - g_Q * log_l_Q
    else:
        c_Q = part_Q * scale_Q * row_Q
    scaled_dout_QxH = (dout_QxH * part_Q[:, None]).astype(q_QxH.dtype)

    def block(j, running, *, masked: bool):
        dq_QxH, *by_scale_QxC = running
        k_KxH = _load(k_ref, j * K, K, S, H, masked and S % K > 0)
        v_KxH = _load(v_ref, j * K, K, S, H, masked and S % K > 0)
        x_QxK = fms(_dot(q_QxH, k_KxH, ((1,), (1,))), a_Q[:, None], m_Q[:, None])
        if masked:
            seen_QxK = visible((j * K + jnp.arange(K, dtype=jnp.int32))[None, :], last_key_Q[:, None], *windowed)
            x_QxK = jnp.where(seen_QxK, x_QxK, HIDDEN)
        e_QxK = exp2(x_QxK)
        row_QxK = fma(x_QxK, g_Q[:, None], c_Q[:, None]) if with_entropy else c_Q[:, None]
        ds_QxK = e_QxK * fma(_dot(scaled_dout_QxH, v_KxH, ((1,), (1,))), scale_Q[:, None], row_QxK)
        # from the largest on, and not q·dq: beside large logits, or in bfloat16, their differences would be lost
        if with_temperature:
            for ds_QxC, x_QxC in zip(_parts(ds_QxK), _parts(x_QxK), strict=True):
                by_scale_QxC = [fma(ds_QxC, x_QxC, *by_scale_QxC)]
        return dq_QxH + _dot(ds_QxK.astype(k_KxH.dtype), k_KxH, ((1,), (0,))), *by_scale_QxC

    running = (jnp.zeros((Q, _width(H)), jnp.float32), *[jnp.zeros((Q, PART), jnp.float32)] * with_temperature)
    dq_QxH, *by_scale_QxC = _over(key_blocks(first + position, Q, K, S, *windowed), block, running)
    _store(dq_ref, first, Q, T, H, dq_QxH)
    _store(scaled_dout_ref, first, Q, T, H, scaled_dout_QxH)
    made = (
        c_Q,
        *([g_Q] if with_entropy else []),
        *(jnp.sum(total_QxC, axis=1) / scale_Q for total_QxC in by_scale_QxC),
    )
    for ref, made_Q in zip(made_refs, made, strict=True):
        _store_rows(ref, first, Q, T, made_Q)


def _dkv_kernel(
    q_ref, k_ref, v_ref, a_ref, at_ref, scaled_dout_ref, m_ref, c_ref, *refs, blocks, shape, num_slots, with_entropy,
    interpret,
) -> None:  # fmt: skip
    """dk and dv by columns of tiles; keys before queries, so that no operand of a product is turned."""
    g_refs, (dk_ref, dv_ref) = refs[:with_entropy], refs[with_entropy:]
    (T, S, H), (Q, K, *_) = shape, blocks
    fma, fms, exp2 = _arithmetic(interpret)
    (position, windowed), first = unpack(at_ref, num_slots), pl.program_id(0) * K
    keys = first + jnp.arange(K, dtype=jnp.int32)
    k_KxH, v_KxH = (_load(ref, first, K, S, H, S % K > 0) for ref in (k_ref, v_ref))
    zeros_KxH = jnp.zeros((K, _width(H)), jnp.float32)

    def block(i, gradients, *, masked: bool):
        dk_KxH, dv_KxH = gradients
        start = i * Q
        q_QxH, dout_QxH = (_load(ref, start, Q, T, H, T % Q > 0) for ref in (q_ref, scaled_dout_ref))
        a_Q, m_Q = _load_rows(a_ref, start, Q, T, 0.0), _load_rows(m_ref, start, Q, T, 0.0)
        x_KxQ = fms(_dot(k_KxH, q_QxH, ((1,), (1,))), a_Q[None, :], m_Q[None, :])
        if masked:
            last_key_Q = start + position + jnp.arange(Q, dtype=jnp.int32)
            x_KxQ = jnp.where(visible(keys[:, None], last_key_Q[None, :], *windowed), x_KxQ, HIDDEN)
        e_KxQ = exp2(x_KxQ)
        dv_KxH += _dot(e_KxQ.astype(dout_QxH.dtype), dout_QxH, ((1,), (0,)))
        row_KxQ = _load_rows(c_ref, start, Q, T, 0.0)[None, :]
        if with_entropy:
            row_KxQ = fma(x_KxQ, _load_rows(g_refs[0], start, Q, T, 0.0)[None, :], row_KxQ)
        ds_KxQ = e_KxQ * fma(_dot(v_KxH, dout_QxH, ((1,), (1,))), (a_Q * LN2)[None, :], row_KxQ)
        dk_KxH += _dot(ds_KxQ.astype(q_QxH.dtype), q_QxH, ((1,), (0,)))
        return dk_KxH, dv_KxH

    gradients = _over(query_blocks(first, position, K, Q, T, *windowed), block, (zeros_KxH, zeros_KxH))
    for ref, gradient_KxH in zip((dk_ref, dv_ref), gradients, strict=True):
        _store(ref, first, K, S, H, gradient_KxH)


_attention.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _over(visited: BlockRange, block: Any, running: Any) -> Any:
    """Of a window both edges are in one loop, after what is seen whole: a third loop would spill registers."""
    runs = visited.runs()
    if len(runs) < 3:
        for begin, end, masked in runs:
            running = lax.fori_loop(begin, end, functools.partial(block, masked=masked), running)
        return running
    running = lax.fori_loop(visited.whole, visited.edge, functools.partial(block, masked=False), running)
    count = sum(end - begin for begin, end, masked in runs if masked)
    return lax.fori_loop(0, count, lambda i, running: block(visited.nth_masked(i), running, masked=True), running)


def _positions(length: int, H: int) -> pl.BlockSpec:
    """[B, length, N, H] as one sequence and head sees it."""
    return pl.BlockSpec((None, length, None, H), lambda i, n, b: (b, 0, n, 0))


def _rows(T: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))


def _by_head(T: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, T), lambda i, n, b: (n, 0))


def _scalars(at: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(at.shape, lambda i, n, b: (0,))


def _width(H: int) -> int:
    """Columns of a tile: the head's, up to a power of 2 that the tensor cores take."""
    return max(16, pl.next_power_of_2(H))


def _load(ref, first, count: int, length: int, H: int, ragged: bool) -> jax.Array:
    """`count` positions from `first` on, [count, W]; zeros where the array ends."""
    W = _width(H)
    mask = (first + jnp.arange(count, dtype=jnp.int32) < length)[:, None] if ragged else None
    if W > H:
        columns = (jnp.arange(W, dtype=jnp.int32) < H)[None, :]
        mask = columns & jnp.ones((count, 1), bool) if mask is None else mask & columns
    elif mask is not None:
        mask = mask & jnp.ones((1, W), bool)
    return plt.load(ref.at[pl.ds(first, count), pl.ds(0, W)], mask=mask, other=None if mask is None else 0.0)


def _store(ref, first, count: int, length: int, H: int, value: jax.Array) -> None:
    W, rows = _width(H), first + jnp.arange(count, dtype=jnp.int32)
    mask = (rows < length)[:, None] & (jnp.arange(W, dtype=jnp.int32) < H)[None, :]
    whole = length % count == 0 and W == H
    plt.store(ref.at[pl.ds(first, count), pl.ds(0, W)], value.astype(ref.dtype), mask=None if whole else mask)


def _load_rows(ref, first, count: int, length: int, other: float) -> jax.Array:
    mask = first + jnp.arange(count, dtype=jnp.int32) < length if length % count else None
    return plt.load(ref.at[pl.ds(first, count)], mask=mask, other=None if mask is None else other)


def _store_rows(ref, first, count: int, length: int, value: jax.Array) -> None:
    mask = first + jnp.arange(count, dtype=jnp.int32) < length if length % count else None
    plt.store(ref.at[pl.ds(first, count)], value, mask=mask)


def _parts(x_QxK: jax.Array) -> list[jax.Array]:
    """Columns `PART` by `PART`.

    Running sums of a row stay apart by these to the end: in a thread's registers one multiply-add for an element, where
    the sum of each tile's products would be a multiplication, an addition, and the exchange between threads.
    """
    return jnp.split(x_QxK, x_QxK.shape[1] // PART, axis=1)


def _dot(x: jax.Array, y: jax.Array, contracted: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """float32 sums of products; of float32 factors in true float32, not in the tensor cores' shorter one."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _arithmetic(interpret: bool) -> tuple[Any, Any, Any]:
    """x·y + z and x·y − z in one rounding, and 2ˣ: one instruction each, where Triton would write two and four."""
    if interpret:
        return multiply_add, lambda x, y, z: multiply_add(x, y, -z), jnp.exp2
    instructions = (
        "fma.rn.f32 $0, $1, $2, $3;",
        "{ .reg .f32 minus; neg.f32 minus, $3; fma.rn.f32 $0, $1, $2, minus; }",  # the assembler makes it one
        "ex2.approx.ftz.f32 $0, $1;",
    )
    return tuple(functools.partial(_ptx, instruction) for instruction in instructions)


def _ptx(instruction: str, *xs: jax.Array) -> jax.Array:
    shape = jnp.broadcast_shapes(*(x.shape for x in xs))
    (result,) = plt.elementwise_inline_asm(
        instruction,
        args=[jnp.broadcast_to(x, shape) for x in xs],
        constraints="=f" + ",f" * len(xs),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return result
