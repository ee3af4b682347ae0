"""What may be added to attention without a nonlinearity: maps that are linear in what is secret under encryption.

Each is a piece of the notation, and docs/architectures.md says what it costs; `Attention` applies them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jax_entropy.architecture import ModelConfig


class Convolution(nn.Module):
    """Conv4: each feature is a sum over its own last positions, y_t = Σ_j taps_j · x_{t−j}, at first only of its own.

    With the collection `cache`, `past` [B, width − 1, N, H] holds the positions before the first one.
    """

    width: int

    @nn.compact
    def __call__(self, x_BxTxNxH: jax.Array, position: int | jax.Array) -> jax.Array:
        (B, T, N, H), before = x_BxTxNxH.shape, self.width - 1
        identity = lambda *_: jnp.zeros((self.width, N, H), jnp.float32).at[0].set(1)  # noqa: E731
        taps_KxNxH = self.param("taps", identity).astype(x_BxTxNxH.dtype)
        past_BxPxNxH = jnp.zeros((B, before, N, H), x_BxTxNxH.dtype)
        if cached := self.has_variable("cache", "past"):
            is_there_P = jnp.arange(before) + position >= before  # nothing stands before the first token
            past_BxPxNxH = jnp.where(is_there_P[None, :, None, None], self.get_variable("cache", "past"), 0)
        x_BxSxNxH = jnp.concatenate([past_BxPxNxH, x_BxTxNxH], axis=1)
        if cached:
            self.put_variable("cache", "past", x_BxSxNxH[:, T:])
        shifted = (x_BxSxNxH[:, before - j : before - j + T] for j in range(self.width))
        # not taps[j]: JAX cannot add the gradient of a static slice to the sum that accumulation keeps of it
        tap_1xNxH = functools.partial(jax.lax.dynamic_index_in_dim, taps_KxNxH)
        return sum(x * tap_1xNxH(j)[None] for j, x in enumerate(shifted))


def rotations(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """RoPE's cosines and sines, [T, H / 2] each: pair i of a head at position t is turned by t / base^(2i / H)."""
    turned_by = config.rotary_base ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    angle_TxI = np.arange(config.context_length)[:, None] * turned_by[None]
    return np.cos(angle_TxI), np.sin(angle_TxI)


def visible_keys(config: ModelConfig, layer: int) -> np.ndarray:
    """Whether the query at each position sees each key, slots first, [T, M + T]."""
    T, M = config.context_length, config.num_slots
    seen_TxT = np.tri(T, dtype=bool) & ~np.tri(T, k=-config.windows[layer], dtype=bool)
    return np.concatenate([np.ones((T, M), bool), seen_TxT], axis=1)


def row_maximum(T: int, position: int | jax.Array, window: int | jax.Array | None, num_slots: int) -> jax.Array:
    """The most entropy that each of T rows from `position` on can have, [T] in nats: log of how many keys it sees."""
    visible_T = jnp.arange(T) + position + 1
    visible_T = (visible_T if window is None else jnp.minimum(visible_T, window)) + num_slots
    return jnp.log(visible_T.astype(jnp.float32))


def log_factors(config: ModelConfig, layer: int) -> np.ndarray | float:
    """What SM(log) multiplies the scores of each position with beside its s, log(visible keys) [T]; 1 without it."""
    return np.log(visible_keys(config, layer).sum(1)) if config.log_scale else 1.0


def rotate(x_BxTxNxH: jax.Array, position: int | jax.Array, config: ModelConfig) -> jax.Array:
    """Turns pairs of features, one of the first half of a head and one of the second, from `position` on."""
    wide = jnp.promote_types(x_BxTxNxH.dtype, jnp.float32)
    cosine, sine = (
        jax.lax.dynamic_slice_in_dim(jnp.asarray(table, wide), position, x_BxTxNxH.shape[1])[None, :, None]
        for table in rotations(config)
    )
    first, second = jnp.split(x_BxTxNxH.astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
    return turned.astype(x_BxTxNxH.dtype)
