"""Causal attention under secure computation, of a whole prompt and of one query to many keys, as stages.

Masked scores never reach the exponential: only tiles at the edges of what is seen have any, and those beyond are left
out.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.architecture import ModelConfig
from jax_entropy.private.program.blueprint import Blueprint
from jax_entropy.private.program.nonlinear import (
    at_once,
    divided,
    exponential,
    halvings,
    largest,
    reciprocal,
    shifted,
    shifts,
)
from jax_entropy.private.program.stage import PAST, POSITION, Stage
from jax_entropy.private.program.tiles import Tiles


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
    after_slots, (keys, values) = _after_slots(blueprint, layer, k, v)
    tiles = Tiles.of(blueprint.config, layer, num_tokens, blueprint.rewrites.packed)

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
        *after_slots,
        Stage("scores", layer, scores, (q, keys, *divided), ("scores",)),
        Stage("tiles", layer, functools.partial(_packed, tiles), ("scores",), ("scores",)),
        *_softmax(blueprint, layer, functools.partial(_causal_weights, blueprint, layer, tiles)),
        _mixed(blueprint, layer, values, mix),
    ]


def _after_slots(blueprint: Blueprint, layer: int, *names: str) -> tuple[list[Stage], tuple[str, ...]]:
    """Puts the learned slots before keys and values, and gives the names of what attention reads then."""
    slots = blueprint.present(f"{layer}.slots.k", f"{layer}.slots.v")
    if not slots:
        return [], names
    join = lambda k, v, *slots: tuple(jnp.concatenate(pair) for pair in zip(slots, (k, v), strict=True))  # noqa: E731
    joined = tuple(f"{name}.all" for name in names)
    return [Stage("slots", layer, join, (*names, *slots), joined)], joined


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
    bounded = blueprint.rewrites.reciprocal and not config.power  # the sum, between 1 and the number of keys

    def function(*arrays: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        weights, total = exponentials(*arrays)
        if not blueprint.rewrites.denominator:
            return weights / total[..., None]
        return weights, reciprocal(total, weights.shape[-1]) if bounded else 1 / total

    outputs = ("weights", "reciprocal") if blueprint.rewrites.denominator else ("weights",)
    kind = "power softmax" if config.power else "softmax"
    return [*_capped(config, layer), Stage(kind, layer, function, ("scores", *extra), outputs)]


def _capped(config: ModelConfig, layer: int) -> list[Stage]:
    cap = lambda scores_NxTxS: config.logit_cap * jnp.tanh(scores_NxTxS / config.logit_cap)  # noqa: E731
    return [Stage("soft cap", layer, cap, ("scores",), ("scores",))] if config.logit_cap else []


def _exp(blueprint: Blueprint, layer: int, x: jax.Array, seen: jax.Array, more: int = 0) -> jax.Array:
    """Of what is seen, elsewhere 0; with so many squarings more than the layer has."""
    if not blueprint.squarings:
        return jnp.where(seen, jnp.exp(x), 0.0)
    return exponential(x, seen, blueprint.squarings[layer] + more, min(blueprint.squarings))


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


def _shifted(blueprint: Blueprint, layer: int, values: str, mix: Callable[..., jax.Array], at: str) -> list[Stage]:
    """scores and values → `mixed` [1, D]: the softmax without a maximum, and with a reciprocal inside the mix.

    Scores count from the token's own, so that the largest is none below 0.
    """
    config, reach = blueprint.config, blueprint.reach(layer)

    def softmax(scores_Nx1xS: jax.Array, position: jax.Array) -> tuple[jax.Array, ...]:
        own, seen_1x1xS = _seen(blueprint, layer, position, scores_Nx1xS.shape[-1])
        own_Nx1x1 = jax.lax.dynamic_slice_in_dim(scores_Nx1xS, own, 1, axis=2)
        above_NxS = jnp.where(seen_1x1xS, scores_Nx1xS - own_Nx1x1, 0.0)[:, 0]
        lowered_JxNxS = above_NxS[None] - shifts(reach, above_NxS.shape[-1])[:, None, None]
        # one squaring more, since the largest is not at 0, next to which the exponential is closest
        return shifted(_exp(blueprint, layer, lowered_JxNxS, seen_1x1xS, more=1))

    def mixed(weights_NxS: jax.Array, v_SxNxH: jax.Array, sums_N: jax.Array, near_N: jax.Array) -> jax.Array:
        out_NxH = divided(mix(weights_NxS[:, None], v_SxNxH)[0], sums_N, near_N)
        return out_NxH.reshape(1, config.model_dim)

    return [
        *_capped(config, layer),
        Stage("softmax", layer, softmax, ("scores", at), ("weights", "sums", "near")),
        Stage("mix", layer, mixed, ("weights", values, "sums", "near"), ("mixed",)),
    ]


def _seen(blueprint: Blueprint, layer: int, position: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The place of the token's own key within what its window leaves, and [1, 1, S] of the keys up to it."""
    own = blueprint.config.num_slots + jnp.minimum(position, blueprint.config.windows[layer] - 1)
    return own, (jnp.arange(size) <= own)[None, None]


def _packed(tiles: Tiles, scores_NxTxS: jax.Array) -> jax.Array:
    """The tiles [N, P, Q, K] that are seen, one row of them after another.

    Scores that are not seen are replaced by the query's score of its own key, so that the exponential never sees a
    large negative number.
    """
    N, T, _ = scores_NxTxS.shape
    if tiles.padding:
        before, after = scores_NxTxS[..., : tiles.slots], scores_NxTxS[..., tiles.slots :]
        scores_NxTxS = jnp.concatenate([before, jnp.zeros((N, T, tiles.padding)), after], axis=-1)
    rows, places = tiles.rows, tiles.places
    own = np.eye(*tiles.seen.shape, tiles.slots + tiles.padding, dtype=bool)
    # in each row one tile holds the queries' own keys, the last
    last_NxIxQxK = jnp.stack([tiles.cut(scores_NxTxS, i, row[-1]) for i, row in enumerate(rows)], axis=1)
    own_IxQxK = np.stack([tiles.cut(own, i, row[-1]) for i, row in enumerate(rows)])
    own_NxIxQx1 = jnp.where(own_IxQxK[None], last_NxIxQxK, 0.0).sum(-1, keepdims=True)
    partial = [(i, j) for i, j in places if j == rows[i][-1] or not tiles.cut(tiles.seen, i, j).all()]
    seen_PxQxK = np.stack([tiles.cut(tiles.seen, *place) for place in partial])
    partial_NxPxQxK = jnp.where(
        seen_PxQxK[None],
        jnp.stack([tiles.cut(scores_NxTxS, *place) for place in partial], axis=1),
        jnp.stack([own_NxIxQx1[:, i] for i, _ in partial], axis=1),
    )
    changed = {place: partial_NxPxQxK[:, number] for number, place in enumerate(partial)}
    return jnp.stack([changed.get(place, tiles.cut(scores_NxTxS, *place)) for place in places], axis=1)


def _causal_weights(
    blueprint: Blueprint, layer: int, tiles: Tiles, stack_NxPxQxK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """exp(score − row maximum) of what is seen, or a power, elsewhere 0 [N, T, S], and its row sums [N, T]."""
    top = largest if blueprint.rewrites.tournament else lambda values, groups: values.max(-1)
    rows, places = tiles.rows, tiles.places
    index = {place: number for number, place in enumerate(places)}
    visible_PxQxK = np.stack([tiles.cut(tiles.seen, *place) for place in places])
    if blueprint.config.power:
        e_NxPxQxK = jnp.where(visible_PxQxK[None], _power(stack_NxPxQxK, blueprint.config.power), 0.0)
    else:
        largest_NxPxQ = top(stack_NxPxQxK, halvings(tiles.width))
        # rows with fewer tiles are filled up with their last, so that one maximum serves them all
        most = max(map(len, rows))
        filled = [[index[i, row[min(j, len(row) - 1)]] for j in range(most)] for i, row in enumerate(rows)]
        rows_NxIxQxJ = jnp.stack(
            [jnp.stack([largest_NxPxQ[:, place] for place in row], axis=-1) for row in filled], axis=1
        )
        row_NxIxQ = top(rows_NxIxQxJ, at_once(most))
        below_NxPxQ = jnp.stack([row_NxIxQ[:, i] for i, _ in places], axis=1)
        e_NxPxQxK = _exp(blueprint, layer, stack_NxPxQxK - below_NxPxQ[..., None], visible_PxQxK[None])
    sums_NxPxQ = e_NxPxQxK.sum(-1)
    total_NxT = jnp.concatenate([sum(sums_NxPxQ[:, index[i, j]] for j in row) for i, row in enumerate(rows)], axis=-1)
    empty, columns = jnp.zeros_like(e_NxPxQxK[:, 0]), range(tiles.seen.shape[1] // tiles.width)
    square = [
        jnp.concatenate([e_NxPxQxK[:, index[i, j]] if j in row else empty for j in columns], axis=-1)
        for i, row in enumerate(rows)
    ]
    e_NxTxS = jnp.concatenate(square, axis=1)
    if tiles.padding:
        e_NxTxS = jnp.concatenate([e_NxTxS[..., : tiles.slots], e_NxTxS[..., tiles.slots + tiles.padding :]], axis=-1)
    return e_NxTxS, total_NxT


def cached_attention(blueprint: Blueprint, layer: int, num_keys: int) -> list[Stage]:
    """As `attention`, for one token at `position`, whose key and value are written into the caches before.

    Args:
      num_keys: the first of the caches, beyond which nothing is written yet.
    """

    def write(cache_SxNxH: jax.Array, new_1xNxH: jax.Array, position: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cache_SxNxH, new_1xNxH, position, axis=0)

    # the projections wrote the new key and value over the names of the cache, which came in as past
    names = [f"{layer}.{name}" for name in "kv"]
    writes = [Stage("cache", layer, write, (name + PAST, name, POSITION), (name,)) for name in names]
    return [*writes, *single_query(blueprint, layer, POSITION, num_keys, blueprint.shifted)]


def single_query(blueprint: Blueprint, layer: int, at: str, num_keys: int, is_shifted: bool = False) -> list[Stage]:
    """The query of one token and the keys and values of all → its `mixed` [1, D]; those behind it do not count.

    Args:
      at: the name of its position.
      num_keys: of which the first so many are looked at.
      is_shifted: whether exponentials are taken with several shifts.
    """
    q, k, v = (f"{layer}.{name}" for name in "qkv")
    divided = blueprint.present(f"{layer}.temperature")
    N, H = blueprint.config.num_heads, blueprint.config.head_dim
    near, names = _within_window(blueprint, layer, at, num_keys, k, v)
    after_slots, (keys, values) = _after_slots(blueprint, layer, *names)

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
        own, seen_1x1xS = _seen(blueprint, layer, position, scores_Nx1xS.shape[-1])
        own_Nx1x1 = jax.lax.dynamic_slice_in_dim(scores_Nx1xS, own, 1, axis=2)
        scores_Nx1xS = jnp.where(seen_1x1xS, scores_Nx1xS, own_Nx1x1)
        if blueprint.config.power:
            e_Nx1xS = jnp.where(seen_1x1xS, _power(scores_Nx1xS, blueprint.config.power), 0.0)
        else:
            many = blueprint.rewrites.tournament
            top_Nx1 = largest(scores_Nx1xS, at_once(seen_1x1xS.size)) if many else scores_Nx1xS.max(-1)
            e_Nx1xS = _exp(blueprint, layer, scores_Nx1xS - top_Nx1[..., None], seen_1x1xS)
        return e_Nx1xS, e_Nx1xS.sum(-1)

    def mix(weights_Nx1xS: jax.Array, v_SxNxH: jax.Array) -> jax.Array:
        if not blueprint.rewrites.one_dot:
            return jnp.einsum("NTS,SNH->TNH", weights_Nx1xS, v_SxNxH)
        out_NxNxH = (weights_Nx1xS[:, 0] @ v_SxNxH.reshape(-1, N * H)).reshape(N, N, H)
        return jnp.stack([out_NxNxH[head, head] for head in range(N)])[None]

    return [
        *_tempered(blueprint, layer, _column, at),
        *near,
        *after_slots,
        Stage("scores", layer, scores, (q, keys, *divided, *((at,) if divided else ())), ("scores",)),
        *(
            _shifted(blueprint, layer, values, mix, at)
            if is_shifted
            else [*_softmax(blueprint, layer, exponentials, at), _mixed(blueprint, layer, values, mix)]
        ),
    ]


def _within_window(
    blueprint: Blueprint, layer: int, at: str, num_keys: int, *names: str
) -> tuple[list[Stage], tuple[str, ...]]:
    """What a layer's window leaves of the first keys and values, the last up to a position, and their names."""
    window = blueprint.config.windows[layer]

    def cut(k_SxNxH: jax.Array, v_SxNxH: jax.Array, position: jax.Array) -> tuple[jax.Array, ...]:
        first = [x[:num_keys] for x in (k_SxNxH, v_SxNxH)]
        if window >= num_keys:
            return tuple(first)
        start = jnp.maximum(position - window + 1, 0)
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, window) for x in first)

    near = tuple(f"{name}.near" for name in names)
    return [Stage("window", layer, cut, (*names, at), near)], near
