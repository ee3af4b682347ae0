"""Queries, keys and values under secure computation: their projections, and the parts that are linear in them.

A convolution's taps are in the matrices before it, which read more positions; rotations are products with public
numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.parts import log_factors, rotations
from jax_entropy.private.program.blueprint import Blueprint
from jax_entropy.private.program.stage import LAST, PAST, POSITION, Stage, product

EMBEDDED_VALUE, _FIRST_VALUE = "embedded_value", "first_value"


def linear(blueprint: Blueprint, kind: str, layer: int | None, name: str, source: str, target: str) -> Stage:
    """target = source · kernel (+ bias)."""
    found = blueprint.present(f"{name}.bias")

    def function(x_TxI: jax.Array, kernel_IxO: jax.Array, *bias_O: jax.Array) -> jax.Array:
        y_TxO = product(x_TxI, kernel_IxO, blueprint.piece)
        return y_TxO + bias_O[0][None] if bias_O else y_TxO

    return Stage(kind, layer, function, (source, f"{name}.kernel", *found), (target,))


def projections(blueprint: Blueprint, layer: int, read: str, num_tokens: int | None, keep: bool) -> list[Stage]:
    """What attention reads of a prompt, or without `num_tokens` of one token at `position`: q, k and v [T, N, H].

    Args:
      keep: whether what a step reads of the prompt is an output too.
    """
    config, names = blueprint.config, tuple(f"{layer}.{name}" for name in "qkv")
    products = {f"{layer}.qkv": "qkv"} if blueprint.rewrites.qkv else {name: name for name in names}
    if blueprint.joined and layer:  # with what is before them, in the layer before
        stages = []
    elif config.conv_width:
        stages = [_near(blueprint, layer, read, num_tokens, keep)]
        stages += [_convolution(blueprint, layer, *product, num_tokens) for product in products.items()]
    else:
        stages = [linear(blueprint, "projections", layer, name, read, target) for name, target in products.items()]

    def split(*parts: jax.Array) -> tuple[jax.Array, ...]:
        parts = parts if len(parts) == 3 else jnp.split(parts[0], 3, axis=-1)
        return tuple(part.reshape(-1, config.num_heads, config.head_dim) for part in parts)

    stages.append(Stage("heads", layer, split, tuple(products.values()), names))
    if config.qk_norm:
        stages.append(_qk_norm(blueprint, layer))
    return [*stages, *_values(blueprint, layer), *_at_positions(blueprint, layer, num_tokens)]


def _qk_norm(blueprint: Blueprint, layer: int) -> Stage:
    """Queries and keys of size 1, in one root for both; queries times their scalar."""

    def function(q_TxNxH: jax.Array, k_TxNxH: jax.Array, gain_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean_2xTxN = jnp.square(jnp.stack([q_TxNxH, k_TxNxH])).mean(-1)
        factor_2xTxN = jax.lax.rsqrt(mean_2xTxN + blueprint.config.norm_epsilon)
        return q_TxNxH * (factor_2xTxN[0] * gain_N[None])[..., None], k_TxNxH * factor_2xTxN[1][..., None]

    names = (f"{layer}.q", f"{layer}.k")
    return Stage("QK-norm", layer, function, (*names, f"{layer}.qk_gain"), names)


def _near(blueprint: Blueprint, layer: int, read: str, num_tokens: int | None, keep: bool) -> Stage:
    """Each position beside those before it, the newest first, which is what a convolution's matrix reads."""
    before, rows = blueprint.config.conv_width - 1, f"{layer}.rows"

    def function(x_TxD: jax.Array, *more: jax.Array) -> tuple[jax.Array, ...]:
        past_PxD = jnp.zeros((before, x_TxD.shape[1])) if num_tokens else more[0]
        x_SxD = jnp.concatenate([past_PxD, x_TxD])
        near_TxI = jnp.concatenate([x_SxD[j : j + len(x_TxD)] for j in range(before, -1, -1)], axis=-1)
        if not num_tokens:
            return near_TxI, x_SxD[1:]
        return (near_TxI, *(jax.lax.dynamic_slice_in_dim(x_SxD, last + 1, before) for last in more))

    more = (rows + PAST,) if num_tokens is None else (LAST,) if keep else ()
    return Stage("rows", layer, function, (read, *more), ("near", *((rows,) if more else ())))


def _convolution(blueprint: Blueprint, layer: int, name: str, target: str, num_tokens: int | None) -> Stage:
    """target = near · kernel (+ the bias of as many taps as find something)."""
    found, last = blueprint.present(f"{name}.bias"), blueprint.config.conv_width - 1
    at = (POSITION,) if found and num_tokens is None else ()

    def function(near_TxI: jax.Array, kernel_IxO: jax.Array, *bias: jax.Array) -> jax.Array:
        y_TxO = product(near_TxI, kernel_IxO, blueprint.piece)
        if not bias:
            return y_TxO
        if at:
            return y_TxO + jax.lax.dynamic_slice_in_dim(bias[0], jnp.minimum(bias[1], last), 1)
        full_TxO = jnp.repeat(bias[0][-1:], num_tokens, axis=0)
        return y_TxO + jnp.concatenate([bias[0][:-1], full_TxO])[:num_tokens]

    return Stage("projections", layer, function, ("near", f"{name}.kernel", *found, *at), (target,))


def _values(blueprint: Blueprint, layer: int) -> list[Stage]:
    """Adds v of layer 0 and the tokens' own, times what is not in the matrices around attention already."""
    v, stages = f"{layer}.v", []
    added = {_FIRST_VALUE: "value_mix"} if blueprint.config.value_residual and layer else {}
    added |= {EMBEDDED_VALUE: "value_scale"} if blueprint.config.embedded_values[layer] else {}
    if blueprint.config.value_residual and layer == 0:
        stages.append(Stage("values", layer, lambda v_TxNxH: v_TxNxH, (v,), (_FIRST_VALUE,)))
    for name, factor in added.items():
        found = blueprint.present(f"{layer}.{factor}")
        function = lambda v, more, *factor: v + (more * factor[0].reshape(1, 1, 1) if factor else more)  # noqa: E731
        stages.append(Stage("temperature" if found else "values", layer, function, (v, name, *found), (v,)))
    return stages


def _at_positions(blueprint: Blueprint, layer: int, num_tokens: int | None) -> list[Stage]:
    """Queries, and where they are rotated keys, times public numbers of their positions, all in one product.

    A rotation (a + ib)·(c + is) takes three: x = c·(a + b), y = a·(s − c), z = b·(s + c) give x − z and x + y.
    """
    config, q, k = blueprint.config, f"{layer}.q", f"{layer}.k"
    in_temperature = config.learnable_temperature and blueprint.rewrites.temperature
    log_S = np.broadcast_to(1.0 if in_temperature else log_factors(config, layer), config.context_length)
    cosine_SxI, sine_SxI = rotations(config)
    turns_Sx3xI = np.stack([cosine_SxI, sine_SxI - cosine_SxI, sine_SxI + cosine_SxI], axis=1)
    turns_Sx2x3xI = np.stack([turns_Sx3xI * log_S[:, None, None], turns_Sx3xI], axis=1)

    def rows(table_S: np.ndarray, *position: jax.Array) -> jax.Array:
        table_S = jnp.asarray(table_S, jnp.float32)
        return table_S[:num_tokens] if num_tokens else jax.lax.dynamic_slice_in_dim(table_S, *position, 1)

    def scale(q_TxNxH: jax.Array, *position: jax.Array) -> jax.Array:
        return q_TxNxH * rows(log_S, *position)[:, None, None]

    def turn(q_TxNxH: jax.Array, k_TxNxH: jax.Array, *position: jax.Array) -> tuple[jax.Array, ...]:
        a, b = jnp.split(jnp.stack([q_TxNxH, k_TxNxH], axis=1), 2, axis=-1)
        products = jnp.stack([a + b, a, b], axis=3) * rows(turns_Sx2x3xI, *position)[:, :, None]
        x, y, z = (products[:, :, :, i] for i in range(3))
        turned = jnp.concatenate([x - z, x + y], axis=-1)
        return turned[:, 0], turned[:, 1]

    at = () if num_tokens else (POSITION,)
    if config.rotary:
        return [Stage("rotation", layer, turn, (q, k, *at), (q, k))]
    if config.log_scale and not in_temperature:
        return [Stage("rotation", layer, scale, (q, *at), (q,))]
    return []
