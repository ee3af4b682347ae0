"""What a private program is made of: the steps that make it cheaper, the public shape of its model, and its stages."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class Steps:
    """What makes a program cheaper without changing its function; each can be switched off.

    one_hot: tokens enter as one-hot rows that their owner makes; off, as secret indices of a gather.
    packed: the softmax sees the tiles on and under the diagonal only; off, the whole square.
    denominator: one reciprocal a row, multiplied after the product with V; off, every weight is divided.
    temperature: 1/(t·√H) multiplies the queries, 1/√H disappears in their kernel; off, scores are divided.
    folded: scales and biases of norms, α, β and biases disappear in the matrices beside them.
    merged: two matrices with nothing between them are one.
    qkv: queries, keys and values are one product.
    erf: GELU as x/2·(1 + erf(x/√2)); off, through erfc.
    one_dot: a single query meets the keys of all heads in one product, and so do its weights the values; off, in N.
    cached: weights are opened once, masked, and not at each use (SEMI2K; the others gain nothing).
    """

    one_hot: bool = True
    packed: bool = True
    denominator: bool = True
    temperature: bool = True
    folded: bool = True
    merged: bool = True
    qkv: bool = True
    erf: bool = True
    one_dot: bool = True
    cached: bool = True


NO_STEPS = Steps(**{field.name: False for field in dataclasses.fields(Steps)})
# As the model is written, where GELU is in its erf form. The client makes one-hot rows even so: a secret index of a
# real vocabulary is out of the question.
PLAIN = dataclasses.replace(NO_STEPS, one_hot=True, erf=True)


def export_name(steps: Steps) -> str:
    """What an export is called in tables: "optimised", "plain", or without what."""
    off = [field.name for field in dataclasses.fields(Steps) if not getattr(steps, field.name)]
    return "plain" if steps == PLAIN else f"without {', '.join(off)}" if off else "optimised"


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that a program says about its model, and all that both parties know of it; no weight is in it."""

    architecture: str
    steps: Steps
    num_layers: int
    num_heads: int
    model_dim: int
    context_length: int
    vocab_size: int
    norm: str
    final_norm: str
    epsilon: float | None  # None: a secret one for each norm
    activation: str
    negative_slope: float | None  # None: a secret one for each layer
    ffn_layers: int
    one_matrix: bool  # the feed-forward is a single matrix
    weights: tuple[str, ...]  # names

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads


class Stage(NamedTuple):
    """One step of a program: `function(*inputs)` gives the outputs. kind is what it is accounted under."""

    kind: str
    layer: int | None
    function: Callable
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


LAST, POSITION, TOKENS = "last", "position", "tokens"
PUBLIC = (LAST, POSITION)


def compose(stages: Sequence[Stage], inputs: Sequence[str], outputs: Sequence[str]) -> Callable:
    """The stages as one function of arrays in the order of `inputs`."""

    def function(*arrays):
        known = dict(zip(inputs, arrays, strict=True))
        for stage in stages:
            known |= zip(stage.outputs, run_stage(stage, known), strict=True)
        return tuple(known[name] for name in outputs)

    return function


def run_stage(stage: Stage, known: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    results = stage.function(*(known[name] for name in stage.inputs))
    return results if isinstance(results, tuple) else (results,)


def external_inputs(stages: Sequence[Stage]) -> tuple[str, ...]:
    """What the stages read before any of them writes it."""
    written, read = set(), {}
    for stage in stages:
        read |= {name: None for name in stage.inputs if name not in written}
        written |= set(stage.outputs)
    return tuple(read)


def present(shape: Shape, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in shape.weights)
