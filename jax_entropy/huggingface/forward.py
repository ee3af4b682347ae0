"""The forward pass of a decoder over `je.attention`, block by block: losses or logits, and what its heads do."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.attention import attention
from jax_entropy.huggingface.decoder import Decoder, Params, Weights
from jax_entropy.loss import token_losses

_ACTIVATE = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Heads(NamedTuple):
    """What the heads of a block, or of all, did; [B, N, T] of a block, [L, B, N, T] of all.

    Attributes:
      entropy: of each row, nats.
      sink: weight on the first token.
      max_logit: the largest of each row, scaled as the softmax sees it.
    """

    entropy: np.ndarray
    sink: np.ndarray
    max_logit: np.ndarray


def hidden(decoder: Decoder, weights: Weights, tokens_BxT: np.ndarray) -> tuple[jax.Array, Heads]:
    """The stream after the final norm, [B, T, D], and all heads; memory holds one block's weights."""
    x_BxTxD = jnp.asarray(weights.outer("embedding")["weight"][tokens_BxT])
    if not decoder.frequencies:
        x_BxTxD += weights.outer("positions")["weight"][None, : tokens_BxT.shape[1]]
    found = []
    for layer in range(decoder.num_layers):
        x_BxTxD, heads = _block(
            x_BxTxD, weights.block(layer), decoder=decoder._replace(windows=(), scales=()),
            window=decoder.windows[layer], scale=decoder.scales[layer],
        )  # fmt: skip
        found.append(jax.device_get(heads))
    final = weights.outer("final_norm")
    return _norm(x_BxTxD, final, decoder), Heads(*map(np.stack, zip(*found, strict=True)))


def logits(decoder: Decoder, weights: Weights, tokens_BxT: np.ndarray) -> tuple[jax.Array, Heads]:
    """Logits [B, T, V] and all heads."""
    x_BxTxD, heads = hidden(decoder, weights, tokens_BxT)
    head = weights.outer("head")
    with jax.default_matmul_precision("highest"):
        return _biased(jnp.einsum("BTD,VD->BTV", x_BxTxD, head["weight"]), head), heads


def losses(decoder: Decoder, weights: Weights, tokens_BxT1: np.ndarray) -> tuple[np.ndarray, Heads]:
    """Cross-entropy of every token but the first, nats [B, T], and all heads; no [B, T, V] is kept."""
    x_BxTxD, heads = hidden(decoder, weights, tokens_BxT1[:, :-1])
    head = weights.outer("head")
    if "bias" in head:  # one more number of the stream, which is 1
        head["weight"] = np.concatenate([head["weight"], head["bias"][:, None]], axis=1)
        x_BxTxD = jnp.concatenate([x_BxTxD, jnp.ones_like(x_BxTxD[..., :1])], axis=-1)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(token_losses)(x_BxTxD, head["weight"], tokens_BxT1[:, 1:])), heads


@functools.partial(jax.jit, static_argnames=("decoder", "window", "scale"))
def _block(
    x_BxTxD: jax.Array, params: Params, *, decoder: Decoder, window: int, scale: float
) -> tuple[jax.Array, Heads]:
    with jax.default_matmul_precision("highest"):
        attended_BxTxD, heads = _attend(_norm(x_BxTxD, params["norm1"], decoder), params, decoder, window, scale)
        read_BxTxD = x_BxTxD if decoder.parallel else x_BxTxD + attended_BxTxD
        x_BxTxD += attended_BxTxD + _feed_forward(_norm(read_BxTxD, params["norm2"], decoder), params, decoder)
        return x_BxTxD, heads


def _attend(x_BxTxD: jax.Array, params: Params, decoder: Decoder, window: int, scale: float) -> tuple[jax.Array, Heads]:
    (B, T, _), H, groups = x_BxTxD.shape, decoder.head_dim, decoder.num_heads // decoder.num_groups
    q, k, v = (_linear(x_BxTxD, params[name]).reshape(B, T, -1, H) for name in ("query", "key", "value"))
    q_BxTxNxH = _rotated(q, decoder.frequencies) * (scale * H**0.5)  # the operator divides by √H
    k_BxTxNxH, v_BxTxNxH = (jnp.repeat(x, groups, axis=2) for x in (_rotated(k, decoder.frequencies), v))
    out_BxTxNxH, stats = attention(q_BxTxNxH, k_BxTxNxH, v_BxTxNxH, window=window if window < T else None)
    first_BxNxT = jnp.einsum("BTNH,BNH->BNT", q_BxTxNxH, k_BxTxNxH[:, 0]) * H**-0.5
    sink_BxNxT = jnp.where(jnp.arange(T)[None, None] < window, jnp.exp(first_BxNxT - stats.logsumexp), 0)
    heads = Heads(stats.entropy, sink_BxNxT, stats.max_logit)
    return _linear(out_BxTxNxH.reshape(B, T, -1), params["out"]), heads


def _feed_forward(x_BxTxD: jax.Array, params: Params, decoder: Decoder) -> jax.Array:
    activate, up_BxTxF = _ACTIVATE[decoder.activation], _linear(x_BxTxD, params["up"])
    if decoder.gated:
        return _linear(activate(_linear(x_BxTxD, params["gate"])) * up_BxTxF, params["down"])
    return _linear(activate(up_BxTxF), params["down"])


def _linear(x_BxTxI: jax.Array, module: dict[str, jax.Array]) -> jax.Array:
    return _biased(jnp.einsum("BTI,IO->BTO", x_BxTxI, module["weight"]), module)


def _biased(x_BxTxO: jax.Array, module: dict[str, jax.Array]) -> jax.Array:
    return x_BxTxO + module["bias"][None, None] if "bias" in module else x_BxTxO


def _norm(x: jax.Array, module: dict[str, jax.Array], decoder: Decoder) -> jax.Array:
    if decoder.norm == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + decoder.epsilon)
    return _biased(x * module["weight"][None, None], module)


def _rotated(x_BxTxNxH: jax.Array, frequencies: tuple[float, ...]) -> jax.Array:
    """The first 2·len numbers of a head turned, the first half of them with the second."""
    if not (half := len(frequencies)):
        return x_BxTxNxH
    angle_TxR = np.arange(x_BxTxNxH.shape[1])[:, None] * np.asarray(frequencies)
    cos, sin = (np.float32(f(angle_TxR))[None, :, None] for f in (np.cos, np.sin))
    first, second, rest = jnp.split(x_BxTxNxH, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
