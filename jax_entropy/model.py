"""The decoder-only transformer: embeddings, scanned blocks, head.

`apply(variables, tokens)` returns logits and `Aux`, the attention statistics of every layer; jit drops unused ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from jax_entropy.architecture import ModelConfig, check_model
from jax_entropy.attention import AttentionStats
from jax_entropy.errors import UserError, check_array, spelled
from jax_entropy.layers import Block, Shared, Stream, Watched
from jax_entropy.norms import normalise
from jax_entropy.sharding import BATCH, constrain, platform


class Aux(NamedTuple):
    """What attention did: stats [L, B, N, T] float32 each; θ [L, N] with EReg; the divisors t [L, N, T] with SM(t).

    maximum: the most entropy that a row can have, [L, T] in nats, where slots or windows change what it sees.
    """

    stats: AttentionStats
    threshold: jax.Array | None
    temperature: jax.Array | None
    maximum: jax.Array | None = None


class Transformer(nn.Module):
    """A decoder-only language model.

    Variables: `params`, and `spectral` (power-iteration vectors) where layers are spectrally normalised; pass
    `mutable=["spectral"]` in training; likewise `annealing` in a run that takes nonlinearities out (annealing.py). An
    rng named "dropout" switches the embedding dropout on. With `empty_cache` as the collection `cache`, and that
    mutable, `decode` reads a text piece by piece.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        check_model(config)
        table = (config.vocab_size, config.model_dim)
        normal = nn.initializers.normal(config.init_std)
        self.token_embedding = self.param("token_embedding", normal, table, jnp.float32)
        if config.learned_positions:
            positions = (config.context_length, config.model_dim)
            self.position_embedding = self.param("position_embedding", normal, positions, jnp.float32)
        if config.value_embedding:
            self.value_embedding = self.param("value_embedding", normal, table, jnp.float32)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.negative_slope = None
        if config.activation == "leaky_relu" and config.slope == "global":
            initializer = nn.initializers.constant(config.negative_slope)
            self.negative_slope = self.param("negative_slope", initializer, (), jnp.float32)
        for stack, layers in config.stacks.items():
            setattr(self, stack, _stack(config, len(layers), with_ffn=stack == "blocks"))
        self.final_norm = normalise(config.final_norm, config, "final_norm")
        self.head = self.token_embedding if config.tied_head else self.param("head", normal, table, jnp.float32)

    def __call__(self, tokens_BxT: jax.Array) -> tuple[jax.Array, Aux]:
        """Maps tokens [B, T] int to (logits [B, T, V] float32, Aux).

        Raises:
          UserError: T exceeds the context length, or the tokens are not a [B, T] of whole numbers.
        """
        hidden_BxTxD, head_VxD, aux = self.hidden(tokens_BxT)
        return logits(hidden_BxTxD, head_VxD), aux

    def hidden(self, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array, Aux]:
        """What the loss needs instead of logits: (hidden [B, T, D], head [V, D], Aux)."""
        return self._run(tokens_BxT, 0)

    def decode(self, tokens_BxT: jax.Array, position: int | jax.Array) -> tuple[jax.Array, Aux]:
        """Reads T tokens that stand at `position`, after those in the cache: (logits [B, T, V] float32, Aux)."""
        hidden_BxTxD, head_VxD, aux = self._run(tokens_BxT, position)
        return logits(hidden_BxTxD, head_VxD), aux

    def _run(self, tokens_BxT: jax.Array, position: int | jax.Array) -> tuple[jax.Array, jax.Array, Aux]:
        check_tokens(tokens_BxT, "[B, T]")
        config, T = self.config, tokens_BxT.shape[1]
        if T > config.context_length:
            raise UserError(f"{T} tokens do not fit into context_length={config.context_length}")
        # looked up by rows: a table sharded along both axes would be gathered whole
        tokens_BxTxD = jnp.take(constrain(self.token_embedding, "tensor", None), tokens_BxT, axis=0)
        x_BxTxD = tokens_BxTxD * config.embedding_scale
        if config.learned_positions:
            x_BxTxD = x_BxTxD + jax.lax.dynamic_slice_in_dim(self.position_embedding, position, T, axis=0)[None]
        x_BxTxD = self.dropout(x_BxTxD, deterministic=not self.has_rng("dropout")).astype(config.dtype)
        stream, shared, watched = Stream(x_BxTxD), Shared(position, self.negative_slope), []
        heads = (*tokens_BxT.shape, config.num_heads, config.head_dim)
        if config.value_embedding:
            values_BxTxD = jnp.take(constrain(self.value_embedding, "tensor", None), tokens_BxT, axis=0)
            shared = shared._replace(value_BxTxNxH=values_BxTxD.reshape(heads).astype(config.dtype))
        if config.value_residual:
            stream = stream._replace(first_value_BxTxNxH=jnp.zeros(heads, config.dtype))
        for stack, layers in config.stacks.items():
            x_BxTxD = constrain(stream.residual_BxTxD, BATCH, None, None)
            stream = stream._replace(residual_BxTxD=x_BxTxD)
            stream, of_stack = getattr(self, stack)(stream, jnp.asarray(layers), shared)
            watched.append(of_stack)
        watched: Watched = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *watched)
        return self.final_norm(stream.residual_BxTxD), self.head, Aux(*watched)


def check_tokens(tokens: object, axes: str) -> None:
    """Checks an argument that is to be token ids, an array with axes as they are printed.

    Raises:
      UserError: it is not.
    """
    check_array("tokens", tokens, axes)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens={spelled(tokens)} must be whole numbers, like int32")


def _stack(config: ModelConfig, length: int, *, with_ffn: bool) -> nn.Module:
    """`length` blocks as one scanned block whose parameters have a leading L axis."""
    block, unroll = Block, _unroll(config, length)
    if config.remat != "none":  # "full" names nothing that is there
        policy = jax.checkpoint_policies.save_only_these_names(*config.remat.split("+"))
        # without a loop between the two, the compiler would find the second computation in the first
        block = nn.remat(Block, prevent_cse=unroll == length, policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0, "spectral": 0, "annealing": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=length,
        unroll=unroll,
    )(config, with_ffn=with_ffn)


def _unroll(config: ModelConfig, length: int) -> int:
    """Layers in one turn of the scan of `length`.

    By itself an accelerator unrolls what is compiled soon: what a loop stacks for its backward pass is a quarter of the
    bytes that a step moves (docs/benchmarks/step.md). Over `fsdp` a loop has the weights of one layer at a time.
    """
    if config.scan_unroll:
        return min(config.scan_unroll, length)
    whole = config.remat == "none" and jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1
    return length if platform() != "cpu" and length <= 12 and whole else 1


def logits(hidden_BxTxD: jax.Array, head_VxD: jax.Array) -> jax.Array:
    """Scores of the next token, [..., V], accumulated in float32 or better."""
    head_VxD, wide = head_VxD.astype(hidden_BxTxD.dtype), jnp.promote_types(hidden_BxTxD.dtype, jnp.float32)
    return jnp.einsum("...D,VD->...V", hidden_BxTxD, head_VxD, preferred_element_type=wide)


def empty_cache(config: ModelConfig, batch_size: int) -> dict[str, Any]:
    """The collection `cache` for `batch_size` sequences that have read nothing yet: keys and values by stack."""
    heads, rows = (config.num_heads, config.head_dim), dict(key=config.context_length, value=config.context_length)
    if config.conv_width:
        rows |= {f"{name}_convolution/past": config.conv_width - 1 for name in ("query", "key", "value")}
    caches = {
        f"{stack}/attention/{name}": jnp.zeros((len(layers), batch_size, length, *heads), config.dtype)
        for stack, layers in config.stacks.items()
        for name, length in rows.items()
    }
    return unflatten_dict(caches, sep="/")
