"""What is executed under secure computation: a forward pass as a list of stages, each a plain function of named arrays.

One list serves the whole program (all stages in one executable) and the account of it (each stage measured alone).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.census import ACTIVATIONS, NORMS, PRODUCTS
from jax_entropy.private.program.attention import attention, cached_attention, single_query
from jax_entropy.private.program.blueprint import Blueprint
from jax_entropy.private.program.export import Export
from jax_entropy.private.program.nonlinear import at_once, largest
from jax_entropy.private.program.projections import EMBEDDED_VALUE, linear, projections
from jax_entropy.private.program.stage import LAST, POSITION, TOKENS, Stage, compose, external_inputs, pieces, product


def forward(blueprint: Blueprint, num_tokens: int) -> list[Stage]:
    """Tokens → logits [T, V] of every position."""
    stages = [_embed(blueprint, num_tokens)]
    for layer in range(blueprint.config.num_layers):
        stages += _block(blueprint, layer, num_tokens)
    return [*stages, *_head(blueprint)]


def last(blueprint: Blueprint, num_tokens: int, keep: bool = False) -> list[Stage]:
    """As `forward`, but for the logits [1, V] of row `last` only; keys and values [T, N, H] stay as `3.k`, `3.v`."""
    stages, final = [_embed(blueprint, num_tokens)], blueprint.config.num_layers - 1
    for layer in range(blueprint.config.num_layers):
        only_last = blueprint.rewrites.last_row and layer == final
        stages += _block(blueprint, layer, num_tokens, keep=keep, only_last=only_last)
    return [*stages, *([] if blueprint.rewrites.last_row else [_cut(None, "x")]), *_head(blueprint)]


def prefill(blueprint: Blueprint, num_tokens: int) -> list[Stage]:
    """As `last`; what a step reads of the past stays as `3.k`, …, with room for all tokens of the context."""
    room = ((0, blueprint.config.context_length - num_tokens), (0, 0), (0, 0))
    pad = lambda x: jnp.pad(x, room)  # noqa: E731
    names = [(layer, f"{layer}.{name}") for layer in range(blueprint.config.num_layers) for name in "kv"]
    padded = [Stage("cache", layer, pad, (name,), (name,)) for layer, name in names]
    return [*last(blueprint, num_tokens, keep=True), *padded]


def _cut(layer: int | None, name: str) -> Stage:
    """Row `last` of an array."""
    row = lambda x, last: jax.lax.dynamic_slice_in_dim(x, last, 1)  # noqa: E731
    return Stage("last row", layer, row, (name, LAST), (name,))


def step(blueprint: Blueprint, num_keys: int) -> list[Stage]:
    """One token that stands at `position` → logits [1, V]; the caches are read, and written with what is its own.

    Args:
      num_keys: of the caches so many are looked at, more than `position`.
    """
    stages = [_embed(blueprint, None)]
    for layer in range(blueprint.config.num_layers):
        stages += _block(blueprint, layer, None, num_keys=num_keys)
    return [*stages, *_head(blueprint)]


def likeliest(logits_1xV: jax.Array) -> jax.Array:
    """The one-hot row [1, V] of the largest logit, found without argmax; equals share it."""
    return (logits_1xV >= largest(logits_1xV, at_once(logits_1xV.shape[-1]))[:, None]).astype(jnp.float32)


def float32_logits(exported: Export, tokens: Sequence[int]) -> np.ndarray:
    """The exported program's logits [T, V] as no engine rounds them, and with the exponential itself."""
    stages = forward(dataclasses.replace(exported.blueprint, squarings=()), len(tokens))
    names, known = external_inputs(stages), exported.weights | {TOKENS: exported.enter(tokens)}
    (logits_TxV,) = compose(stages, names, ("logits",))(*(known[name] for name in names))
    return np.asarray(logits_TxV)


def _embed(blueprint: Blueprint, num_tokens: int | None) -> Stage:
    """Tokens at the first positions of the context; without `num_tokens`, one token at `position`."""
    config, placed = blueprint.config, blueprint.present("positions")
    at = (POSITION,) if placed and num_tokens is None else ()

    table = () if blueprint.embedding == "public" else ("embedding",)

    def function(tokens: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        table_VxO, positions = arrays[: len(table)], arrays[len(table) :]
        if not table:
            y_TxO = tokens
        elif blueprint.rewrites.one_hot:
            parts = pieces(*table_VxO[0].shape, blueprint.piece)
            y_TxO = functools.reduce(jnp.add, [tokens[:, part] @ table_VxO[0][part] for part in parts])
        else:
            y_TxO = jnp.take(table_VxO[0], tokens, axis=0)
        x_TxD, *values = jnp.split(y_TxO, y_TxO.shape[1] // config.model_dim, axis=1)
        if placed:
            x_TxD += jax.lax.dynamic_slice_in_dim(*positions, 1) if at else positions[0][:num_tokens]
        return x_TxD, *(value.reshape(-1, config.num_heads, config.head_dim) for value in values)

    outputs = ("x", EMBEDDED_VALUE) if config.value_embedding else ("x",)
    return Stage("embedding", None, function, (TOKENS, *table, *placed, *at), outputs)


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


def _block(
    blueprint: Blueprint, layer: int, num_tokens: int | None, keep: bool = False, only_last: bool = False,
    num_keys: int = 0,
) -> list[Stage]:  # fmt: skip
    """A block on a whole prompt, or without `num_tokens` on one token at `position` that looks at `num_keys`.

    Args:
      keep: whether what a step reads of the prompt is an output too.
      only_last: whether what comes after the keys and values is for row `last` only.
    """
    stages, read = _norm(blueprint, "norm", layer, f"{layer}.norm1")
    stages += projections(blueprint, layer, read, num_tokens, keep)
    if only_last:
        stages += [_cut(layer, f"{layer}.q"), _cut(layer, "x"), *single_query(blueprint, layer, LAST, num_tokens)]
    else:
        stages += (
            attention(blueprint, layer, num_tokens) if num_tokens else cached_attention(blueprint, layer, num_keys)
        )
    if blueprint.joined:
        return [*stages, _joined(blueprint, layer)]
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


def _joined(blueprint: Blueprint, layer: int) -> Stage:
    """The stream and what attention mixed → the stream after the block, and what the next one splits into heads."""
    name, D = f"{layer}.joined", blueprint.config.model_dim
    found = blueprint.present(f"{name}.bias")

    def function(x_TxD: jax.Array, mixed_TxD: jax.Array, kernel: jax.Array, *bias: jax.Array) -> tuple[jax.Array, ...]:
        y = product(jnp.concatenate([x_TxD, mixed_TxD], axis=-1), kernel, blueprint.piece)
        y = y + bias[0][None] if bias else y
        return (x_TxD + y[:, :D], y[:, D:]) if kernel.shape[1] > D else (x_TxD + y,)

    follows = ("qkv",) if layer < blueprint.config.num_layers - 1 else ()
    return Stage("feed-forward", layer, function, ("x", "mixed", f"{name}.kernel", *found), ("x", *follows))


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
