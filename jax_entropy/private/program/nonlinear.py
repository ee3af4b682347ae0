"""Exponential, reciprocal and maximum in forms that take few rounds: what the softmax consists of.

Rounds are what a slow network pays. Each form is exact, or as close as fixed point is, for what a softmax holds.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def exponential(x: jax.Array, seen: jax.Array, squarings: int, of_engine: int) -> jax.Array:
    """(1 + y + y²/2)^(2ⁿ) with y = x/2ⁿ where it is seen, elsewhere 0; some of the squarings are the engine's."""
    # The mask is between them: what it squares itself, XLA takes for an exponential of twice the argument.
    e = jnp.where(seen, jnp.exp(bent(x, squarings=squarings, of_engine=of_engine)), 0.0)
    for _ in range(squarings - of_engine):
        e = jnp.square(e)
    return e


@functools.partial(jax.jit, static_argnames=("squarings", "of_engine"))
def bent(x: jax.Array, squarings: int, of_engine: int) -> jax.Array:
    """The argument b whose 1 + b/2ᵐ, which the engine squares m times, is 1 + y + y²/2 with y = x/2ⁿ.

    Closer by an order than 1 + y, so that fewer squarings do. Below −2ⁿ⁺¹ it is no exponential any more.
    """
    slope = 2.0 ** (of_engine - squarings)
    return x * (slope + x * (slope / 2 ** (squarings + 1)))


def reciprocal(sums: jax.Array, largest: int) -> jax.Array:
    """1/z for z from 1 to `largest`, in 16 rounds where the engine's own takes 36.

    Comparisons with powers of √2 choose the line that is nearest to 1/z from one to the next, and two steps of
    Goldschmidt square its error, 1.5 %, twice.
    """
    edges = 2.0 ** (np.arange(max(math.ceil(2 * math.log2(largest)), 1) + 1) / 2)
    ends, width = edges[:-1] + edges[1:], np.diff(edges)
    error = 1 / (2 * (ends / width) ** 2 - 1)  # of Chebyshev's line
    lines = 8 * error / width**2 * np.stack([ends, np.ones_like(ends)])  # 1/z ≈ lines[0] − lines[1] z
    # Numbers of fixed point are absolute: the slope of a large z would have no digits.
    scale = 2.0 ** max(math.ceil(2 * math.log2(largest)) - 12, 0)
    lines[1] *= scale
    passed = (sums[None] >= edges[1:-1].astype(np.float32).reshape(-1, *[1] * sums.ndim)).astype(jnp.float32)
    steps = jnp.tensordot(np.diff(lines).astype(np.float32), passed, 1) if len(passed) else jnp.zeros((2, *sums.shape))
    near = (lines[0, 0] + steps[0]) - (lines[1, 0] + steps[1]) * (sums / scale if scale > 1 else sums)
    off = 1 - sums * near
    squared, near = jnp.stack([off, near]) * jnp.stack([off, 1 + off])
    return near * (1 + squared)


class Shifted(NamedTuple):
    """Exponentials of a row's scores less a shift of their own, their sum and about its reciprocal."""

    weights_NxS: jax.Array
    sums_N: jax.Array
    near_N: jax.Array


_STEP = 6.0  # from one shift to the next: the right one's sums lie between e⁻³ and e³


def shifts(reach: float, size: int) -> np.ndarray:
    """What so many scores are lowered by, of which the largest is at most `reach` over 0, and one is 0."""
    return _STEP / 2 + _STEP * np.arange(max(math.ceil((reach + math.log(size)) / _STEP), 1), dtype=np.float32)


def shifted(e_JxNxS: jax.Array) -> Shifted:
    """Of exponentials with all shifts, those with the largest shift whose sum is large enough, in 12 rounds.

    What has smaller shifts than that may have left the range of numbers, and does not count.
    """
    sums_JxN = e_JxNxS.sum(-1)
    edges = np.exp(np.linspace(-_STEP / 2, _STEP / 2, 71)).astype(np.float32)  # each 9 % after the one before
    passed_MxJxN = sums_JxN[None] >= edges[:-1, None, None]
    middles = 2 / (edges[:-1] + edges[1:])
    steps_Mx1x1 = np.diff(middles, prepend=middles[:1]).astype(np.float32)[:, None, None]
    near_JxN = middles[0] + jnp.where(passed_MxJxN, steps_Mx1x1, 0.0).sum(0)
    # whether all from here on are too small; the first never counts, which is large enough
    small_JxN, distance = ~passed_MxJxN[0, 1:], 1
    beyond = jnp.ones((1, *small_JxN.shape[1:]), bool)
    while distance < len(small_JxN):
        after = jnp.concatenate([small_JxN[distance:], jnp.repeat(beyond, distance, axis=0)])
        small_JxN, distance = small_JxN & after, 2 * distance
    own_JxN = jnp.concatenate([small_JxN, beyond]) ^ jnp.concatenate([~beyond, small_JxN])
    all_JxNxS = jnp.concatenate([e_JxNxS, sums_JxN[..., None], near_JxN[..., None]], axis=-1)
    picked_NxS = jnp.where(own_JxN[..., None], all_JxNxS, 0.0).sum(0)
    return Shifted(picked_NxS[:, :-2], picked_NxS[:, -2], picked_NxS[:, -1])


def divided(values_NxH: jax.Array, sums_N: jax.Array, near_N: jax.Array) -> jax.Array:
    """values / sums by two steps of Goldschmidt, whose first goes with the values: 6 rounds."""
    scaled_NxH1 = jnp.concatenate([values_NxH, sums_N[:, None]], axis=1) * near_N[:, None]
    off_Nx1 = 1 - scaled_NxH1[:, -1:]
    values_NxH, H = scaled_NxH1[:, :-1], values_NxH.shape[1]
    factors_NxH1 = jnp.concatenate([jnp.repeat(1 + off_Nx1, H, axis=1), off_Nx1], axis=1)
    closer_NxH1 = jnp.concatenate([values_NxH, off_Nx1], axis=1) * factors_NxH1
    return closer_NxH1[:, :-1] * (1 + closer_NxH1[:, -1:])


def largest(values: jax.Array, groups: Sequence[int]) -> jax.Array:
    """Maximum over the last axis, in as many levels as there are groups: each takes the largest of so many.

    A pair is compared in 8 rounds; up to 16 that are compared all with all at once take 11 to 13.
    """
    for group in groups:
        if missing := -values.shape[-1] % group:
            values = jnp.concatenate([values, *[values[..., -1:]] * missing], axis=-1)
        if group == 2:
            half = values.shape[-1] // 2
            values = jnp.maximum(values[..., :half], values[..., half:])
        else:
            values = _largest_of_all(values.reshape(*values.shape[:-1], -1, group))
    return values[..., 0]


def halvings(size: int) -> list[int]:
    """Groups that compare few pairs: halves, and the last four all at once."""
    groups = []
    while size > 4:
        groups.append(2)
        size = -(-size // 2)
    return [*groups, *([size] if size > 1 else [])]


def at_once(size: int) -> list[int]:
    """Groups that take few rounds: up to 16 at once."""
    groups = []
    while size > 1:
        groups.append(min(size, 16))
        size = -(-size // 16)
    return groups


def _largest_of_all(values: jax.Array) -> jax.Array:
    """The one of the last axis that loses against none before and none after it, of equals the first."""
    count = values.shape[-1]
    if count == 2:
        return jnp.maximum(values[..., 0], values[..., 1])
    one, other = np.triu_indices(count, 1)
    pick = lambda places: jnp.stack([values[..., place] for place in places], axis=-1)  # noqa: E731
    wins = (pick(one) >= pick(other)).astype(jnp.int32)
    # [pair, value, its rivals]: whether it wins is the pair's bit, or one less it
    signs, lost = np.zeros((len(one), count, count - 1), np.int32), np.zeros((count, count - 1), np.int32)
    for pair, (i, j) in enumerate(zip(one, other, strict=True)):
        signs[pair, i, j - 1], signs[pair, j, i], lost[j, i] = 1, -1, 1
    bits = jnp.tensordot(wins, signs, 1) + lost.reshape(*[1] * (wins.ndim - 1), *lost.shape)
    while (left := bits.shape[-1]) > 1:
        half = left // 2
        bits = jnp.concatenate([bits[..., :half] * bits[..., half : 2 * half], bits[..., 2 * half :]], axis=-1)
    return (values * bits[..., 0].astype(jnp.float32)).sum(-1)
