"""A private program is a list of stages, each a plain function of named arrays; one or all of them are compiled.

Arrays are weights by their names in the blueprint, what stages write, and the few that are put there for each token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.private.program.blueprint import Blueprint

LAST, POSITION, TOKENS = "last", "position", "tokens"
PUBLIC = (LAST, POSITION)
# The name of a cache as a step finds it, before its own key or value is written.
PAST = ".past"


class Stage(NamedTuple):
    """One part of a program: `function(*inputs)` gives the outputs. kind is what it is accounted under."""

    kind: str
    layer: int | None
    function: Callable
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def run_stage(stage: Stage, known: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """The stage's outputs, its inputs being among the known arrays."""
    results = stage.function(*(known[name] for name in stage.inputs))
    return results if isinstance(results, tuple) else (results,)


def product(x_TxI: jax.Array, kernel_IxO: jax.Array, piece: int) -> jax.Array:
    """x · kernel, whose columns are cut where it has more weights than a piece."""
    inputs, outputs = kernel_IxO.shape
    if not piece or inputs * outputs <= piece:
        return x_TxI @ kernel_IxO
    return jnp.concatenate([x_TxI @ kernel_IxO[:, part] for part in pieces(outputs, inputs, piece)], axis=-1)


def pieces(size: int, other: int, piece: int) -> list[slice]:
    """A size cut so that each part times the other is a piece at most."""
    step = max(piece // other, 1) if piece else size
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def compose(stages: Sequence[Stage], inputs: Sequence[str], outputs: Sequence[str]) -> Callable:
    """The stages as one function of arrays in the order of `inputs`."""

    def function(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        known = dict(zip(inputs, arrays, strict=True))
        for stage in stages:
            known |= zip(stage.outputs, run_stage(stage, known), strict=True)
        return tuple(known[name] for name in outputs)

    return function


def external_inputs(stages: Sequence[Stage]) -> tuple[str, ...]:
    """What the stages read before any of them writes it."""
    written, read = set(), {}
    for stage in stages:
        read |= {name: None for name in stage.inputs if name not in written}
        written |= set(stage.outputs)
    return tuple(read)


def caches(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """What a step reads of the tokens before it, by name, and its shape."""
    config = blueprint.config
    shapes = dict.fromkeys("kv", (config.context_length, config.num_heads, config.head_dim))
    if config.conv_width:
        shapes["rows"] = (config.conv_width - 1, config.model_dim)
    return {f"{layer}.{name}": shape for layer in range(config.num_layers) for name, shape in shapes.items()}


def input_types(
    blueprint: Blueprint, names: Sequence[str], num_tokens: int, known: Mapping[str, jax.ShapeDtypeStruct] = {}
) -> list[jax.ShapeDtypeStruct]:
    """Types of a program's inputs: what stages wrote is in `known`, the rest are weights, tokens, positions, caches."""
    past = {name + PAST: shape for name, shape in caches(blueprint).items()}

    def one(name: str) -> jax.ShapeDtypeStruct:
        if name in known:
            return known[name]
        if name in blueprint.weights:
            return jax.ShapeDtypeStruct(tuple(blueprint.weights[name]), np.float32)
        if name == TOKENS:
            return blueprint.token_type(num_tokens)
        if name in PUBLIC:
            return jax.ShapeDtypeStruct((), np.int32)
        if name in past:
            return jax.ShapeDtypeStruct(past[name], np.float32)
        raise KeyError(f"nothing writes {name!r}, which a stage reads")

    return [one(name) for name in names]


def lower(function: Callable, inputs: Sequence[jax.ShapeDtypeStruct]) -> bytes:
    """A serialized HLO module that the engine compiles."""
    lowered = jax.jit(function, keep_unused=True).trace(*inputs).lower(lowering_platforms=("cpu",))
    return lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
