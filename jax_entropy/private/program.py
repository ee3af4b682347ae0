"""What is executed under secure computation: a forward pass as a list of stages, each a plain function of named arrays.

One list serves the whole program (all stages in one executable) and the account of it (each stage measured alone).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


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


def forward(shape: Shape, num_tokens: int) -> list[Stage]:
    """Tokens → logits [T, V] of every position."""
    stages = [_embed(shape, slice(0, num_tokens))]
    for layer in range(shape.num_layers):
        stages += _block(shape, layer, _attention(shape, layer, num_tokens))
    return [*stages, *_head(shape)]


def prefill(shape: Shape, num_tokens: int) -> list[Stage]:
    """As `forward`, but for the logits [1, V] of row `last` only, and with keys and values [S, N, H] kept as `3.k`, `3.v`."""
    stages = [_embed(shape, slice(0, num_tokens))]
    room = ((0, shape.context_length - num_tokens), (0, 0), (0, 0))
    for layer in range(shape.num_layers):
        stages += _block(shape, layer, _attention(shape, layer, num_tokens))
        for name in "kv":
            stages.append(Stage("cache", layer, lambda x: jnp.pad(x, room), (f"{layer}.{name}",), (f"{layer}.{name}",)))
    row = Stage("cache", None, lambda x, last: jax.lax.dynamic_slice_in_dim(x, last, 1), ("x", LAST), ("x",))
    return [*stages, row, *_head(shape)]


def step(shape: Shape) -> list[Stage]:
    """One token that stands at `position` → logits [1, V]; keys and values are read, and written with its own."""
    stages = [_embed(shape, None)]
    for layer in range(shape.num_layers):
        stages += _block(shape, layer, _cached_attention(shape, layer))
    return [*stages, *_head(shape)]


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


def last_logits(logits_1xV: jax.Array) -> jax.Array:
    """The one-hot row [1, V] of the largest logit, found without argmax; equals share it."""
    return (logits_1xV >= logits_1xV.max(-1, keepdims=True)).astype(jnp.float32)


def _optional(shape: Shape, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in shape.weights)


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
    present = _optional(shape, scale, bias, epsilon)

    def function(x_TxD, *weights):
        weights = dict(zip(present, weights, strict=True))
        if kind == "layer":
            x_TxD = x_TxD - x_TxD.mean(-1, keepdims=True)
        added = weights[epsilon].reshape(1, 1) if epsilon in weights else shape.epsilon
        y_TxD = x_TxD * jax.lax.rsqrt(jnp.square(x_TxD).mean(-1, keepdims=True) + added)
        if scale in weights:
            y_TxD = y_TxD * weights[scale][None]
        return y_TxD + weights[bias][None] if bias in weights else y_TxD

    return [Stage("LayerNorm" if kind == "layer" else "RMSNorm", layer, function, ("x", *present), ("y",))]


def _linear(shape: Shape, kind: str, layer: int | None, name: str, source: str, target: str) -> Stage:
    """target = source · kernel (+ bias)."""
    present = _optional(shape, f"{name}.bias")

    def function(x_TxI, kernel_IxO, *bias_O):
        y_TxO = x_TxI @ kernel_IxO
        return y_TxO + bias_O[0][None] if bias_O else y_TxO

    return Stage(kind, layer, function, (source, f"{name}.kernel", *present), (target,))


def _block(shape: Shape, layer: int, attention: list[Stage]) -> list[Stage]:
    stages = [*_norm(shape, shape.norm, layer, f"{layer}.norm1"), *_projections(shape, layer), *attention]
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
    scales = _optional(shape, f"{layer}.alpha", f"{layer}.beta")
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


def _tempered(shape: Shape, layer: int, rows) -> list[Stage]:
    """Queries times their constants 1/(t·√H), where these are not in the kernel already."""
    present = _optional(shape, f"{layer}.inverse_temperature")
    function = lambda q_TxNxH, c_NxS, *at: q_TxNxH * rows(c_NxS, *at).T[:, :, None]  # noqa: E731
    at = () if isinstance(rows, _Rows) else (POSITION,)
    return [Stage("temperature", layer, function, (f"{layer}.q", *present, *at), (f"{layer}.q",))] if present else []


class _Rows(NamedTuple):
    """The first columns of a [N, S] array."""

    count: int

    def __call__(self, values_NxS):
        return values_NxS[:, : self.count]


def _column(values_NxS, position):
    return jax.lax.dynamic_slice_in_dim(values_NxS, position, 1, axis=1)


def _divisor(shape: Shape, temperature_NxT):
    """What scores are divided by where nothing is folded."""
    root = math.sqrt(shape.head_dim)
    return root if temperature_NxT is None else temperature_NxT[..., None] * root


def _attention(shape: Shape, layer: int, num_tokens: int) -> list[Stage]:
    q, k, v = (f"{layer}.{name}" for name in "qkv")
    divided = _optional(shape, f"{layer}.temperature")
    rows = _Rows(num_tokens)

    def scores(q_TxNxH, k_TxNxH, *temperature_NxS):
        scores_NxTxT = jnp.einsum("TNH,SNH->NTS", q_TxNxH, k_TxNxH)
        if shape.steps.temperature:
            return scores_NxTxT
        return scores_NxTxT / _divisor(shape, rows(*temperature_NxS) if temperature_NxS else None)

    return [
        *_tempered(shape, layer, rows),
        Stage("scores", layer, scores, (q, k, *divided), ("scores",)),
        *_softmax(shape, layer, functools.partial(_causal_exponentials, shape.steps.packed)),
        _mix(shape, layer, v, "NTS,SNH->TNH"),
    ]


def _softmax(shape: Shape, layer: int, exponentials: Callable, *extra: str) -> list[Stage]:
    """scores → weights, or unnormalised ones and the reciprocals of their sums."""

    def function(*arrays):
        weights, total = exponentials(*arrays)
        return (weights, 1 / total) if shape.steps.denominator else weights / total[..., None]

    outputs = ("weights", "reciprocal") if shape.steps.denominator else ("weights",)
    return [Stage("softmax", layer, function, ("scores", *extra), outputs)]


def _mix(shape: Shape, layer: int, values: str, equation: str) -> Stage:
    def function(weights_NxTxS, v_SxNxH, *reciprocal_NxT):
        out_TxNxH = jnp.einsum(equation, weights_NxTxS, v_SxNxH)
        for factor_NxT in reciprocal_NxT:
            out_TxNxH = out_TxNxH * factor_NxT.T[..., None]
        return out_TxNxH.reshape(-1, shape.model_dim)

    reciprocal = ("reciprocal",) if shape.steps.denominator else ()
    return Stage("mix", layer, function, ("weights", values, *reciprocal), ("mixed",))


def _causal_exponentials(packed: bool, scores_NxTxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(score − row maximum) under the causal mask [N, T, T], and its row sums [N, T].

    Masked scores are replaced by their row's diagonal one, so that the exponential never sees a large negative number.
    """
    N, T, _ = scores_NxTxT.shape
    tile = _tile(T) if packed else T
    n = T // tile
    seen = jnp.tril(jnp.ones((tile, tile)))[None, None]
    tiles = [(i, j) for i in range(n) for j in range(i + 1)]
    index = {pair: place for place, pair in enumerate(tiles)}
    cut = lambda i, j: scores_NxTxT[:, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]  # noqa: E731
    on_NxIxQxK = jnp.stack([cut(i, i) for i in range(n)], axis=1)
    diagonal_NxIxQx1 = (on_NxIxQxK * jnp.eye(tile)[None, None]).sum(-1, keepdims=True)
    on_NxIxQxK = on_NxIxQxK * seen + diagonal_NxIxQx1 * (1 - seen)
    stack_NxPxQxK = jnp.stack([on_NxIxQxK[:, i] if i == j else cut(i, j) for i, j in tiles], axis=1)
    largest_NxPxQ = stack_NxPxQxK.max(-1)
    # rows of the triangle are filled up with their last tile, so that one maximum serves them all
    rows_NxIxJxQ = jnp.stack(
        [jnp.stack([largest_NxPxQ[:, index[i, min(i, j)]] for j in range(n)], axis=1) for i in range(n)], axis=1
    )
    row_NxIxQ = rows_NxIxJxQ.max(2)
    below_NxPxQ = jnp.stack([row_NxIxQ[:, i] for i, _ in tiles], axis=1)
    visible_1xPxQxK = jnp.stack([seen[0, 0] if i == j else jnp.ones((tile, tile)) for i, j in tiles])[None]
    e_NxPxQxK = jnp.exp(stack_NxPxQxK - below_NxPxQ[..., None]) * visible_1xPxQxK
    sums_NxPxQ = e_NxPxQxK.sum(-1)
    total_NxT = jnp.concatenate([sum(sums_NxPxQ[:, index[i, j]] for j in range(i + 1)) for i in range(n)], axis=-1)
    empty = jnp.zeros((N, tile, tile))
    square = [
        jnp.concatenate([e_NxPxQxK[:, index[i, j]] if j <= i else empty for j in range(n)], axis=-1) for i in range(n)
    ]
    return jnp.concatenate(square, axis=1), total_NxT


def _tile(num_tokens: int) -> int:
    """Edge of a tile: eight of them a side where that divides, and no smaller than 4."""
    return next((num_tokens // n for n in (8, 4, 2) if num_tokens % n == 0 and num_tokens // n >= 4), num_tokens)


def _cached_attention(shape: Shape, layer: int) -> list[Stage]:
    q, k, v = (f"{layer}.{name}" for name in "qkv")
    divided = _optional(shape, f"{layer}.temperature")

    def scores(q_1xNxH, k_SxNxH, *temperature):
        if shape.steps.one_dot:
            scores_Nx1xS = (k_SxNxH.reshape(shape.context_length, -1) @ _block_diagonal(q_1xNxH[0])).T[:, None]
        else:
            scores_Nx1xS = jnp.einsum("TNH,SNH->NTS", q_1xNxH, k_SxNxH)
        if shape.steps.temperature:
            return scores_Nx1xS
        return scores_Nx1xS / _divisor(shape, _column(*temperature) if temperature else None)

    def exponentials(scores_Nx1xS, position):
        seen_1x1xS = (jnp.arange(shape.context_length) <= position).astype(jnp.float32)[None, None]
        own_Nx1x1 = jax.lax.dynamic_slice_in_dim(scores_Nx1xS, position, 1, axis=2)
        scores_Nx1xS = scores_Nx1xS * seen_1x1xS + own_Nx1x1 * (1 - seen_1x1xS)
        e_Nx1xS = jnp.exp(scores_Nx1xS - scores_Nx1xS.max(-1, keepdims=True)) * seen_1x1xS
        return e_Nx1xS, e_Nx1xS.sum(-1)

    def write(cache_SxNxH, new_1xNxH, position):
        return jax.lax.dynamic_update_slice_in_dim(cache_SxNxH, new_1xNxH, position, axis=0)

    return [
        *_tempered(shape, layer, _column),
        # the projections wrote the new key and value over the names of the cache, which came in as past
        *(Stage("cache", layer, write, (f"{name}.past", name, POSITION), (name,)) for name in (k, v)),
        Stage("scores", layer, scores, (q, k, *divided, *((POSITION,) if divided else ())), ("scores",)),
        *_softmax(shape, layer, exponentials, POSITION),
        _cached_mix(shape, layer, v) if shape.steps.one_dot else _mix(shape, layer, v, "NTS,SNH->TNH"),
    ]


def _block_diagonal(q_NxH):
    """[N·H, N] with one head's query in each column; its zeros are public and cost nothing to make."""
    N, H = q_NxH.shape
    return (jnp.eye(N)[:, None] * q_NxH[:, :, None]).reshape(N * H, N)


def _cached_mix(shape: Shape, layer: int, values: str) -> Stage:
    def function(weights_Nx1xS, v_SxNxH, *reciprocal_Nx1):
        N, H = shape.num_heads, shape.head_dim
        out_NxNxH = (weights_Nx1xS[:, 0] @ v_SxNxH.reshape(-1, N * H)).reshape(N, N, H)
        out_NxH = jnp.stack([out_NxNxH[head, head] for head in range(N)])
        for factor_Nx1 in reciprocal_Nx1:
            out_NxH = out_NxH * factor_Nx1
        return out_NxH.reshape(1, shape.model_dim)

    reciprocal = ("reciprocal",) if shape.steps.denominator else ()
    return Stage("mix", layer, function, ("weights", values, *reciprocal), ("mixed",))


def _activation(shape: Shape, layer: int) -> list[Stage]:
    kinds = {"gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU", "leaky_relu": "leaky ReLU"}
    if shape.activation == "identity":
        return []
    slope = _optional(shape, f"{layer}.slope")

    def function(h_TxF, *slope):
        match shape.activation:
            case "gelu":
                half = 0.5 * h_TxF
                return half * (1 + jax.lax.erf(h_TxF * 0.5**0.5)) if shape.steps.erf else jax.nn.gelu(h_TxF, approximate=False)
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
