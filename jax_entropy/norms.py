"""Normalisations of a block's input: LayerNorm and RMSNorm, and what may stand in their place.

Statistics are float32 in every type; a frozen norm has none at the end, and folds into the next matrix.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_entropy.architecture import ModelConfig
from jax_entropy.sharding import platform

_RATE_MEMORY = 0.99  # of a frozen norm's mean rate, a forward pass of training


def normalise(kind: str, config: ModelConfig, name: str) -> Callable[[jax.Array], jax.Array]:
    """The normalisation layer of a kind, statistics in float32; the identity for "none"."""
    if kind == "none":
        return lambda x: x
    if kind in ("frozen", "tanh"):
        return (FrozenNorm if kind == "frozen" else DynamicTanh)(config, name=name)
    if kind == "layer" and platform() == "gpu":
        return LayerNorm(config, name=name)
    # the backward pass keeps x, nothing on the way, which is float32
    layer = nn.remat(nn.LayerNorm if kind == "layer" else nn.RMSNorm, prevent_cse=False)
    # E[x²] − E[x]² would lose the variance of a stream whose mean is large
    options = dict(use_fast_variance=False) if kind == "layer" else {}
    return layer(epsilon=config.norm_epsilon, dtype=config.dtype, name=name, **options)


class LayerNorm(nn.Module):
    """Flax's LayerNorm, and its parameters, as a GPU computes it faster."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        D = x_BxTxD.shape[-1:]
        scale_D = self.param("scale", nn.initializers.ones, D, jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, D, jnp.float32)
        y_RxD = layer_norm(x_BxTxD.reshape(-1, *D), scale_D, bias_D, self.config.norm_epsilon)
        return y_RxD.reshape(x_BxTxD.shape).astype(self.config.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_RxD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm of rows, statistics in float32 or better.

    Its backward pass reads x and dy as they lie. Of Flax's, a GPU takes float32 arrays of their size through memory; a
    TPU does not, and would move 13 % more bytes a step with this one (docs/log.md).
    """
    return _layer_norm(x_RxD, scale_D, bias_D, epsilon)[0]


def _layer_norm(x_RxD, scale_D, bias_D, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide_RxD = x_RxD.astype(jnp.promote_types(x_RxD.dtype, jnp.float32))
    mean_Rx1 = jnp.mean(wide_RxD, axis=1, keepdims=True)
    # E[x²] − E[x]² would lose the variance of a stream whose mean is large
    rate_Rx1 = jax.lax.rsqrt(jnp.mean(jnp.square(wide_RxD - mean_Rx1), axis=1, keepdims=True) + epsilon)
    y_RxD = (wide_RxD - mean_Rx1) * rate_Rx1 * scale_D[None] + bias_D[None]
    # kept as they are: computed again in the backward pass, they would take x̂ through memory
    mean_Rx1, rate_Rx1 = jax.lax.optimization_barrier((mean_Rx1, rate_Rx1))
    return y_RxD.astype(x_RxD.dtype), (x_RxD, mean_Rx1, rate_Rx1, scale_D)


def _layer_norm_backward(epsilon: float, residuals: tuple, dy_RxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_RxD, mean_Rx1, rate_Rx1, scale_D = residuals
    dy_RxD = dy_RxD.astype(mean_Rx1.dtype)
    normed_RxD = (x_RxD.astype(mean_Rx1.dtype) - mean_Rx1) * rate_Rx1
    scaled_RxD = dy_RxD * scale_D[None]
    of_mean = jnp.mean(scaled_RxD, axis=1, keepdims=True)
    of_rate = jnp.mean(scaled_RxD * normed_RxD, axis=1, keepdims=True)
    dx_RxD = rate_Rx1 * (scaled_RxD - of_mean - normed_RxD * of_rate)
    return dx_RxD.astype(x_RxD.dtype), jnp.sum(dy_RxD * normed_RxD, axis=0), jnp.sum(dy_RxD, axis=0)


layer_norm.defvjp(_layer_norm, _layer_norm_backward)


class FrozenNorm(nn.Module):
    """LayerNorm without its row statistics: (x − mean)·scale + bias, a linear map that the next matrix takes in.

    With the collection `annealing` it is on its way there: x is multiplied by 1/deviation of its row, of which an
    `amount` is already `rate`, the mean of all rows seen so far.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        config, D = self.config, x_BxTxD.shape[-1:]
        scale_D = self.param("scale", nn.initializers.ones, D, jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, D, jnp.float32)
        x_BxTxD = x_BxTxD.astype(jnp.promote_types(x_BxTxD.dtype, jnp.float32))
        x_BxTxD = x_BxTxD - jnp.mean(x_BxTxD, axis=-1, keepdims=True)
        if self.has_variable("annealing", "amount"):
            rate_BxTx1 = jax.lax.rsqrt(jnp.mean(jnp.square(x_BxTxD), axis=-1, keepdims=True) + config.norm_epsilon)
            amount, rate = self.get_variable("annealing", "amount"), self.get_variable("annealing", "rate")
            if self.is_mutable_collection("annealing"):
                mean = jax.lax.stop_gradient(jnp.mean(rate_BxTx1))
                followed = jnp.where(rate == 0, mean, _RATE_MEMORY * rate + (1 - _RATE_MEMORY) * mean)
                rate = jnp.where(amount < 1, followed, rate)
                self.put_variable("annealing", "rate", rate)
            x_BxTxD = x_BxTxD * ((1 - amount) * rate_BxTx1 + amount * rate)
        return (x_BxTxD * scale_D[None, None] + bias_D[None, None]).astype(config.dtype)


class DynamicTanh(nn.Module):
    """tanh(α·x)·scale + bias in place of a norm, α learned (DyT, arXiv 2503.10622)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        alpha = self.param("alpha", nn.initializers.constant(0.5), (), jnp.float32)
        scale_D = self.param("scale", nn.initializers.ones, x_BxTxD.shape[-1:], jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, x_BxTxD.shape[-1:], jnp.float32)
        y_BxTxD = jnp.tanh(alpha * x_BxTxD.astype(jnp.promote_types(x_BxTxD.dtype, jnp.float32)))
        return (y_BxTxD * scale_D[None, None] + bias_D[None, None]).astype(self.config.dtype)
