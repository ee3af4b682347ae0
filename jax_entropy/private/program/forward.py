"""What is executed under secure computation: a forward pass as a list of stages, each a plain function of named arrays.

One list serves the whole program (all stages in one executable) and the account of it (each stage measured alone).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.census import ACTIVATIONS, NORMS, PRODUCTS
from jax_entropy.private.program.attention import attention, cached_attention
from jax_entropy.private.program.blueprint import Blueprint
from jax_entropy.private.program.export import Export
from jax_entropy.private.program.projections import linear, projections
from jax_entropy.private.program.stage import LAST, POSITION, TOKENS, Stage, compose, external_inputs


def forward(blueprint: Blueprint, num_tokens: int) -> list[Stage]:
    """Tokens → logits [T, V] of every position."""
    stages = [_embed(blueprint, num_tokens)]
    for layer in range(blueprint.config.num_layers):
        stages += _block(blueprint, layer, num_tokens)
    return [*stages, *_head(blueprint)]


def prefill(blueprint: Blueprint, num_tokens: int) -> list[Stage]:
    """As `forward`, but for the logits [1, V] of row `last` only; what a step reads of the past stays as `3.k`, …."""
    stages = [_embed(blueprint, num_tokens)]
    room = ((0, blueprint.config.context_length - num_tokens), (0, 0), (0, 0))
    for layer in range(blueprint.config.num_layers):
        stages += _block(blueprint, layer, num_tokens, keep=True)
        for name in "kv":
            stages.append(Stage("cache", layer, lambda x: jnp.pad(x, room), (f"{layer}.{name}",), (f"{layer}.{name}",)))
    row = Stage("last row", None, lambda x, last: jax.lax.dynamic_slice_in_dim(x, last, 1), ("x", LAST), ("x",))
    return [*stages, row, *_head(blueprint)]


def step(blueprint: Blueprint) -> list[Stage]:
    """One token that stands at `position` → logits [1, V]; the caches are read, and written with what is its own."""
    stages = [_embed(blueprint, None)]
    for layer in range(blueprint.config.num_layers):
        stages += _block(blueprint, layer, None)
    return [*stages, *_head(blueprint)]


def likeliest(logits_1xV: jax.Array) -> jax.Array:
    """The one-hot row [1, V] of the largest logit, found without argmax; equals share it."""
    return (logits_1xV >= logits_1xV.max(-1, keepdims=True)).astype(jnp.float32)


def float32_logits(exported: Export, tokens: Sequence[int]) -> np.ndarray:
    """The exported program's logits [T, V] as no engine rounds them."""
    stages = forward(exported.blueprint, len(tokens))
    names, known = external_inputs(stages), exported.weights | {TOKENS: exported.blueprint.enter(tokens)}
    (logits_TxV,) = compose(stages, names, ("logits",))(*(known[name] for name in names))
    return np.asarray(logits_TxV)


def _embed(blueprint: Blueprint, num_tokens: int | None) -> Stage:
    """Tokens at the first positions of the context; without `num_tokens`, one token at `position`."""
    placed = blueprint.present("positions")
    at = (POSITION,) if placed and num_tokens is None else ()

    def function(tokens: jax.Array, table_VxD: jax.Array, *positions: jax.Array) -> jax.Array:
        x_TxD = tokens @ table_VxD if blueprint.rewrites.one_hot else jnp.take(table_VxD, tokens, axis=0)
        if not placed:
            return x_TxD
        return x_TxD + (jax.lax.dynamic_slice_in_dim(*positions, 1) if at else positions[0][:num_tokens])

    return Stage("embedding", None, function, (TOKENS, "embedding", *placed, *at), ("x",))


def _norm(blueprint: Blueprint, field: str, layer: int | None, name: str) -> tuple[list[Stage], str]:
    """The normalisation that a field of the config asks for, and the name of what it leaves for its readers."""
    kind = getattr(blueprint.config, field)
    if kind == "none":
        return [], "x"
    parts = ("scale", "bias", "epsilon", "alpha", "left", "rate")
    found = tuple(part for part in parts if blueprint.present(f"{name}.{part}"))
    if kind == "frozen" and not {"scale", "left"} & {*found}:
        return [], "x"  # folded into what reads it

    def function(x_TxD: jax.Array, *weights: jax.Array) -> jax.Array:
        given = {part: weight.reshape(1, -1) for part, weight in zip(found, weights, strict=True)}
        if kind in ("layer", "frozen"):
            x_TxD = x_TxD - x_TxD.mean(-1, keepdims=True)
        if kind == "tanh":
            y_TxD = jnp.tanh(x_TxD * given["alpha"])
        elif kind == "frozen" and "left" not in given:
            y_TxD = x_TxD
        else:
            added = given.get("epsilon", blueprint.config.norm_epsilon)
            factor_Tx1 = jax.lax.rsqrt(jnp.square(x_TxD).mean(-1, keepdims=True) + added)
            y_TxD = x_TxD * (factor_Tx1 * given["left"] + given["rate"] if "left" in given else factor_Tx1)
        if "scale" in given:
            y_TxD = y_TxD * given["scale"]
        return y_TxD + given["bias"] if "bias" in given else y_TxD

    found_names = tuple(f"{name}.{part}" for part in found)
    return [Stage(NORMS[kind], layer, function, ("x", *found_names), ("y",))], "y"


def _block(blueprint: Blueprint, layer: int, num_tokens: int | None, keep: bool = False) -> list[Stage]:
    """A block on a whole prompt, or without `num_tokens` on one token at `position`.

    Args:
      keep: whether what a step reads of the prompt is an output too.
    """
    stages, read = _norm(blueprint, "norm", layer, f"{layer}.norm1")
    stages += projections(blueprint, layer, read, num_tokens, keep)
    stages += attention(blueprint, layer, num_tokens) if num_tokens else cached_attention(blueprint, layer)
    stages.append(linear(blueprint, "output projection", layer, f"{layer}.out", "mixed", "y"))
    stages.append(Stage("residual", layer, jnp.add, ("x", "y"), ("x",)))
    if layer >= blueprint.config.num_layers - blueprint.config.ffn_free_layers:
        return stages
    norm, read = _norm(blueprint, "norm", layer, f"{layer}.norm2")
    stages += norm
    if blueprint.one_matrix(layer):
        stages.append(linear(blueprint, "feed-forward", layer, f"{layer}.fused", read, "y"))
    elif blueprint.config.ffn == "bilinear":
        stages += _bilinear(blueprint, layer, read)
        stages.append(linear(blueprint, "feed-forward", layer, f"{layer}.down", "h", "y"))
    else:
        stages.append(linear(blueprint, "feed-forward", layer, f"{layer}.up", read, "h"))
        stages += _activation(blueprint, layer)
        stages.append(linear(blueprint, "feed-forward", layer, f"{layer}.down", "h", "y"))
    scales = blueprint.present(f"{layer}.alpha", f"{layer}.beta")
    if len(scales) == 2:
        function = lambda x, y, alpha, beta: x * beta.reshape(1, 1) + y / alpha.reshape(1, 1)  # noqa: E731
    elif scales:
        function = lambda x, y, beta: x * beta.reshape(1, 1) + y  # noqa: E731
    else:
        function = jnp.add
    stages.append(Stage("residual", layer, function, ("x", "y", *scales), ("x",)))
    return stages


def _bilinear(blueprint: Blueprint, layer: int, read: str) -> list[Stage]:
    """Both branches, in one product where they are joined, and what they are multiplied to."""
    kind, branches = PRODUCTS[blueprint.config.ffn], ("h", "gate")
    if blueprint.present(f"{layer}.branches.kernel"):
        split = lambda y: tuple(jnp.split(y, 2, axis=-1))  # noqa: E731
        stages = [
            linear(blueprint, "feed-forward", layer, f"{layer}.branches", read, "branches"),
            Stage("branches", layer, split, ("branches",), branches),
        ]
    else:
        stages = [
            linear(blueprint, "feed-forward", layer, f"{layer}.{name}", read, branch)
            for name, branch in zip(("up", "gate"), branches, strict=True)
        ]
    return [*stages, Stage(kind, layer, jnp.multiply, branches, ("h",))]


def _activation(blueprint: Blueprint, layer: int) -> list[Stage]:
    activation = blueprint.config.activation
    if activation == "identity":
        return []
    slope, amount = blueprint.present(f"{layer}.slope"), blueprint.present(f"{layer}.amount")

    def annealed(h_TxF: jax.Array, *constants: jax.Array) -> jax.Array:
        """As a run has it that takes the activation out."""
        y_TxF = function(h_TxF, *constants[: len(slope)])
        for amount in constants[len(slope) :]:
            y_TxF = y_TxF + (h_TxF - y_TxF) * amount.reshape(1, 1)
        return y_TxF

    def function(h_TxF: jax.Array, *slope: jax.Array) -> jax.Array:
        match activation:
            case "gelu":
                if not blueprint.rewrites.erf:
                    return jax.nn.gelu(h_TxF, approximate=False)
                return 0.5 * h_TxF * (1 + jax.lax.erf(h_TxF * 0.5**0.5))
            case "gelu_tanh":
                return jax.nn.gelu(h_TxF, approximate=True)
            case "relu":
                return jnp.maximum(h_TxF, 0)
            case "leaky_relu":
                positive = jnp.maximum(h_TxF, 0)
                factor = slope[0].reshape(1, 1) if slope else blueprint.config.negative_slope
                return positive + factor * (h_TxF - positive)
        raise NotImplementedError(f"activation={activation!r} has no stage")

    return [Stage(ACTIVATIONS[activation], layer, annealed, ("h", *slope, *amount), ("h",))]


def _head(blueprint: Blueprint) -> list[Stage]:
    norm, read = _norm(blueprint, "final_norm", None, "final_norm")
    return [*norm, linear(blueprint, "vocabulary", None, "head", read, "logits")]
