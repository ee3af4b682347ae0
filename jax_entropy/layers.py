"""What a block is made of: attention, feed-forward, the block itself.

Modules are pure functions of their parameters; a block returns its attention statistics beside the residual stream.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jax_entropy.architecture import ModelConfig
from jax_entropy.attention import AttentionStats, attention
from jax_entropy.attention.transformed import capped, power
from jax_entropy.linear import Linear
from jax_entropy.norms import normalise
from jax_entropy.parts import Convolution, rotate, row_maximum
from jax_entropy.sharding import platform

_TEMPERATURE_FLOOR = 1e-4


def _linear(config: ModelConfig, role: str, out_shape: tuple[int, ...], **kwargs: Any) -> Linear:
    """The linear layer of one role (Q, K, V, O or FFN) under the config's biases and reparametrisation."""
    chosen = role in re.findall("FFN|[QKVO]", config.reparametrized)
    kwargs.setdefault("init_std", config.init_std)
    kwargs.setdefault("use_bias", config.bias == "all" or (config.bias == "qk" and role in "QK"))
    return Linear(
        out_shape,
        reparametrization=config.reparametrization if chosen else "none",
        dtype=config.dtype,
        **kwargs,
    )


def _residual_std(config: ModelConfig) -> float:
    return config.residual_init_std or config.init_std


class Stream(NamedTuple):
    """What goes from block to block; what later blocks read of the first ones is a field here."""

    residual_BxTxD: jax.Array
    first_value_BxTxNxH: jax.Array | None = None  # VRes: v of layer 0


class Shared(NamedTuple):
    """What all blocks are given alike."""

    position: int | jax.Array = 0  # at which the first token stands
    negative_slope: jax.Array | None = None  # of the leaky ReLU, where one is learned for all
    value_BxTxNxH: jax.Array | None = None  # VEmb: what its table has for the tokens


class Watched(NamedTuple):
    """What attention hands up beside its output; scanned, each leaf gets a leading L."""

    stats: AttentionStats
    threshold_N: jax.Array | None
    temperature_NxT: jax.Array | None
    maximum_T: jax.Array | None  # of the rows' entropies, where slots or a window change it


class Attention(nn.Module):
    """Multi-head causal attention with an optional temperature [N, T] and entropy threshold [N].

    With the collection `cache`, keys and values [B, S, N, H], tokens stand at a position and see what was read before.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, stream: Stream, layer: int | jax.Array, shared: Shared
    ) -> tuple[jax.Array, Stream, Watched]:
        """What is added to the stream, for its normalised form x; the stream as later layers read it; statistics."""
        config, position, (_, T, D) = self.config, shared.position, x_BxTxD.shape
        q_BxTxNxH, k_BxSxNxH, v_BxSxNxH = self._projections(x_BxTxD, position)
        if config.value_residual:
            v_BxSxNxH, stream = self._with_first_value(v_BxSxNxH, stream, layer)
        if config.rotary:
            q_BxTxNxH, k_BxSxNxH = (rotate(x, position, config) for x in (q_BxTxNxH, k_BxSxNxH))
        if config.value_embedding:
            v_BxSxNxH = self._with_embedded_value(v_BxSxNxH, shared.value_BxTxNxH, layer)

        window = jnp.asarray(config.windows)[layer] if config.window_pattern else None
        maximum_T = None
        if config.window_pattern or config.num_slots or config.log_scale:
            maximum_T = row_maximum(T, position, window, config.num_slots)
        if config.log_scale:
            q_BxTxNxH = self._scaled_by_log(q_BxTxNxH, maximum_T)
        temperature_NxT = threshold_N = None
        if config.learnable_temperature:
            temperature_NxT = jax.lax.dynamic_slice_in_dim(self._temperature(), position, T, axis=1)
        if config.entropy_regularizer:
            initializer = nn.initializers.constant(config.threshold_init)
            threshold_N = self.param("threshold", initializer, (config.num_heads,), jnp.float32)

        cached = self.has_variable("cache", "key")
        if cached:
            k_BxSxNxH = self._remember("key", k_BxSxNxH, position)
            v_BxSxNxH = self._remember("value", v_BxSxNxH, position)
        if config.num_slots:
            k_BxSxNxH, v_BxSxNxH = self._after_slots("slot_key", k_BxSxNxH), self._after_slots("slot_value", v_BxSxNxH)
        out_BxTxNxH, stats = attention(
            q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, temperature_NxT,
            position=position + config.num_slots if cached else None, window=window, num_slots=config.num_slots,
            transform=self._transform(), implementation=config.attention,
        )  # fmt: skip
        out = _linear(config, "O", (D,), in_axes=2, split_inputs=True, init_std=_residual_std(config), name="out")
        changed = config.window_pattern or config.num_slots
        watched = Watched(stats, threshold_N, temperature_NxT, maximum_T if changed else None)
        return out(out_BxTxNxH), stream, watched

    def _projections(self, x_BxTxD: jax.Array, position: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v [B, T, N, H], convolved over positions (Conv4), q and k normalised (QKN)."""
        config, heads = self.config, (self.config.num_heads, self.config.head_dim)
        q_BxTxNxH = _linear(config, "Q", heads, name="query")(x_BxTxD)
        k_BxTxNxH = _linear(config, "K", heads, name="key")(x_BxTxD)
        v_BxTxNxH = _linear(config, "V", heads, name="value")(x_BxTxD)
        if config.conv_width:
            q_BxTxNxH = Convolution(config.conv_width, name="query_convolution")(q_BxTxNxH, position)
            k_BxTxNxH = Convolution(config.conv_width, name="key_convolution")(k_BxTxNxH, position)
            v_BxTxNxH = Convolution(config.conv_width, name="value_convolution")(v_BxTxNxH, position)
        if config.qk_norm:
            q_BxTxNxH, k_BxTxNxH = (_of_size_1(x, config) for x in (q_BxTxNxH, k_BxTxNxH))
            gain_N = self.param("qk_gain", nn.initializers.ones, (config.num_heads,), jnp.float32)
            q_BxTxNxH = q_BxTxNxH * gain_N.astype(config.dtype)[None, None, :, None]
        return q_BxTxNxH, k_BxTxNxH, v_BxTxNxH

    def _with_first_value(
        self, v_BxTxNxH: jax.Array, stream: Stream, layer: int | jax.Array
    ) -> tuple[jax.Array, Stream]:
        """VRes: v mixed with that of layer 0, which in layer 0 is v itself; the stream that carries it on."""
        first_BxTxNxH = jnp.where(layer == 0, v_BxTxNxH, stream.first_value_BxTxNxH)
        initializer = nn.initializers.constant(self.config.value_residual_init)
        share = self.param("value_mix", initializer, (), jnp.float32).astype(self.config.dtype)
        mixed_BxTxNxH = v_BxTxNxH + share * (first_BxTxNxH - v_BxTxNxH)
        return mixed_BxTxNxH, stream._replace(first_value_BxTxNxH=first_BxTxNxH)

    def _with_embedded_value(
        self, v_BxTxNxH: jax.Array, embedded_BxTxNxH: jax.Array, layer: int | jax.Array
    ) -> jax.Array:
        """VEmb: v plus what its table has for the tokens, in the layers that have it."""
        config, initializer = self.config, nn.initializers.constant(self.config.value_embedding_init)
        scale = self.param("value_embedding_scale", initializer, (), jnp.float32)
        scale = jnp.where(jnp.asarray(config.embedded_values)[layer], scale, 0).astype(config.dtype)
        return v_BxTxNxH + scale * embedded_BxTxNxH

    def _scaled_by_log(self, q_BxTxNxH: jax.Array, maximum_T: jax.Array) -> jax.Array:
        """SM(log): q times s · log(visible keys), one learned s a head."""
        config, initializer = self.config, nn.initializers.constant(self.config.log_scale_init)
        factor_N = self.param("log_scale", initializer, (config.num_heads,), jnp.float32)
        factor_TxN = (maximum_T[:, None] * factor_N[None]).astype(config.dtype)
        return q_BxTxNxH * factor_TxN[None, :, :, None]

    def _remember(self, name: str, new_BxTxNxH: jax.Array, position: int | jax.Array) -> jax.Array:
        """All of the cache, with what is new at its position."""
        all_BxSxNxH = jax.lax.dynamic_update_slice_in_dim(self.get_variable("cache", name), new_BxTxNxH, position, 1)
        self.put_variable("cache", name, all_BxSxNxH)
        return all_BxSxNxH

    def _after_slots(self, name: str, x_BxSxNxH: jax.Array) -> jax.Array:
        """Mem8: learned keys or values before those of the tokens."""
        config, initializer = self.config, nn.initializers.normal(self.config.init_std)
        shape = (config.num_slots, config.num_heads, config.head_dim)
        slots_MxNxH = self.param(name, initializer, shape, jnp.float32).astype(x_BxSxNxH.dtype)
        slots_BxMxNxH = jnp.broadcast_to(slots_MxNxH[None], (len(x_BxSxNxH), *shape))
        return jnp.concatenate([slots_BxMxNxH, x_BxSxNxH], axis=1)

    def _transform(self) -> Callable[[jax.Array], jax.Array] | None:
        """What the logits pass through on their way into the softmax."""
        config = self.config
        if config.power:  # where it begins, (1 + s/p)^p is close to e^s
            initializer = nn.initializers.constant(float(config.power))
            shift_N = self.param("shift", initializer, (config.num_heads,), jnp.float32)
            return functools.partial(power, shift_N=positive(shift_N), exponent=config.power)
        return functools.partial(capped, cap=float(config.logit_cap)) if config.logit_cap else None

    def _temperature(self) -> jax.Array:
        """The divisor t of App. A, positive whatever the optimiser does to its parameter."""
        config, shape = self.config, (self.config.num_heads, self.config.context_length)
        log = config.temperature_parameter == "log"
        start = math.log(config.temperature_init) if log else config.temperature_init
        parameter = self.param("temperature", nn.initializers.constant(start), shape, jnp.float32)
        return temperature(parameter, config)


def temperature(parameter: jax.Array, config: ModelConfig) -> jax.Array:
    """The temperature that a parameter stands for: "direct" t ≈ |p| bounded away from 0, "log" t = exp(p)."""
    if config.temperature_parameter == "log":
        return jnp.exp(parameter)
    return positive(parameter)


def positive(parameter: jax.Array) -> jax.Array:
    """|p|, bounded away from 0."""
    return jnp.sqrt(jnp.square(parameter) + _TEMPERATURE_FLOOR**2)


def _of_size_1(x_BxTxNxH: jax.Array, config: ModelConfig) -> jax.Array:
    """Each head's vector with a mean square of 1, computed in float32."""
    wide = x_BxTxNxH.astype(jnp.promote_types(x_BxTxNxH.dtype, jnp.float32))
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_epsilon)
    return (wide * factor).astype(config.dtype)


class FeedForward(nn.Module):
    """d→F→d with an activation, one fused d→d matrix (§4), or bilinear: (x·W₁ ⊙ (x·W₂ + b))·W₃, b = 1 at first."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, slope: jax.Array | None) -> jax.Array:
        config, D = self.config, x_BxTxD.shape[-1]
        if config.ffn == "fused":
            return _linear(config, "FFN", (D,), init_std=_residual_std(config), name="fused")(x_BxTxD)
        hidden_BxTxF = _linear(config, "FFN", (config.hidden_dim,), name="up")(x_BxTxD)
        if config.slope == "layer" and config.activation == "leaky_relu":
            slope = self.param("negative_slope", nn.initializers.constant(config.negative_slope), (), jnp.float32)
        if config.ffn == "bilinear":
            # where the other branch is 1, the layer starts as a linear one
            gate = _linear(config, "FFN", (config.hidden_dim,), use_bias=True, bias_init=1.0, name="gate")
            hidden_BxTxF = hidden_BxTxF * gate(x_BxTxD)

        # The backward pass keeps what is activated, nothing on the way. Accelerators form the input of the next product
        # again too, which costs them less than to keep it, and a CPU more.
        again = platform() != "cpu" and config.activation != "identity"
        activate = _activate if again else jax.checkpoint(_activate, static_argnums=1, prevent_cse=False)

        def out(self, hidden_BxTxF: jax.Array, slope: jax.Array | None) -> jax.Array:
            hidden_BxTxF = self._annealed(hidden_BxTxF, activate(hidden_BxTxF, config, slope))
            down = _linear(config, "FFN", (D,), split_inputs=True, init_std=_residual_std(config), name="down")
            return down(hidden_BxTxF)

        return (nn.remat(out) if again else out)(self, hidden_BxTxF, slope)

    def _annealed(self, x: jax.Array, activated: jax.Array) -> jax.Array:
        """In a run that takes the activation out: its negative side gets a slope that rises from 0 to 1."""
        if not self.has_variable("annealing", "amount"):
            return activated
        amount = self.get_variable("annealing", "amount").astype(x.dtype)
        return amount * x + (1 - amount) * activated


def _activate(x: jax.Array, config: ModelConfig, slope: jax.Array | None) -> jax.Array:
    match config.activation:
        case "identity":
            return x
        case "gelu":
            # jax.nn.gelu goes through erfc, several times the cost of erf under secret sharing
            return 0.5 * x * (1 + jax.lax.erf(x * (0.5**0.5)))
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)
        case "leaky_relu":
            slope = jnp.asarray(config.negative_slope if slope is None else slope, x.dtype)
            return jnp.where(x >= 0, x, slope * x)


class Block(nn.Module):
    """Pre-norm block: X̂ = X + MHA(N1(X)), X_out = X̂ + FFN(N2(X̂)), or β·X̂ + FFN(X̂)/α (Eq. 8)."""

    config: ModelConfig
    with_ffn: bool

    @nn.compact
    def __call__(self, stream: Stream, layer: int | jax.Array, shared: Shared) -> tuple[Stream, Watched]:
        config, x_BxTxD = self.config, stream.residual_BxTxD
        normed_BxTxD = normalise(config.norm, config, "norm1")(x_BxTxD)
        attended_BxTxD, stream, watched = Attention(config, name="attention")(normed_BxTxD, stream, layer, shared)
        x_BxTxD = checkpoint_name(x_BxTxD + attended_BxTxD, "ffn")
        if self.with_ffn:
            normed_BxTxD = normalise(config.norm, config, "norm2")(x_BxTxD)
            ffn = FeedForward(config, name="ffn")(normed_BxTxD, shared.negative_slope)
            if config.scaled:
                alpha = self.param("alpha", nn.initializers.constant(config.alpha_init), (), jnp.float32)
                beta = self.param("beta", nn.initializers.constant(config.beta_init), (), jnp.float32)
                x_BxTxD = beta.astype(config.dtype) * x_BxTxD
                ffn = ffn / alpha.astype(config.dtype)
            x_BxTxD = x_BxTxD + ffn
        return stream._replace(residual_BxTxD=x_BxTxD), watched
