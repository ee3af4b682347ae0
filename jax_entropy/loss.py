"""The training loss: Optax cross-entropy plus λ times the entropy penalty, differentiable in every parameter.

The cross-entropy takes hidden states and the head matrix and goes over the positions in chunks: the [B, T, V] logits of
a whole batch never exist, and their gradient is formed while a chunk is at hand.
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.sharding import PartitionSpec

from jax_entropy.chips import HOST, chip_of
from jax_entropy.entropy import entropy_penalty
from jax_entropy.errors import UserError, check_kind, check_number, spelled
from jax_entropy.model import Aux, Transformer, check_tokens, logits
from jax_entropy.products import outer_product, transposed, wide_product
from jax_entropy.sharding import BATCH, device_kind, on_shards, platform, sum_over

_NONE = -1  # the target of what pads a chunk
_WHOLE, _ROWS = PartitionSpec(), PartitionSpec(BATCH)


class LossParts(NamedTuple):
    """Parts of the loss: cross_entropy (nats/token), penalty (nats², not yet times λ), Aux, other collections.

    divergence: from a teacher, nats/token; None without one.
    """

    cross_entropy: jax.Array
    penalty: jax.Array
    aux: Aux
    collections: dict[str, Any]
    divergence: jax.Array | None = None


def loss_fn(
    params: Any,
    tokens_BxT1: jax.Array,
    *,
    model: Transformer,
    penalty_weight: float | jax.Array = 0.0,
    tolerance: float = 0.2,
    reduction: str = "row_sum",
    shape: str = "deadzone",
    collections: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    distillation: float = 0.0,
    distillation_temperature: float = 1.0,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, LossParts]:
    """`L_CE + λ·L_ent` (Algorithm 1), for `jax.value_and_grad(..., has_aux=True)`.

    Args:
      params: the collection "params" of `model`.
      tokens_BxT1: [B, T+1] token ids; positions 1…T are predicted. Under `jit`, where ids cannot be looked at, a
        target beyond the vocabulary makes the loss NaN, and a negative one counts for nothing.
      penalty_weight: λ; a number, or the value of an Optax schedule at this step. Without EReg there is no penalty.
      tolerance, reduction, shape: see `entropy_penalty`.
      collections: other collections of the model (`spectral`); updated ones come back in `LossParts`.
      teacher: variables of the same model to learn from.
      distillation: weight of the divergence from the teacher, 0 to 1; the cross-entropy has the rest.
      distillation_temperature: see `teacher_divergence`.
      dropout_key: switches the embedding dropout on.
    Returns:
      (loss in nats per token, LossParts).
    Raises:
      UserError: the tokens are not whole numbers [B, T+1], T ≥ 1, or, outside of `jit`, not in the vocabulary; for
        distillation without a teacher, and what is no model, no collection or no weight.
    """
    if not (hasattr(model, "apply") and hasattr(model, "config")):
        raise UserError(f"model={spelled(model)} must be a Transformer")
    for name, of_model in (("params", params), ("collections", collections or {}), ("teacher", teacher or {})):
        check_kind(name, of_model, Mapping, "a mapping, as Transformer(config).init makes them")
    _check(tokens_BxT1, model)
    for name, weight in (("penalty_weight", penalty_weight), ("distillation", distillation)):
        check_number(name, weight, 0, whole=False, traced=True)
    if teacher is None and isinstance(distillation, numbers.Real) and distillation:
        raise UserError(f"distillation={distillation} needs a teacher to learn from")
    collections = collections or {}
    (hidden_BxTxD, head_VxD, aux), updated = model.apply(
        {"params": params, **collections},
        tokens_BxT1[:, :-1],
        method="hidden",
        mutable=list(collections),
        rngs={} if dropout_key is None else {"dropout": dropout_key},
    )
    loss = cross = cross_entropy(hidden_BxTxD, head_VxD, tokens_BxT1[:, 1:])
    penalty, divergence = jnp.zeros(()), None
    if teacher is not None:
        theirs_BxTxD, their_head_VxD, _ = model.apply(teacher, tokens_BxT1[:, :-1], method="hidden")
        divergence = teacher_divergence(
            hidden_BxTxD, head_VxD, theirs_BxTxD, their_head_VxD, temperature=distillation_temperature
        )
        loss = (1 - distillation) * cross + distillation * divergence
    if aux.threshold is not None:
        penalty = entropy_penalty(
            aux.stats.entropy, aux.threshold, tolerance=tolerance, reduction=reduction, shape=shape,
            maximum_LxT=aux.maximum,
        )  # fmt: skip
        loss = loss + penalty_weight * penalty
    return loss, LossParts(cross, penalty, aux, updated, divergence)


def _check(tokens_BxT1: object, model: Transformer) -> None:
    check_tokens(tokens_BxT1, "[B, T+1]")
    if tokens_BxT1.shape[0] < 1 or tokens_BxT1.shape[1] < 2:
        raise UserError(
            f"tokens={spelled(tokens_BxT1)} must be an array [B, T+1] with something to predict, T at least 1"
        )
    if isinstance(tokens_BxT1, jax.core.Tracer) or not getattr(tokens_BxT1, "is_fully_addressable", True):
        return
    ids = np.asarray(tokens_BxT1)  # what JAX computes of an array within `jit` has no value yet
    least, most = ids.min(), ids.max()
    if least < 0 or most >= model.config.vocab_size:
        wrong = least if least < 0 else most
        raise UserError(f"tokens hold the id {wrong}, and the vocabulary ends at {model.config.vocab_size - 1}")


def teacher_divergence(
    hidden_BxTxD: jax.Array,
    head_VxD: jax.Array,
    theirs_BxTxD: jax.Array,
    their_head_VxD: jax.Array,
    *,
    temperature: float,
) -> jax.Array:
    """τ²·KL(teacher ‖ model) of the distributions at temperature τ, in nats per token; both are chunked like the loss.

    The teacher is not differentiated. Rows that pad a chunk are 0 in both, so that they add nothing. τ² keeps the size
    of the gradient (arXiv 1503.02531).
    """

    def rows_sum(head_VxD, their_head_VxD, hidden_BxTxD, theirs_BxTxD):
        @jax.checkpoint
        def chunk_sum(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
            ours, theirs = (
                jax.nn.log_softmax(logits(hidden, head) / temperature)
                for hidden, head in zip(chunk, (head_VxD, their_head_VxD), strict=True)
            )
            return jnp.sum(jnp.exp(theirs) * (theirs - ours))

        chunks = _split(hidden_BxTxD, theirs_BxTxD, chunk_rows(head_VxD.shape[0]))
        return jnp.sum(jax.lax.map(chunk_sum, chunks))[None]

    on_rows = on_shards(rows_sum, (_WHOLE, _WHOLE, _ROWS, _ROWS), _ROWS)
    their_head_VxD, theirs_BxTxD = jax.lax.stop_gradient((their_head_VxD, theirs_BxTxD))
    sums = on_rows(head_VxD, their_head_VxD, hidden_BxTxD, theirs_BxTxD)
    return temperature**2 * jnp.sum(sums) / (hidden_BxTxD.shape[0] * hidden_BxTxD.shape[1])


def token_losses(hidden_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Cross-entropy of every target in nats, [B, T] float32."""

    def rows_losses(head_VxD, hidden_BxTxD, targets_BxT):
        head_DxV, (B, T) = transposed(head_VxD), targets_BxT.shape
        chunks = _split(hidden_BxTxD, targets_BxT, chunk_rows(head_VxD.shape[0]))
        losses_CxR = jax.lax.map(lambda chunk: _losses(wide_product(chunk[0], head_DxV), chunk[1]), chunks)
        return rearrange(losses_CxR, "C (B t) -> B (C t)", B=B)[:, :T]

    on_rows = on_shards(rows_losses, (_WHOLE, _ROWS, _ROWS), _ROWS)
    return on_rows(head_VxD.astype(hidden_BxTxD.dtype), hidden_BxTxD, targets_BxT)


@jax.custom_vjp
def cross_entropy(hidden_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats per token."""
    return jnp.mean(token_losses(hidden_BxTxD, head_VxD, targets_BxT))


def _cross_entropy_forward(hidden_BxTxD, head_VxD, targets_BxT) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    count, dtype, wide = targets_BxT.size, hidden_BxTxD.dtype, head_VxD.dtype

    def rows_gradients(head_VxD, hidden_BxTxD, targets_BxT):
        (B, T), V = targets_BxT.shape, len(head_VxD)
        rows = chunk_rows(V)
        rows *= 2 if vocabulary_tiles(V, rows) else 1  # what exists of tiles is half as wide as logits
        chunks = _split(hidden_BxTxD, targets_BxT, rows)
        tiles = vocabulary_tiles(V, chunks[1].shape[1])
        begin = functools.partial(_in_tiles, *tiles) if tiles else _at_once
        step, d_head, of_vocabulary = begin(head_VxD, count, wide)
        nothing = jnp.zeros((), jnp.promote_types(dtype, jnp.float32)), d_head
        (loss, d_head), d_hidden_CxRxD = jax.lax.scan(step, nothing, chunks)
        d_hidden_BxTxD = rearrange(d_hidden_CxRxD, "C (B t) D -> B (C t) D", B=B)[:, :T]
        return *sum_over(BATCH, (loss, of_vocabulary(d_head))), d_hidden_BxTxD

    on_rows = on_shards(rows_gradients, (_WHOLE, _ROWS, _ROWS), (_WHOLE, _WHOLE, _ROWS))
    loss, d_head_VxD, d_hidden_BxTxD = on_rows(head_VxD.astype(dtype), hidden_BxTxD, targets_BxT)
    return loss, (d_hidden_BxTxD, d_head_VxD)


def _at_once(head_VxD: jax.Array, count: int, wide: jnp.dtype) -> tuple[Callable, jax.Array, Callable]:
    """A step of the scan over chunks, with their logits whole; the head's gradient as it begins, and as it ends."""
    dtype, head_DxV = head_VxD.dtype, transposed(head_VxD)

    def step(carry, chunk):
        (loss, d_head_DxV), (hidden_RxD, targets_R) = carry, chunk
        logits_RxV = wide_product(hidden_RxD, head_DxV)
        losses_R, d_logits_RxV = _losses_and_gradient(logits_RxV, targets_R, 1 / count)
        more, d_logits_RxV = jnp.sum(losses_R) / count, d_logits_RxV.astype(dtype)
        d_head_DxV += outer_product(hidden_RxD, d_logits_RxV).astype(wide)
        return (loss + more, d_head_DxV), wide_product(d_logits_RxV, head_VxD).astype(dtype)

    return step, jnp.zeros(head_DxV.shape, wide), jnp.transpose


def _in_tiles(C: int, W: int, head_VxD: jax.Array, count: int, wide: jnp.dtype) -> tuple[Callable, jax.Array, Callable]:
    """The same with W logits of a row at a time, which stay on the chip.

    What goes through memory, once, is e^(s − m) in the type of the head, of which the gradient is formed; m is the
    largest logit of the row so far, so that no power is above 1.
    """
    dtype, V = head_VxD.dtype, len(head_VxD)
    head_CxWxD = rearrange(jnp.pad(head_VxD, ((0, C * W - V), (0, 0))), "(C W) D -> C W D", C=C)
    entries_CxW = jnp.arange(C * W, dtype=jnp.int32).reshape(C, W)

    def step(carry, chunk):
        (loss, d_head_CxWxD), (hidden_RxD, targets_R) = carry, chunk

        def forward(carry, tile):
            (old_m_R, sum_R, target_R), (head_WxD, entries_W) = carry, tile
            s_RxW = wide_product(hidden_RxD, head_WxD.T)
            target_R += jnp.sum(jnp.where(targets_R[:, None] == entries_W[None], s_RxW, 0), axis=1)
            s_RxW = jnp.where(entries_W[None] < V, s_RxW, -jnp.inf)
            m_R = jnp.maximum(old_m_R, jnp.max(s_RxW, axis=1))
            e_RxW = jnp.exp(s_RxW - m_R[:, None])
            sum_R = sum_R * jnp.exp(old_m_R - m_R) + jnp.sum(e_RxW, axis=1)
            return (m_R, sum_R, target_R), (e_RxW.astype(dtype), m_R)

        def backward(d_hidden_RxD, tile):
            head_WxD, entries_W, d_head_WxD, e_RxW, tile_m_R = tile
            hit_RxW = jnp.where(targets_R[:, None] == entries_W[None], share_R[:, None], 0)
            factor_R = jnp.exp(tile_m_R - m_R) * share_R / sum_R
            d_logits_RxW = (e_RxW * factor_R[:, None] - hit_RxW).astype(dtype)
            d_head_WxD += wide_product(d_logits_RxW.T, hidden_RxD).astype(wide)
            return d_hidden_RxD + wide_product(d_logits_RxW, head_WxD), d_head_WxD

        zero_R = jnp.zeros(len(targets_R), jnp.promote_types(dtype, jnp.float32))
        beyond_R = jnp.where(targets_R < V, zero_R, jnp.nan)
        (m_R, sum_R, target_R), (e_CxRxW, m_CxR) = jax.lax.scan(
            forward, (zero_R - jnp.inf, zero_R, beyond_R), (head_CxWxD, entries_CxW)
        )
        share_R = jnp.where(targets_R < 0, 0, jnp.asarray(1 / count, m_R.dtype))
        loss += jnp.sum(share_R * (jnp.log(sum_R) + m_R - target_R))
        d_hidden_RxD, d_head_CxWxD = jax.lax.scan(
            backward, jnp.zeros(hidden_RxD.shape, m_R.dtype),
            (head_CxWxD, entries_CxW, d_head_CxWxD, e_CxRxW, m_CxR),
        )  # fmt: skip
        return (loss, d_head_CxWxD), d_hidden_RxD.astype(dtype)

    return step, jnp.zeros(head_CxWxD.shape, wide), lambda d_head: rearrange(d_head, "C W D -> (C W) D")[:V]


def _cross_entropy_backward(gradients, cotangent) -> tuple[jax.Array, jax.Array, None]:
    d_hidden, d_head = gradients
    return d_hidden * cotangent.astype(d_hidden.dtype), d_head * cotangent, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _losses(logits_RxV: jax.Array, targets_R: jax.Array) -> jax.Array:
    losses_R = optax.softmax_cross_entropy_with_integer_labels(logits_RxV, jnp.maximum(targets_R, 0))
    return jnp.where(targets_R < 0, 0, losses_R)


def _losses_and_gradient(logits_RxV: jax.Array, targets_R: jax.Array, share: float) -> tuple[jax.Array, jax.Array]:
    """Losses, 0 where there is no target, and the gradient of their sum times `share`: softmax − one-hot.

    Both come from one maximum and one sum, which a split vocabulary has to send, and nothing is scattered.
    """
    largest_R, sum_R = _largest_and_sum(logits_RxV)
    e_RxV = jnp.exp(logits_RxV - largest_R[:, None])
    target_R = jnp.take_along_axis(logits_RxV, targets_R[:, None], axis=-1)[:, 0]
    losses_R = jnp.where(targets_R < 0, 0, jnp.log(sum_R) + largest_R - target_R)
    share_R = jnp.where(targets_R < 0, 0, jnp.asarray(share, e_RxV.dtype))
    hit_RxV = targets_R[:, None] == jnp.arange(logits_RxV.shape[1], dtype=targets_R.dtype)[None]
    return losses_R, e_RxV * (share_R / sum_R)[:, None] - jnp.where(hit_RxV, share_R[:, None], 0)


def _largest_and_sum(x_RxV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """m = max_j x_j and Σ_j e^(x_j − m); on a GPU they are read once for both, where others have no fast code."""
    if platform() != "gpu":
        largest_R = jnp.max(x_RxV, axis=-1)
        return largest_R, jnp.sum(jnp.exp(x_RxV - largest_R[:, None]), axis=-1)

    def joined(one, other):
        (m1, l1), (m2, l2) = one, other
        decay = jnp.exp(-jnp.abs(m1 - m2))
        return jnp.maximum(m1, m2), jnp.where(m1 > m2, l1 + l2 * decay, l1 * decay + l2)

    lowest = jnp.asarray(jnp.finfo(x_RxV.dtype).min, x_RxV.dtype)
    return jax.lax.reduce((x_RxV, jnp.ones_like(x_RxV)), (lowest, jnp.zeros((), x_RxV.dtype)), joined, (1,))


def chunk_rows(vocab_size: int) -> int:
    """Rows of logits that exist at once.

    A chunk moves 12 bytes for each entry of the head: it reads the head twice, and reads and writes the gradient. Its
    products, 6 FLOPs an entry and row, shall take eight times as long, in at most 1/32 of the memory.
    """
    chip = chip_of(device_kind()) or HOST
    rows = int(8 * 12 / 6 * chip.flops / chip.bandwidth)
    return max(1, min(rows, chip.memory // 32 // (4 * vocab_size)))


def vocabulary_tiles(vocab_size: int, rows: int) -> tuple[int, int] | None:
    """Tiles of the vocabulary and their width, whose logits take a quarter of a chip's own memory; None: all at once.

    Of up to twice as many tiles those that pad the vocabulary least, with a width in whole lanes. Over `tensor` none:
    each would send its sums.
    """
    chip = chip_of(device_kind()) or HOST
    fewest = math.ceil(16 * rows * vocab_size / chip.on_chip) if chip.on_chip else 1
    if fewest == 1 or jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        return None
    widths = {count: math.ceil(vocab_size / count / 128) * 128 for count in range(fewest, 2 * fewest)}
    return min(widths.items(), key=math.prod)


def _split(hidden_BxTxD, beside_BxT, rows) -> tuple[jax.Array, jax.Array]:
    """Cuts along T into equal chunks of at most so many rows, the last one padded: [C, B·T/C, …] of both."""
    B, T = beside_BxT.shape[:2]
    fewest = min(T, math.ceil(B * T / rows))
    count = next((c for c in range(fewest, 2 * fewest) if T % c == 0), fewest)
    padding = (0, 0), (0, -T % count), (0, 0)

    def cut(x_BxT, nothing):
        return rearrange(
            jnp.pad(x_BxT, padding[: x_BxT.ndim], constant_values=nothing), "B (C t) ... -> C (B t) ...", C=count
        )

    return cut(hidden_BxTxD, 0), cut(beside_BxT, 0 if beside_BxT.ndim > 2 else _NONE)
