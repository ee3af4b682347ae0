"""Causal attention under secure computation, of a whole prompt and of one token to the caches, as stages.

Masked scores never reach the exponential: in the triangle's tiles only the diagonal ones have any.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_entropy.private.program.blueprint import Blueprint
from jax_entropy.private.program.stage import PAST, POSITION, Stage


def _tempered(blueprint: Blueprint, layer: int, rows: Callable[..., jax.Array]) -> list[Stage]:
    """Queries times their constants 1/(t·√H), where these are not in the kernel already."""
    factor = blueprint.present(f"{layer}.inverse_temperature")
    function = lambda q_TxNxH, c_NxS, *at: q_TxNxH * rows(c_NxS, *at).T[:, :, None]  # noqa: E731
    at = () if isinstance(rows, _Rows) else (POSITION,)
    return [Stage("temperature", layer, function, (f"{layer}.q", *factor, *at), (f"{layer}.q",))] if factor else []


class _Rows(NamedTuple):
    """The first columns of a [N, S] array."""

    count: int

    def __call__(self, values_NxS: jax.Array) -> jax.Array:
        return values_NxS[:, : self.count]


def _column(values_NxS: jax.Array, position: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(values_NxS, position, 1, axis=1)


def _divisor(blueprint: Blueprint, temperature_NxT: jax.Array | None) -> jax.Array | float:
    """What scores are divided by where nothing is folded."""
    root = math.sqrt(blueprint.config.head_dim)
    return root if temperature_NxT is None else temperature_NxT[..., None] * root


def attention(blueprint: Blueprint, layer: int, num_tokens: int) -> list[Stage]:
    """Queries, keys and values of a whole prompt → `mixed` [T, D]."""
    """Queries, keys and values of a whole prompt → `mixed` [T, D]."""
    q, k, v = (f"{layer}.{name}" for name in "qkv")
    divided = blueprint.present(f"{layer}.temperature")
    rows = _Rows(num_tokens)

    def scores(q_TxNxH: jax.Array, k_TxNxH: jax.Array, *temperature_NxS: jax.Array) -> jax.Array:
        scores_NxTxT = jnp.einsum("TNH,SNH->NTS", q_TxNxH, k_TxNxH)
        if blueprint.rewrites.temperature:
            return scores_NxTxT
        return scores_NxTxT / _divisor(blueprint, rows(*temperature_NxS) if temperature_NxS else None)

    return [
        *_tempered(blueprint, layer, rows),
        Stage("scores", layer, scores, (q, k, *divided), ("scores",)),
        *_softmax(blueprint, layer, functools.partial(_causal_weights, blueprint)),
        _mix(blueprint, layer, v, "NTS,SNH->TNH"),
    ]


def _softmax(blueprint: Blueprint, layer: int, exponentials: Callable, *extra: str) -> list[Stage]:
    """scores → weights, or unnormalised ones and the reciprocals of their sums."""
    config = blueprint.config
    cap = lambda scores_NxTxS: config.logit_cap * jnp.tanh(scores_NxTxS / config.logit_cap)  # noqa: E731
    capped = [Stage("soft cap", layer, cap, ("scores",), ("scores",))] if config.logit_cap else []

    def function(*arrays: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        weights, total = exponentials(*arrays)
        return (weights, 1 / total) if blueprint.rewrites.denominator else weights / total[..., None]

    outputs = ("weights", "reciprocal") if blueprint.rewrites.denominator else ("weights",)
    kind = "power softmax" if config.power else "softmax"
    return [*capped, Stage(kind, layer, function, ("scores", *extra), outputs)]


def _mix(blueprint: Blueprint, layer: int, values: str, equation: str) -> Stage:
    def function(weights_NxTxS: jax.Array, v_SxNxH: jax.Array, *reciprocal_NxT: jax.Array) -> jax.Array:
        out_TxNxH = jnp.einsum(equation, weights_NxTxS, v_SxNxH)
        for factor_NxT in reciprocal_NxT:
            out_TxNxH = out_TxNxH * factor_NxT.T[..., None]
        return out_TxNxH.reshape(-1, blueprint.config.model_dim)

    reciprocal = ("reciprocal",) if blueprint.rewrites.denominator else ()
    return Stage("mix", layer, function, ("weights", values, *reciprocal), ("mixed",))


def _power(scores: jax.Array, exponent: int) -> jax.Array:
    """(1 + score)^p of power softmax by squarings; the scores are divided by the shift already."""
    square, product = 1 + scores, None
    while exponent:
        if exponent % 2:
            product = square if product is None else product * square
        if exponent := exponent // 2:
            square = jnp.square(square)
    return product


def _causal_weights(blueprint: Blueprint, scores_NxTxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(score − row maximum), or a power, under the causal mask [N, T, T], and its row sums [N, T].

    Masked scores are replaced by their row's diagonal one, so that the exponential never sees a large negative number.
    """
    N, T, _ = scores_NxTxT.shape
    tile = tile_edge(T) if blueprint.rewrites.packed else T
    n = T // tile
    seen = jnp.tril(jnp.ones((tile, tile)))[None, None]
    tiles = [(i, j) for i in range(n) for j in range(i + 1)]
    index = {pair: place for place, pair in enumerate(tiles)}
    cut = lambda i, j: scores_NxTxT[:, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]  # noqa: E731
    on_NxIxQxK = jnp.stack([cut(i, i) for i in range(n)], axis=1)
    diagonal_NxIxQx1 = (on_NxIxQxK * jnp.eye(tile)[None, None]).sum(-1, keepdims=True)
    on_NxIxQxK = on_NxIxQxK * seen + diagonal_NxIxQx1 * (1 - seen)
    stack_NxPxQxK = jnp.stack([on_NxIxQxK[:, i] if i == j else cut(i, j) for i, j in tiles], axis=1)
    if blueprint.config.power:
        e_NxPxQxK = _power(stack_NxPxQxK, blueprint.config.power)
    else:
        largest_NxPxQ = stack_NxPxQxK.max(-1)
        # rows of the triangle are filled up with their last tile, so that one maximum serves them all
        rows_NxIxJxQ = jnp.stack(
            [jnp.stack([largest_NxPxQ[:, index[i, min(i, j)]] for j in range(n)], axis=1) for i in range(n)], axis=1
        )
        row_NxIxQ = rows_NxIxJxQ.max(2)
        below_NxPxQ = jnp.stack([row_NxIxQ[:, i] for i, _ in tiles], axis=1)
        e_NxPxQxK = jnp.exp(stack_NxPxQxK - below_NxPxQ[..., None])
    visible_1xPxQxK = jnp.stack([seen[0, 0] if i == j else jnp.ones((tile, tile)) for i, j in tiles])[None]
    e_NxPxQxK = e_NxPxQxK * visible_1xPxQxK
    sums_NxPxQ = e_NxPxQxK.sum(-1)
    total_NxT = jnp.concatenate([sum(sums_NxPxQ[:, index[i, j]] for j in range(i + 1)) for i in range(n)], axis=-1)
    empty = jnp.zeros((N, tile, tile))
    square = [
        jnp.concatenate([e_NxPxQxK[:, index[i, j]] if j <= i else empty for j in range(n)], axis=-1) for i in range(n)
    ]
    return jnp.concatenate(square, axis=1), total_NxT


def tile_edge(num_tokens: int) -> int:
    """Edge of a tile: eight of them a side where that divides, and no smaller than 4."""
    return next((num_tokens // n for n in (8, 4, 2) if num_tokens % n == 0 and num_tokens // n >= 4), num_tokens)


def cached_attention(blueprint: Blueprint, layer: int) -> list[Stage]:
    """As `attention`, for one token at `position`, whose key and value are written into the caches before."""
    """As `attention`, for one token at `position`, whose key and value are written into the caches before."""
    q, k, v = (f"{layer}.{name}" for name in "qkv")
    divided = blueprint.present(f"{layer}.temperature")

    def scores(q_1xNxH: jax.Array, k_SxNxH: jax.Array, *temperature: jax.Array) -> jax.Array:
        if blueprint.rewrites.one_dot:
            scores_SxN = k_SxNxH.reshape(blueprint.config.context_length, -1) @ _block_diagonal(q_1xNxH[0])
            scores_Nx1xS = scores_SxN.T[:, None]
        else:
            scores_Nx1xS = jnp.einsum("TNH,SNH->NTS", q_1xNxH, k_SxNxH)
        if blueprint.rewrites.temperature:
            return scores_Nx1xS
        return scores_Nx1xS / _divisor(blueprint, _column(*temperature) if temperature else None)

    def exponentials(scores_Nx1xS: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen_1x1xS = (jnp.arange(blueprint.config.context_length) <= position).astype(jnp.float32)[None, None]
        own_Nx1x1 = jax.lax.dynamic_slice_in_dim(scores_Nx1xS, position, 1, axis=2)
        scores_Nx1xS = scores_Nx1xS * seen_1x1xS + own_Nx1x1 * (1 - seen_1x1xS)
        if blueprint.config.power:
            e_Nx1xS = _power(scores_Nx1xS, blueprint.config.power)
        else:
            e_Nx1xS = jnp.exp(scores_Nx1xS - scores_Nx1xS.max(-1, keepdims=True))
        e_Nx1xS = e_Nx1xS * seen_1x1xS
        return e_Nx1xS, e_Nx1xS.sum(-1)

    def write(cache_SxNxH: jax.Array, new_1xNxH: jax.Array, position: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cache_SxNxH, new_1xNxH, position, axis=0)

    return [
        *_tempered(blueprint, layer, _column),
        # the projections wrote the new key and value over the names of the cache, which came in as past
        *(Stage("cache", layer, write, (name + PAST, name, POSITION), (name,)) for name in (k, v)),
        Stage("scores", layer, scores, (q, k, *divided, *((POSITION,) if divided else ())), ("scores",)),
        *_softmax(blueprint, layer, exponentials, POSITION),
        _cached_mix(blueprint, layer, v) if blueprint.rewrites.one_dot else _mix(blueprint, layer, v, "NTS,SNH->TNH"),
    ]


def _block_diagonal(q_NxH: jax.Array) -> jax.Array:
    """[N·H, N] with one head's query in each column; its zeros are public and cost nothing to make."""
    N, H = q_NxH.shape
    return (jnp.eye(N)[:, None] * q_NxH[:, :, None]).reshape(N * H, N)


def _cached_mix(blueprint: Blueprint, layer: int, values: str) -> Stage:
    def function(weights_Nx1xS: jax.Array, v_SxNxH: jax.Array, *reciprocal_Nx1: jax.Array) -> jax.Array:
        N, H = blueprint.config.num_heads, blueprint.config.head_dim
        out_NxNxH = (weights_Nx1xS[:, 0] @ v_SxNxH.reshape(-1, N * H)).reshape(N, N, H)
        out_NxH = jnp.stack([out_NxNxH[head, head] for head in range(N)])
        for factor_Nx1 in reciprocal_Nx1:
            out_NxH = out_NxH * factor_Nx1
        return out_NxH.reshape(1, blueprint.config.model_dim)

    reciprocal = ("reciprocal",) if blueprint.rewrites.denominator else ()
    return Stage("mix", layer, function, ("weights", values, *reciprocal), ("mixed",))
