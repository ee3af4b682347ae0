"""What is executed under secure computation: a forward pass as a list of stages, each a plain function of named arrays.

One list serves the whole program (all stages in one executable) and the account of it (each stage measured alone).
"""

import jax
import jax.numpy as jnp

from jax_entropy.private.program.attention import attention, cached_attention
from jax_entropy.private.program.stage import LAST, POSITION, TOKENS, Shape, Stage, present


def forward(shape: Shape, num_tokens: int) -> list[Stage]:
    """Tokens → logits [T, V] of every position."""
    stages = [_embed(shape, slice(0, num_tokens))]
    for layer in range(shape.num_layers):
        stages += _block(shape, layer, attention(shape, layer, num_tokens))
    return [*stages, *_head(shape)]


def prefill(shape: Shape, num_tokens: int) -> list[Stage]:
    """As `forward`, but for the logits [1, V] of row `last` only; keys and values [S, N, H] stay as `3.k`, `3.v`."""
    stages = [_embed(shape, slice(0, num_tokens))]
    room = ((0, shape.context_length - num_tokens), (0, 0), (0, 0))
    for layer in range(shape.num_layers):
        stages += _block(shape, layer, attention(shape, layer, num_tokens))
        for name in "kv":
            stages.append(Stage("cache", layer, lambda x: jnp.pad(x, room), (f"{layer}.{name}",), (f"{layer}.{name}",)))
    row = Stage("cache", None, lambda x, last: jax.lax.dynamic_slice_in_dim(x, last, 1), ("x", LAST), ("x",))
    return [*stages, row, *_head(shape)]


def step(shape: Shape) -> list[Stage]:
    """One token that stands at `position` → logits [1, V]; keys and values are read, and written with its own."""
    stages = [_embed(shape, None)]
    for layer in range(shape.num_layers):
        stages += _block(shape, layer, cached_attention(shape, layer))
    return [*stages, *_head(shape)]


def last_logits(logits_1xV: jax.Array) -> jax.Array:
    """The one-hot row [1, V] of the largest logit, found without argmax; equals share it."""
    return (logits_1xV >= logits_1xV.max(-1, keepdims=True)).astype(jnp.float32)


def _embed(shape: Shape, rows: slice | None) -> Stage:
    def look_up(tokens, table_VxD):
        return tokens @ table_VxD if shape.steps.one_hot else jnp.take(table_VxD, tokens, axis=0)

    if rows is None:
        function = lambda tokens, table, positions_SxD, position: (  # noqa: E731
            look_up(tokens, table) + jax.lax.dynamic_slice_in_dim(positions_SxD, position, 1)
        )
        return Stage("embedding", None, function, (TOKENS, "embedding", "positions", POSITION), ("x",))
    function = lambda tokens, table, positions_SxD: look_up(tokens, table) + positions_SxD[rows]  # noqa: E731
    return Stage("embedding", None, function, (TOKENS, "embedding", "positions"), ("x",))


def _norm(shape: Shape, kind: str, layer: int | None, name: str) -> list[Stage]:
    if kind == "none":
        return [Stage("cache", layer, lambda x: x, ("x",), ("y",))]
    scale, bias, epsilon = (f"{name}.{part}" for part in ("scale", "bias", "epsilon"))
    found = present(shape, scale, bias, epsilon)

    def function(x_TxD, *weights):
        weights = dict(zip(found, weights, strict=True))
        if kind == "layer":
            x_TxD = x_TxD - x_TxD.mean(-1, keepdims=True)
        added = weights[epsilon].reshape(1, 1) if epsilon in weights else shape.epsilon
        y_TxD = x_TxD * jax.lax.rsqrt(jnp.square(x_TxD).mean(-1, keepdims=True) + added)
        if scale in weights:
            y_TxD = y_TxD * weights[scale][None]
        return y_TxD + weights[bias][None] if bias in weights else y_TxD

    return [Stage("LayerNorm" if kind == "layer" else "RMSNorm", layer, function, ("x", *found), ("y",))]


def _linear(shape: Shape, kind: str, layer: int | None, name: str, source: str, target: str) -> Stage:
    """target = source · kernel (+ bias)."""
    found = present(shape, f"{name}.bias")

    def function(x_TxI, kernel_IxO, *bias_O):
        y_TxO = x_TxI @ kernel_IxO
        return y_TxO + bias_O[0][None] if bias_O else y_TxO

    return Stage(kind, layer, function, (source, f"{name}.kernel", *found), (target,))


def _block(shape: Shape, layer: int, attended: list[Stage]) -> list[Stage]:
    stages = [*_norm(shape, shape.norm, layer, f"{layer}.norm1"), *_projections(shape, layer), *attended]
    stages.append(_linear(shape, "output projection", layer, f"{layer}.out", "mixed", "y"))
    stages.append(Stage("residual", layer, jnp.add, ("x", "y"), ("x",)))
    if layer >= shape.ffn_layers:
        return stages
    stages += _norm(shape, shape.norm, layer, f"{layer}.norm2")
    if shape.one_matrix:
        stages.append(_linear(shape, "feed-forward", layer, f"{layer}.fused", "y", "y"))
    else:
        stages.append(_linear(shape, "feed-forward", layer, f"{layer}.up", "y", "h"))
        stages += _activation(shape, layer)
        stages.append(_linear(shape, "feed-forward", layer, f"{layer}.down", "h", "y"))
    scales = present(shape, f"{layer}.alpha", f"{layer}.beta")
    if len(scales) == 2:
        function = lambda x, y, alpha, beta: x * beta.reshape(1, 1) + y / alpha.reshape(1, 1)  # noqa: E731
    elif scales:
        function = lambda x, y, beta: x * beta.reshape(1, 1) + y  # noqa: E731
    else:
        function = jnp.add
    stages.append(Stage("residual", layer, function, ("x", "y", *scales), ("x",)))
    return stages


def _projections(shape: Shape, layer: int) -> list[Stage]:
    heads = (shape.num_heads, shape.head_dim)
    names = tuple(f"{layer}.{name}" for name in "qkv")
    if shape.steps.qkv:
        split = lambda y: tuple(part.reshape(-1, *heads) for part in jnp.split(y, 3, axis=-1))  # noqa: E731
        return [
            _linear(shape, "projections", layer, f"{layer}.qkv", "y", "qkv"),
            Stage("cache", layer, split, ("qkv",), names),
        ]
    stages = [_linear(shape, "projections", layer, name, "y", name) for name in names]
    split = lambda *parts: tuple(part.reshape(-1, *heads) for part in parts)  # noqa: E731
    return [*stages, Stage("cache", layer, split, names, names)]


def _activation(shape: Shape, layer: int) -> list[Stage]:
    kinds = {"gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU", "leaky_relu": "leaky ReLU"}
    if shape.activation == "identity":
        return []
    slope = present(shape, f"{layer}.slope")

    def function(h_TxF, *slope):
        match shape.activation:
            case "gelu":
                half = 0.5 * h_TxF
                return (
                    half * (1 + jax.lax.erf(h_TxF * 0.5**0.5))
                    if shape.steps.erf
                    else jax.nn.gelu(h_TxF, approximate=False)
                )
            case "gelu_tanh":
                return jax.nn.gelu(h_TxF, approximate=True)
            case "relu":
                return jnp.maximum(h_TxF, 0)
            case "leaky_relu":
                positive = jnp.maximum(h_TxF, 0)
                factor = slope[0].reshape(1, 1) if slope else shape.negative_slope
                return positive + factor * (h_TxF - positive)

    return [Stage(kinds[shape.activation], layer, function, ("h", *slope), ("h",))]


def _head(shape: Shape) -> list[Stage]:
    return [
        *_norm(shape, shape.final_norm, None, "final_norm"),
        _linear(shape, "vocabulary", None, "head", "y", "logits"),
    ]
