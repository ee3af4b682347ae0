"""What both parties know of a private program: the model's config, how it was rewritten, and its weights by name.

A blueprint may come from a peer; making one refuses what no export writes.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Rewrites:
    """What makes a program cheaper without changing its function; each can be switched off.

    one_hot: tokens enter as one-hot rows that their owner makes; off, as secret indices of a gather.
    packed: the softmax sees the tiles on and under the diagonal only; off, the whole square.
    denominator: one reciprocal a row, multiplied after the product with V; off, every weight is divided.
    temperature: 1/(t·√H) multiplies the queries, 1/√H disappears in their kernel; off, scores are divided.
    folded: scales and biases of norms, α, β and biases disappear in the matrices beside them.
    merged: two matrices with nothing between them are one.
    qkv: queries, keys and values are one product, and so are the branches of a bilinear feed-forward.
    erf: GELU as x/2·(1 + erf(x/√2)); off, through erfc.
    one_dot: a single query meets the keys of all heads in one product, and so do its weights the values; off, in N.
    heads: so do several heads of many queries, as many as the protocol makes worth it; off, one after another.
    joined: without norms and activations, the output projection, the feed-forward and the next projections are one.
    reciprocal: of a row's sum by a line chosen among comparisons; off, the engine's, in twice the rounds.
    tournament: of a row's maximum the last levels compare all with all; off, all halve.
    shifts: a step takes exponentials with several shifts at once, and picks; off, it looks for the row's maximum.
    last_row: where only the last position's logits are wanted, the last block is for that row only.
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
    heads: bool = True
    joined: bool = True
    reciprocal: bool = True
    tournament: bool = True
    shifts: bool = True
    last_row: bool = True
    cached: bool = True

    def __str__(self) -> str:
        """What an export is called in tables: "optimised", "plain", or without what."""
        off = [name for name in REWRITES if not getattr(self, name)]
        return "plain" if self == PLAIN else f"without {', '.join(off)}" if off else "optimised"


REWRITES = tuple(field.name for field in dataclasses.fields(Rewrites))
NO_REWRITES = Rewrites(**dict.fromkeys(REWRITES, False))
# As the model is written, where GELU is in its erf form. The client makes one-hot rows even so: a secret index of a
# real vocabulary is out of the question.
PLAIN = dataclasses.replace(NO_REWRITES, one_hot=True, erf=True)


# Numbers of a norm: what is added under its root, what DyT multiplies by, and of a LayerNorm that is being frozen the
# share of its row statistics that is left and the constant that stands for the rest.
_OF_NORM = ("epsilon", "alpha", "left", "rate")


EMBEDDINGS = ("shared", "public")


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A private program's public description; no weight is in it, only what each is called and its shape.

    squarings: of each layer's exponential, whose argument is bent before (`nonlinear.bent`); (): the engine's, as it
    is. heads_at_once: how many heads of many queries are one product. shifted: whether steps take exponentials with
    several shifts. embedding: "shared", or "public": the server gives the embedding table away and with it a tied head,
    and rows come in as the client looks them up. piece: of how many weights a product is at most, larger ones being cut
    so that they fit into memory; 0: they are whole.

    Raises:
      UserError: a weight that no export of such a model writes, or a number that fits no program.
    """

    config: ModelConfig
    rewrites: Rewrites
    weights: Mapping[str, tuple[int, ...]]
    squarings: tuple[int, ...] = ()
    heads_at_once: int = 1
    shifted: bool = False
    embedding: str = "shared"
    piece: int = 0

    def __post_init__(self) -> None:
        if self.embedding not in EMBEDDINGS:
            raise UserError(f"embedding={self.embedding!r} is not known{nearest(self.embedding, EMBEDDINGS)}")
        if not (self.heads_at_once > 0 and self.config.num_heads % self.heads_at_once == 0):
            raise UserError(f"heads_at_once={self.heads_at_once} does not divide {self.config.num_heads} heads")
        if self.squarings and len(self.squarings) != self.config.num_layers:
            raise UserError(f"squarings of {len(self.squarings)} layers, and the model has {self.config.num_layers}")
        if not all(1 <= squarings <= 12 for squarings in self.squarings):
            raise UserError(f"squarings={self.squarings} must lie between 1 and 12")
        if self.piece and self.piece < self.config.model_dim:
            raise UserError(f"piece={self.piece} must be 0 or at least the model_dim={self.config.model_dim}")
        of_model, of_layer = _weight_shapes(self.config)
        for name, shape in self.weights.items():
            layer, _, bare = name.partition(".")
            if re.fullmatch(r"0|[1-9][0-9]{0,7}", layer) and int(layer) < self.config.num_layers:
                expected = of_layer.get(bare)
                if bare in ("joined.kernel", "joined.bias") and int(layer) == self.config.num_layers - 1:
                    expected = (*expected[:-1], self.config.model_dim)  # nothing is projected after it
            else:
                expected = of_model.get(name)
            if expected is None:
                raise UserError(f"a private program of {self.config} has no weight {name[:60]!r}")
            if tuple(shape) != expected:
                raise UserError(f"the weight {name} of {self.config} has the shape {expected}, not {tuple(shape)}")

    def reach(self, layer: int) -> float:
        """How far a step's scores may be over and under the token's own, where it takes several shifts."""
        return 0.75 * 2.0 ** (self.squarings[layer] if self.squarings else 6)

    def present(self, *names: str) -> tuple[str, ...]:
        """Those of the names that weights have."""
        return tuple(name for name in names if name in self.weights)

    def one_matrix(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a single matrix."""
        return f"{layer}.fused.kernel" in self.weights

    @property
    def joined(self) -> bool:
        """Whether all between two attentions is a single matrix."""
        return any(name.endswith(".joined.kernel") for name in self.weights)

    @property
    def given_away(self) -> tuple[str, ...]:
        """Weights that everybody gets to know."""
        if self.embedding == "shared":
            return ()
        return self.present("embedding", *(("head.kernel", "head.bias") if self.config.tied_head else ()))

    def token_type(self, num_tokens: int) -> jax.ShapeDtypeStruct:
        """What tokens enter as: one-hot rows [T, V], rows of a public table [T, D], or indices [T]."""
        if self.embedding == "public":
            return jax.ShapeDtypeStruct((num_tokens, _table_width(self.config)), np.float32)
        if self.rewrites.one_hot:
            return jax.ShapeDtypeStruct((num_tokens, self.config.vocab_size), np.float32)
        return jax.ShapeDtypeStruct((num_tokens,), np.int32)

    def enter(self, tokens_T: Sequence[int], table_VxD: np.ndarray | None = None) -> np.ndarray:
        """Tokens as their owner makes them, of `token_type`; the table where it is public."""
        if self.embedding == "public":
            return table_VxD[np.asarray(tokens_T)]
        if self.rewrites.one_hot:
            rows_TxV = np.zeros((len(tokens_T), self.config.vocab_size), np.float32)
            rows_TxV[np.arange(len(tokens_T)), np.asarray(tokens_T)] = 1
            return rows_TxV
        return np.asarray(tokens_T, np.int32)


def _table_width(config: ModelConfig) -> int:
    """Numbers that an embedding table has for a token: beside the stream's, those that are added to values."""
    return config.model_dim * (2 if config.value_embedding else 1)


def _weight_shapes(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes by name of all that exports write: once for the model, and in a layer, there behind "3."."""
    D, F, V, S, N = config.model_dim, config.hidden_dim, config.vocab_size, config.context_length, config.num_heads

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.kernel": (inputs, outputs), f"{name}.bias": (outputs,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.scale": (D,), f"{name}.bias": (D,)} | {f"{name}.{one}": (1,) for one in _OF_NORM}

    model = dict(embedding=(V, _table_width(config)), positions=(S, D)) | linear("head", D, V) | norm("final_norm")
    layer = norm("norm1") | norm("norm2") | linear("up", D, F) | linear("down", F, D)
    layer |= linear("gate", D, F) | linear("branches", D, 2 * F)
    for name in ("out", "fused"):
        layer |= linear(name, D, D)
    for name, outputs in dict(q=D, k=D, v=D, qkv=3 * D).items():
        layer |= linear(name, D * (config.conv_width or 1), outputs)
        if config.conv_width:
            layer[f"{name}.bias"] = (config.conv_width, outputs)
    layer |= linear("joined", 2 * D, 4 * D)
    layer |= dict.fromkeys(("slots.k", "slots.v"), (config.num_slots, N, config.head_dim))
    layer |= dict.fromkeys(("temperature", "inverse_temperature"), (N, S)) | dict(qk_gain=(N,))
    return model, layer | dict.fromkeys(("alpha", "beta", "slope", "amount", "value_mix", "value_scale"), (1,))
