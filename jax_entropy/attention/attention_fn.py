"""Our operator as the `attention_fn` of a Flax layer, so that models that are not ours show their entropies.

Where a layer brings a mask there is no tile-wise computation: then every weight is kept, as in Flax's own function.
"""

import jax
import jax.numpy as jnp

from jax_entropy.attention import AttentionStats, attention
from jax_entropy.attention.dense import EXACT, MASKED
from jax_entropy.entropy import row_entropy
from jax_entropy.errors import UserError, check_array, spelled


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    is_causal: bool = True,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    module=None,
    **_,
) -> jax.Array:
    """Attention for `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    A layer that is called with `sow_weights=True` gets `attention_stats`, an `AttentionStats` a call, among its
    intermediates; gradients go through them. Causal without a mask is `attention`, and keeps no T×T array. What else
    Flax says (dtype, precision, how to drop out) is of its own computation: here scores are float32 or better.

    Args:
      query: [batch…, T, N, H].
      key, value: [batch…, S, K, H], N a multiple of K: each is shared by N / K heads.
      bias: of the logits; only None, Flax's layers have none.
      mask: as Flax has it, broadcast to [batch…, N, T, S]; false is not seen.
      is_causal: queries are the last T of the keys and see those before them. nnx says False unless its layer is told
        otherwise; linen never says it, and is causal here.
      dropout_rate, deterministic: dropout of the weights is refused, since their entropy would be of other weights.
      module: the layer, where it is to keep the statistics.
    Returns:
      [batch…, T, N, H], in the type of the query.
    Raises:
      UserError: for dropout, for a bias, and for shapes that do not fit together.
    """
    if bias is not None:
        raise UserError(f"bias={spelled(bias)} of attention logits is not supported by je.attention_fn; leave it out")
    if dropout_rate and not deterministic:
        raise UserError(
            f"dropout_rate={dropout_rate} of attention weights is not supported by je.attention_fn; use 0 here, and "
            "dropout after the layer"
        )
    for name, x, axes in (
        ("query", query, "[…, T, N, H]"),
        ("key", key, "[…, S, K, H]"),
        ("value", value, "[…, S, K, H]"),
    ):
        check_array(name, x, axes)
    *batch, T, N, _ = query.shape
    if N % key.shape[-2]:
        raise UserError(f"{key.shape[-2]} heads of keys cannot be shared evenly by {N} heads of queries")
    q_BxTxNxH, k_BxSxNxH, v_BxSxNxH = (
        jnp.repeat(x, N // x.shape[-2], axis=-2).reshape(-1, x.shape[-3], N, x.shape[-1]) for x in (query, key, value)
    )
    if mask is None and is_causal:
        out_BxTxNxH, stats = attention(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH)
    else:
        shape = (*batch, N, T, key.shape[-3])
        mask = jnp.broadcast_to(True if mask is None else mask, shape).reshape(-1, *shape[-3:]).astype(bool)
        out_BxTxNxH, stats = _masked(
            q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, jnp.tril(mask, shape[-1] - T) if is_causal else mask
        )
    if module is not None:
        module.sow("intermediates", "attention_stats", stats)
    return out_BxTxNxH.reshape(*batch, *out_BxTxNxH.shape[1:])


def _masked(
    q_BxTxNxH: jax.Array, k_BxSxNxH: jax.Array, v_BxSxNxH: jax.Array, mask_BxNxTxS: jax.Array
) -> tuple[jax.Array, AttentionStats]:
    dtype = jnp.result_type(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, jnp.float32)
    products = dict(precision=EXACT, preferred_element_type=dtype)
    logits_BxNxTxS = jnp.einsum("BTNH,BSNH->BNTS", q_BxTxNxH, k_BxSxNxH, **products)
    logits_BxNxTxS = jnp.where(mask_BxNxTxS, logits_BxNxTxS * q_BxTxNxH.shape[-1] ** -0.5, MASKED)
    weights_BxNxTxS = jax.nn.softmax(logits_BxNxTxS)
    out_BxTxNxH = jnp.einsum("BNTS,BSNH->BTNH", weights_BxNxTxS, v_BxSxNxH, **products)
    lse_BxNxT = jax.nn.logsumexp(logits_BxNxTxS, axis=-1)
    max_BxNxT = jax.lax.stop_gradient(jnp.max(logits_BxNxTxS, axis=-1))
    return out_BxTxNxH.astype(q_BxTxNxH.dtype), AttentionStats(row_entropy(weights_BxNxTxS), lse_BxNxT, max_BxNxT)
