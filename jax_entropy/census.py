"""What a forward pass over T tokens computes: the table of its kinds of operation, FLOPs, every nonlinear operation.

Counted as in Tables 3, 4, 7 and 8 of the paper, and what these leave out (the final normalisation) in rows of its own.
"""

import collections
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_entropy.architecture import ModelConfig, check_model
from jax_entropy.model import Transformer

# What tables of private execution add up and a picture has one color for.
GROUPS = SOFTMAX, NORM, ACTIVATION, PRODUCT, ATTENTION, FFN, VOCABULARY = (
    "softmax", "LayerNorm", "GELU, ReLU", "bilinear product", "attention, linear", "feed-forward, linear",
    "embedding, vocabulary",
)  # fmt: skip


class Kind(NamedTuple):
    """A kind of operation: its printed name, its group in reports, and the value of a config's field that asks for it.

    field: "norm", "activation" or "ffn", pieces of the notation; "": every model has it, or other fields decide.
    linear: no nonlinearity, though it has a name; an optimised export folds it away.
    """

    name: str
    group: str
    field: str = ""
    value: str = ""
    linear: bool = False


# In the order of a forward pass. A new nonlinearity is a row here, beside its function and its private stage.
KINDS = (
    Kind("embedding", VOCABULARY),
    Kind("LayerNorm", NORM, "norm", "layer"),
    Kind("RMSNorm", NORM, "norm", "rms"),
    Kind("frozen norm", NORM, "norm", "frozen", linear=True),
    Kind("DyT", NORM, "norm", "tanh"),
    Kind("projections", ATTENTION),
    Kind("rotation", ATTENTION),
    Kind("QK-norm", NORM),
    Kind("temperature", ATTENTION),
    Kind("scores", ATTENTION),
    Kind("soft cap", SOFTMAX),
    Kind("softmax", SOFTMAX),
    Kind("power softmax", SOFTMAX),
    Kind("mix", ATTENTION),
    Kind("output projection", ATTENTION),
    Kind("feed-forward", FFN),
    Kind("GELU", ACTIVATION, "activation", "gelu"),
    Kind("GELU (tanh)", ACTIVATION, "activation", "gelu_tanh"),
    Kind("ReLU", ACTIVATION, "activation", "relu"),
    Kind("leaky ReLU", ACTIVATION, "activation", "leaky_relu"),
    Kind("bilinear product", PRODUCT, "ffn", "bilinear"),
    Kind("residual", FFN),
    Kind("vocabulary", VOCABULARY),
    Kind("next token", VOCABULARY),
)
_LINEAR = {kind.name for kind in KINDS if kind.linear}
NORMS = {kind.value: kind.name for kind in KINDS if kind.field == "norm"}
ACTIVATIONS = {kind.value: kind.name for kind in KINDS if kind.field == "activation"}
PRODUCTS = {kind.value: kind.name for kind in KINDS if kind.field == "ffn"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """`count` times one nonlinear operation on a matrix of `rows` × `columns`; `str` is the paper's 144×R^{128×128}."""

    name: str
    count: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Numbers that go through it in one forward pass."""
        return self.count * self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.count}×R^{{{self.rows}×{self.columns}}}"


@dataclasses.dataclass(frozen=True)
class Census:
    """FLOPs, parameters and nonlinear operations of a model.

    FLOPs are two a multiply-add, without embedding and vocabulary. Temperatures, α, β and reparametrisations are
    constants at execution, and thresholds belong to training: none is an operation.
    """

    config: ModelConfig
    ffn_flops: int
    attention_flops: int
    parameters: int
    operations: tuple[Operation, ...]  # inside the blocks, as the paper counts
    final_operations: tuple[Operation, ...]  # after the last block, which the paper does not count

    @property
    def blocks_flops(self) -> int:
        """FLOPs of all blocks, as the paper counts."""
        return self.ffn_flops + self.attention_flops

    @property
    def forward_flops(self) -> int:
        """FLOPs of a forward pass: the blocks and the vocabulary."""
        return self.blocks_flops + 2 * self.config.context_length * self.config.model_dim * self.config.vocab_size


def census(config: ModelConfig) -> Census:
    """Counts the operations of a forward pass of one sequence of `config.context_length` tokens.

    Raises:
      UserError: `config` is no `ModelConfig`.
    """
    check_model(config)
    T, D, F, L, N = config.context_length, config.model_dim, config.hidden_dim, config.num_layers, config.num_heads
    with_ffn = L - config.ffn_free_layers
    matrices = {"full": 2 * D * F, "fused": D * D, "bilinear": 3 * D * F}[config.ffn]
    softmax = "power softmax" if config.power else "softmax"
    layers = collections.Counter(config.windows)  # by how many tokens a query sees at most
    operations = [
        Operation(name, layers[seen] * N, T, seen + config.num_slots)
        for name in (softmax, *(["soft cap"] if config.logit_cap else []))
        for seen in sorted(layers)[::-1]
    ]
    if config.qk_norm:
        operations.append(Operation("QK-norm", 2 * L * N, T, config.head_dim))
    if config.norm != "none":
        operations.append(Operation(NORMS[config.norm], L + with_ffn, T, D))
    if config.activation != "identity" and with_ffn:
        operations.append(Operation(ACTIVATIONS[config.activation], with_ffn, T, F))
    if config.ffn in PRODUCTS and with_ffn:
        operations.append(Operation(PRODUCTS[config.ffn], with_ffn, T, F))
    final = [] if config.final_norm == "none" else [Operation(NORMS[config.final_norm], 1, T, D)]
    return Census(
        config=config,
        ffn_flops=2 * T * matrices * with_ffn,
        # The tables' 3: all pairs of tokens would be 4, those under the causal mask 2.
        attention_flops=L * (8 * T * D**2 + 3 * T**2 * D) + _parts_flops(config),
        parameters=_count_parameters(config),
        operations=tuple(operation for operation in operations if operation.name not in _LINEAR),
        final_operations=tuple(operation for operation in final if operation.name not in _LINEAR),
    )


def _parts_flops(config: ModelConfig) -> int:
    """What parts add: two multiply-adds turn a number of q and k; pairs beyond a window are computed by nobody."""
    T, D, L = config.context_length, config.model_dim, config.num_layers
    hidden = sum((T - window) * (T - window + 1) // 2 for window in config.windows)
    added = L * (6 * config.conv_width + 8 * config.rotary + 2 * config.value_residual + 4 * config.num_slots)
    return (added + 2 * sum(config.embedded_values)) * T * D - 4 * hidden * D


@functools.cache
def _count_parameters(config: ModelConfig) -> int:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
