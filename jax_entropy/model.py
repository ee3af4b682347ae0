"""The decoder-only transformer: embeddings, scanned blocks, head.

`apply(variables, tokens)` returns logits and `Aux`, the attention statistics of every layer; jit drops unused ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_entropy.architecture import ModelConfig
from jax_entropy.attention import AttentionStats
from jax_entropy.errors import UserError
from jax_entropy.layers import Block, KeyValueCache, normalise
from jax_entropy.sharding import BATCH, constrain


class Aux(NamedTuple):
    """stats: entropy, logsumexp, max_logit, each [L, B, N, T] float32; threshold: θ [L, N], None without EReg."""

    stats: AttentionStats
    threshold: jax.Array | None


class Transformer(nn.Module):
    """A decoder-only language model.

    Variables: `params`, and `spectral` (power-iteration vectors) where layers are spectrally normalised; pass
    `mutable=["spectral"]` in training. An rng named "dropout" switches the embedding dropout on.
    """

    config: ModelConfig

    def setup(self):
        config = self.config
        table = (config.vocab_size, config.model_dim)
        normal = nn.initializers.normal(config.init_std)
        self.token_embedding = self.param("token_embedding", normal, table, jnp.float32)
        self.position_embedding = self.param(
            "position_embedding", normal, (config.context_length, config.model_dim), jnp.float32
        )
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.negative_slope = None
        if config.activation == "leaky_relu" and config.slope == "global":
            initializer = nn.initializers.constant(config.negative_slope)
            self.negative_slope = self.param("negative_slope", initializer, (), jnp.float32)
        without_ffn = config.ffn_free_layers
        if with_ffn := config.num_layers - without_ffn:
            self.blocks = _stack(config, with_ffn, with_ffn=True)
        if without_ffn:
            self.blocks_without_ffn = _stack(config, without_ffn, with_ffn=False)
        self.final_norm = normalise(config.final_norm, config, "final_norm")
        self.head = self.token_embedding if config.tied_head else self.param("head", normal, table, jnp.float32)

    def __call__(self, tokens_BxT: jax.Array) -> tuple[jax.Array, Aux]:
        """tokens [B, T] int -> (logits [B, T, V] float32, Aux). Raises UserError if T exceeds the context length."""
        hidden_BxTxD, head_VxD, aux = self.hidden(tokens_BxT)
        return logits(hidden_BxTxD, head_VxD), aux

    def hidden(self, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array, Aux]:
        """What the loss needs instead of logits: (hidden [B, T, D], head [V, D], Aux)."""
        hidden_BxTxD, outputs = self._run(tokens_BxT, None, 0)
        return hidden_BxTxD, self.head, Aux(outputs.stats, outputs.threshold_N)

    def decode(self, tokens_BxT, cache: KeyValueCache, position) -> tuple[jax.Array, KeyValueCache]:
        """Reads T tokens that stand at `position`, after those in the cache: (logits [B, T, V], cache)."""
        hidden_BxTxD, outputs = self._run(tokens_BxT, cache, position)
        return logits(hidden_BxTxD, self.head), outputs.cache

    def _run(self, tokens_BxT, cache, position):
        config, T = self.config, tokens_BxT.shape[1]
        if T > config.context_length:
            raise UserError(f"{T} tokens do not fit into context_length={config.context_length}")
        # looked up by rows: a table sharded along both axes would be gathered whole
        tokens_BxTxD = jnp.take(constrain(self.token_embedding, "tensor", None), tokens_BxT, axis=0)
        positions_TxD = jax.lax.dynamic_slice_in_dim(self.position_embedding, position, T, axis=0)
        x_BxTxD = tokens_BxTxD * config.embedding_scale + positions_TxD[None]
        x_BxTxD = self.dropout(x_BxTxD, deterministic=not self.has_rng("dropout")).astype(config.dtype)
        outputs, shallow = [], config.num_layers - config.ffn_free_layers
        for layers, stack in ((slice(shallow), "blocks"), (slice(shallow, None), "blocks_without_ffn")):
            if hasattr(self, stack):
                part = jax.tree.map(lambda leaf: leaf[layers], cache)
                x_BxTxD = constrain(x_BxTxD, BATCH, None, None)
                x_BxTxD, output = getattr(self, stack)(x_BxTxD, part, self.negative_slope, position)
                outputs.append(output)
        return self.final_norm(x_BxTxD), jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def _stack(config: ModelConfig, length: int, *, with_ffn: bool) -> nn.Module:
    """`length` blocks as one scanned block whose parameters have a leading L axis."""
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    return nn.scan(
        block,
        variable_axes={"params": 0, "spectral": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=length,
        unroll=min(config.scan_unroll, length),
    )(config, with_ffn=with_ffn)


def logits(hidden_BxTxD: jax.Array, head_VxD: jax.Array) -> jax.Array:
    """Scores of the next token, [B, T, V], accumulated in float32 or better."""
    head_VxD, wide = head_VxD.astype(hidden_BxTxD.dtype), jnp.promote_types(hidden_BxTxD.dtype, jnp.float32)
    return jnp.einsum("BTD,VD->BTV", hidden_BxTxD, head_VxD, preferred_element_type=wide)


def empty_cache(config: ModelConfig, batch_size: int) -> KeyValueCache:
    """A key-value cache for `batch_size` sequences that have read nothing yet."""
    shape = (config.num_layers, batch_size, config.context_length, config.num_heads, config.head_dim)
    return KeyValueCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
