"""Entropy of attention as pure functions of arrays: rows, heads, reference maxima, the penalty and the bands.

Natural logarithm throughout (nats); float32 or better whatever the input type.
"""

import math

import jax
import jax.numpy as jnp

from jax_entropy.errors import UserError, check_array, check_choice, check_number, spelled


def _at_least_float32(name: str, value: jax.Array, axes: str) -> jax.Array:
    """An argument that is an array with these axes, or lists that make one."""
    x = value
    try:
        x = jnp.asarray(value)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    except (TypeError, ValueError):
        raise UserError(f"{name}={spelled(value)} must be an array {axes}") from None
    check_array(name, x, axes)
    return wide


def _check_shape(name: str, value: jax.Array, axes: str, shape: tuple[int, ...]) -> None:
    if getattr(value, "shape", None) != shape:
        raise UserError(f"{name}={spelled(value)} must be an array {axes} = {[*shape]}")


def row_entropy(weights: jax.Array) -> jax.Array:
    """Entropy of each attention row, `H_i = −Σ_j a_ij log a_ij` in nats; weights [..., S] -> [...].

    A weight of exactly 0 contributes nothing and gets a finite gradient (0); a NaN stays a NaN.

    Raises:
      UserError: `weights` is no array.
    """
    weights = _at_least_float32("weights", weights, "[…, S]")
    positive = jnp.where(weights == 0, 1, weights)
    return -jnp.sum(weights * jnp.log(positive), axis=-1)


def head_entropy(entropy_BxNxT: jax.Array) -> jax.Array:
    """Entropy of each head in nats: the mean over the batch and the query positions; [..., B, N, T] -> [..., N].

    Raises:
      UserError: it is given no array, or one with fewer axes.
    """
    return jnp.mean(_at_least_float32("entropy", entropy_BxNxT, "[…, B, N, T]"), axis=(-3, -1))


def max_entropy(
    context_length: int, kind: str = "context", *, num_keys: int | None = None, window: int | None = None
) -> float:
    """Reference maximum of a head's entropy over T query positions, in nats.

    Args:
      context_length: T.
      kind: "context", log S, the paper's E_max; "causal", (1/T)·Σ log(i + S − T), the most that a causal head can
        reach.
      num_keys: S, where keys that all rows see come before the T positions; None: T.
      window: how many of the T positions a row sees at most, its own and those before it; None: all.
    Raises:
      UserError: a kind that does not exist, T or the window below 1, or S below T.
    """
    T, S = context_length, context_length if num_keys is None else num_keys
    check_choice("kind", kind, ("context", "causal"))
    check_number("context_length", T, 1)
    check_number("num_keys", S, T)
    check_number("window", T if window is None else window, 1)
    W = T if window is None else min(window, T)
    most = S - T + W
    if kind == "context":
        return math.log(most)
    return (math.lgamma(most + 1) - math.lgamma(S - T + 1) + (T - W) * math.log(most)) / T


def entropy_penalty(
    entropy_LxBxNxT: jax.Array,
    threshold_LxN: jax.Array,
    *,
    tolerance: float,
    reduction: str = "row_sum",
    shape: str = "deadzone",
    maximum_LxT: jax.Array | None = None,
) -> jax.Array:
    """Penalty on entropies that leave the band θ·E_max ± γ·E_max around each head's learned threshold (Algorithm 1).

    With δ the entropy minus θ·E_max and E_max = log T, or each row's own, a scalar in nats²:
      shape "deadzone": δ² where |δ| > γ·E_max, else 0 (the paper); "hinge": max(|δ| − γ·E_max, 0)², without the jump.
      reduction "row_sum": δ of every row, summed over batch and rows, mean over heads and layers (the authors' code,
        to which the paper's λ belongs); "row_mean": mean over all rows, so that λ does not depend on batch or context;
        "head_mean": δ of the head entropy, mean over heads and layers (Algorithm 1 as printed).

    Args:
      entropy_LxBxNxT: row entropies in nats.
      threshold_LxN: θ, fractions of E_max.
      tolerance: γ, a fraction of E_max.
      maximum_LxT: E_max of each row, the logarithm of how many keys it sees, where slots or windows change that; of a
        head, their mean. None: log T.
    Raises:
      UserError: a reduction or shape that does not exist, a negative tolerance, or arrays of other shapes.
    """
    check_choice("reduction", reduction, ("row_sum", "row_mean", "head_mean"))
    check_choice("shape", shape, ("deadzone", "hinge"))
    check_number("tolerance", tolerance, 0, whole=False, traced=True)
    entropy_LxBxNxT = _at_least_float32("entropy", entropy_LxBxNxT, "[L, B, N, T]")
    L, _, N, T = entropy_LxBxNxT.shape
    _check_shape("threshold", threshold_LxN, "[L, N]", (L, N))
    if maximum_LxT is not None:
        _check_shape("maximum", maximum_LxT, "[L, T]", (L, T))
    if maximum_LxT is None:
        maximum = max_entropy(entropy_LxBxNxT.shape[-1])
    elif reduction == "head_mean":
        maximum = jnp.mean(maximum_LxT, axis=1, keepdims=True)
    else:
        maximum = maximum_LxT[:, None, None, :]
    if reduction == "head_mean":
        deviation = head_entropy(entropy_LxBxNxT) - threshold_LxN * maximum
    else:
        deviation = entropy_LxBxNxT - threshold_LxN[:, None, :, None] * maximum
    excess = jnp.abs(deviation) - tolerance * maximum
    if shape == "deadzone":
        penalty = jnp.where(excess <= 0, 0, jnp.square(deviation))  # a NaN is not free
    else:
        penalty = jnp.square(jnp.maximum(excess, 0))
    if reduction == "row_sum":
        return jnp.sum(jnp.mean(penalty, axis=(0, 2)))
    return jnp.mean(penalty)


def head_bands(entropy_LxN: jax.Array, maximum: float | jax.Array | None = None) -> jax.Array:
    """Shares of heads in the four quarters of the entropy range, the lowest first (Fig. 2a, 7): [L, N] -> [4].

    Quarters are half-open but for the last. The first share is *collapse*, the last *overload*; a head without any
    entropy is in the first even where no head has any. Heads whose entropy is not a number are in no quarter, so that
    the shares then sum to less than 1.

    Args:
      entropy_LxN: head entropies in nats.
      maximum: end of the range in nats, or [L, 1] of each layer; None: the largest observed, as in the paper.
    Raises:
      UserError: it is given no [L, N], or a maximum that cannot be one.
    """
    entropy_LxN = _at_least_float32("entropy", entropy_LxN, "[L, N]")
    if getattr(maximum, "ndim", 0):
        _check_shape("maximum", maximum, "[L, 1]", (len(entropy_LxN), 1))
    elif maximum is not None:
        check_number("maximum", maximum, 0, whole=False, traced=True)
    maximum = jnp.nanmax(entropy_LxN) if maximum is None else maximum
    above = [jnp.sum((entropy_LxN >= maximum * quarter / 4) & (entropy_LxN > 0)) for quarter in (1, 2, 3)]
    known = jnp.sum(~jnp.isnan(entropy_LxN))
    counts_4 = jnp.stack([known - above[0], above[0] - above[1], above[1] - above[2], above[2]])
    return counts_4 / entropy_LxN.size


def extreme_heads(entropy_LxN: jax.Array, maximum: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which heads are overloaded and which collapsed: in the top and the bottom quarter of `maximum`, [L, N] each.

    Args:
      entropy_LxN: head entropies in nats.
      maximum: the entropy that a head can have, in nats, or [L, 1] of each layer.
    """
    return entropy_LxN > 0.75 * maximum, entropy_LxN < 0.25 * maximum
