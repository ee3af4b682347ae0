"""Causal attention under secure computation, of a whole prompt and of one query to many keys, as stages.

Masked scores never reach the exponential: in the triangle's tiles only the diagonal ones have any.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_entropy.private.program.blueprint import Blueprint
from jax_entropy.private.program.nonlinear import at_once, bent, halvings, largest, reciprocal
from jax_entropy.private.program.stage import PAST, POSITION, Stage


def _tempered(blueprint: Blueprint, layer: int, rows: Callable[..., jax.Array], *at: str) -> list[Stage]:
    """Queries times their constants 1/(t·√H), where these are not in the kernel already."""
    factor = blueprint.present(f"{layer}.inverse_temperature")
    function = lambda q_TxNxH, c_NxS, *at: q_TxNxH * rows(c_NxS, *at).T[:, :, None]  # noqa: E731
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
    q, k, v = (f"{layer}.{name}" for name in "qkv")
    divided = blueprint.present(f"{layer}.temperature")
    rows, together = _Rows(num_tokens), blueprint.heads_at_once

    def scores(q_TxNxH: jax.Array, k_TxNxH: jax.Array, *temperature_NxS: jax.Array) -> jax.Array:
        scores_NxTxT = _product(_of_heads(q_TxNxH, together), _apart(k_TxNxH, together).swapaxes(1, 2), together)
        if blueprint.rewrites.temperature:
            return scores_NxTxT
        return scores_NxTxT / _divisor(blueprint, rows(*temperature_NxS) if temperature_NxS else None)

    def mix(weights_NxTxS: jax.Array, v_SxNxH: jax.Array) -> jax.Array:
        N, T, _ = weights_NxTxS.shape
        weights_GxTxgS = weights_NxTxS.reshape(N // together, together, T, -1).swapaxes(1, 2)
        weights_GxTxgS = weights_GxTxgS.reshape(N // together, T, -1)
        return _product(weights_GxTxgS, _apart(v_SxNxH, together), together).swapaxes(0, 1)

    return [
        *_tempered(blueprint, layer, rows),
        Stage("scores", layer, scores, (q, k, *divided), ("scores",)),
        *_softmax(blueprint, layer, functools.partial(_causal_weights, blueprint)),
        _mixed(blueprint, layer, v, mix),
    ]


def _of_heads(x_TxNxH: jax.Array, together: int) -> jax.Array:
    """[G, T, g·H]: so many heads side by side."""
    T, N, H = x_TxNxH.shape
    return x_TxNxH.reshape(T, N // together, together * H).swapaxes(0, 1)


def _apart(x_SxNxH: jax.Array, together: int) -> jax.Array:
    """[G, g·S, g·H]: each head's block on a diagonal, so that one product serves g heads."""
    S, N, H = x_SxNxH.shape
    x_GxgxSxH = x_SxNxH.transpose(1, 0, 2).reshape(N // together, together, S, H)
    own_1xgx1xgx1 = jnp.eye(together, dtype=bool)[None, :, None, :, None]
    blocks_GxgxSxgxH = jnp.where(own_1xgx1xgx1, x_GxgxSxH[:, :, :, None], 0.0)
    return blocks_GxgxSxgxH.reshape(N // together, together * S, together * H)


def _product(left_GxTxI: jax.Array, right_GxIxgO: jax.Array, together: int) -> jax.Array:
    """[N, T, O], a product for each group of heads."""
    G, T, _ = left_GxTxI.shape
    out_GxTxgO = left_GxTxI @ right_GxIxgO if G > 1 else (left_GxTxI[0] @ right_GxIxgO[0])[None]
    return out_GxTxgO.reshape(G, T, together, -1).swapaxes(1, 2).reshape(G * together, T, -1)


def _softmax(blueprint: Blueprint, layer: int, exponentials: Callable, *extra: str) -> list[Stage]:
    """scores → weights, or unnormalised ones and the reciprocals of their sums."""
    config = blueprint.config
    cap = lambda scores_NxTxS: config.logit_cap * jnp.tanh(scores_NxTxS / config.logit_cap)  # noqa: E731
    capped = [Stage("soft cap", layer, cap, ("scores",), ("scores",))] if config.logit_cap else []
    bounded = blueprint.rewrites.reciprocal and not config.power  # the sum, between 1 and the number of keys

    def function(*arrays: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        weights, total = exponentials(*arrays)
        if not blueprint.rewrites.denominator:
            return weights / total[..., None]
        return weights, reciprocal(total, weights.shape[-1]) if bounded else 1 / total

    outputs = ("weights", "reciprocal") if blueprint.rewrites.denominator else ("weights",)
    kind = "power softmax" if config.power else "softmax"
    return [*capped, Stage(kind, layer, function, ("scores", *extra), outputs)]


def _exp(blueprint: Blueprint, x: jax.Array) -> jax.Array:
    return jnp.exp(bent(x, squarings=blueprint.squarings) if blueprint.squarings else x)


def _power(scores: jax.Array, exponent: int) -> jax.Array:
    """(1 + score)^p of power softmax by squarings; the scores are divided by the shift already."""
    square, product = 1 + scores, None
    while exponent:
        if exponent % 2:
            product = square if product is None else product * square
        if exponent := exponent // 2:
            square = jnp.square(square)
    return product


def _mixed(blueprint: Blueprint, layer: int, values: str, mix: Callable[..., jax.Array]) -> Stage:
    """Weights and values → `mixed` [T, D], by a product that gives [T, N, H]."""

    def function(weights_NxTxS: jax.Array, v_SxNxH: jax.Array, *reciprocal_NxT: jax.Array) -> jax.Array:
        out_TxNxH = mix(weights_NxTxS, v_SxNxH)
        for factor_NxT in reciprocal_NxT:
            out_TxNxH = out_TxNxH * factor_NxT.T[..., None]
        return out_TxNxH.reshape(-1, blueprint.config.model_dim)

    reciprocal = ("reciprocal",) if blueprint.rewrites.denominator else ()
    return Stage("mix", layer, function, ("weights", values, *reciprocal), ("mixed",))


def _causal_weights(blueprint: Blueprint, scores_NxTxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(score − row maximum), or a power, under the causal mask [N, T, T], and its row sums [N, T].

    Masked scores are replaced by their row's diagonal one, so that the exponential never sees a large negative number.
    """
    N, T, _ = scores_NxTxT.shape
    tile = tile_edge(T) if blueprint.rewrites.packed else T
    n = T // tile
    top = largest if blueprint.rewrites.tournament else lambda values, groups: values.max(-1)
    seen, own = jnp.tril(jnp.ones((tile, tile), bool))[None, None], jnp.eye(tile, dtype=bool)[None, None]
    tiles = [(i, j) for i in range(n) for j in range(i + 1)]
    index = {pair: place for place, pair in enumerate(tiles)}
    cut = lambda i, j: scores_NxTxT[:, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]  # noqa: E731
    on_NxIxQxK = jnp.stack([cut(i, i) for i in range(n)], axis=1)
    diagonal_NxIxQx1 = jnp.where(own, on_NxIxQxK, 0.0).sum(-1, keepdims=True)
    on_NxIxQxK = jnp.where(seen, on_NxIxQxK, diagonal_NxIxQx1)
    stack_NxPxQxK = jnp.stack([on_NxIxQxK[:, i] if i == j else cut(i, j) for i, j in tiles], axis=1)
    if blueprint.config.power:
        e_NxPxQxK = _power(stack_NxPxQxK, blueprint.config.power)
    else:
        largest_NxPxQ = top(stack_NxPxQxK, halvings(tile))
        # rows of the triangle are filled up with their last tile, so that one maximum serves them all
        rows_NxIxQxJ = jnp.stack(
            [jnp.stack([largest_NxPxQ[:, index[i, min(i, j)]] for j in range(n)], axis=-1) for i in range(n)], axis=1
        )
        row_NxIxQ = top(rows_NxIxQxJ, at_once(n))
        below_NxPxQ = jnp.stack([row_NxIxQ[:, i] for i, _ in tiles], axis=1)
        e_NxPxQxK = _exp(blueprint, stack_NxPxQxK - below_NxPxQ[..., None])
    visible_1xPxQxK = jnp.stack([seen[0, 0] if i == j else jnp.ones((tile, tile), bool) for i, j in tiles])[None]
    e_NxPxQxK = jnp.where(visible_1xPxQxK, e_NxPxQxK, 0.0)
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

    def write(cache_SxNxH: jax.Array, new_1xNxH: jax.Array, position: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cache_SxNxH, new_1xNxH, position, axis=0)

    # the projections wrote the new key and value over the names of the cache, which came in as past
    names = [f"{layer}.{name}" for name in "kv"]
    writes = [Stage("cache", layer, write, (name + PAST, name, POSITION), (name,)) for name in names]
    return [*writes, *single_query(blueprint, layer, POSITION)]


def single_query(blueprint: Blueprint, layer: int, at: str) -> list[Stage]:
    """The query of one token and the keys and values of all → its `mixed` [1, D]; those behind it do not count.

    Args:
      at: the name of its position.
    """
    q, k, v = (f"{layer}.{name}" for name in "qkv")
    divided = blueprint.present(f"{layer}.temperature")
    N, H = blueprint.config.num_heads, blueprint.config.head_dim

    def scores(q_1xNxH: jax.Array, k_SxNxH: jax.Array, *temperature: jax.Array) -> jax.Array:
        if blueprint.rewrites.one_dot:
            queries_NHxN = jnp.where(jnp.eye(N, dtype=bool)[:, None], q_1xNxH[0][:, :, None], 0.0).reshape(N * H, N)
            scores_Nx1xS = (k_SxNxH.reshape(-1, N * H) @ queries_NHxN).T[:, None]
        else:
            scores_Nx1xS = jnp.einsum("TNH,SNH->NTS", q_1xNxH, k_SxNxH)
        if blueprint.rewrites.temperature:
            return scores_Nx1xS
        return scores_Nx1xS / _divisor(blueprint, _column(*temperature) if temperature else None)

    def exponentials(scores_Nx1xS: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen_1x1xS = (jnp.arange(scores_Nx1xS.shape[-1]) <= position)[None, None]
        own_Nx1x1 = jax.lax.dynamic_slice_in_dim(scores_Nx1xS, position, 1, axis=2)
        scores_Nx1xS = jnp.where(seen_1x1xS, scores_Nx1xS, own_Nx1x1)
        if blueprint.config.power:
            e_Nx1xS = _power(scores_Nx1xS, blueprint.config.power)
        else:
            many = blueprint.rewrites.tournament
            top_Nx1 = largest(scores_Nx1xS, at_once(seen_1x1xS.size)) if many else scores_Nx1xS.max(-1)
            e_Nx1xS = _exp(blueprint, scores_Nx1xS - top_Nx1[..., None])
        e_Nx1xS = jnp.where(seen_1x1xS, e_Nx1xS, 0.0)
        return e_Nx1xS, e_Nx1xS.sum(-1)

    def mix(weights_Nx1xS: jax.Array, v_SxNxH: jax.Array) -> jax.Array:
        if not blueprint.rewrites.one_dot:
            return jnp.einsum("NTS,SNH->TNH", weights_Nx1xS, v_SxNxH)
        out_NxNxH = (weights_Nx1xS[:, 0] @ v_SxNxH.reshape(-1, N * H)).reshape(N, N, H)
        return jnp.stack([out_NxNxH[head, head] for head in range(N)])[None]

    return [
        *_tempered(blueprint, layer, _column, at),
        Stage("scores", layer, scores, (q, k, *divided, *((at,) if divided else ())), ("scores",)),
        *_softmax(blueprint, layer, exponentials, at),
        _mixed(blueprint, layer, v, mix),
    ]
