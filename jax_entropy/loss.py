"""The training loss: Optax cross-entropy plus λ times the entropy penalty, differentiable in every parameter.

The cross-entropy takes hidden states and the head matrix and goes over the positions in chunks: the [B, T, V] logits of
a whole batch never exist, and their gradient is formed while a chunk is at hand.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import PartitionSpec

from jax_entropy.entropy import entropy_penalty
from jax_entropy.model import Aux, Transformer, logits
from jax_entropy.sharding import BATCH, on_shards, platform, sum_over

# Logits in one chunk on one device: what a CPU's cache holds (measured: docs/benchmarks/step.md), or enough to keep an
# accelerator busy.
_CHUNK_ELEMENTS = {"cpu": 1 << 20}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 24
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
      tokens_BxT1: [B, T+1] token ids; positions 1…T are predicted.
      penalty_weight: λ; a number, or the value of an Optax schedule at this step. Without EReg there is no penalty.
      tolerance, reduction, shape: see `entropy_penalty`.
      collections: other collections of the model (`spectral`); updated ones come back in `LossParts`.
      teacher: variables of the same model to learn from.
      distillation: share of the cross-entropy that the divergence from the teacher takes the place of.
      distillation_temperature: see `teacher_divergence`.
      dropout_key: switches the embedding dropout on.
    Returns:
      (loss in nats per token, LossParts).
    """
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
            aux.stats.entropy, aux.threshold, tolerance=tolerance, reduction=reduction, shape=shape
        )
        loss = loss + penalty_weight * penalty
    return loss, LossParts(cross, penalty, aux, updated, divergence)


def teacher_divergence(
    hidden_BxTxD: jax.Array,
    head_VxD: jax.Array,
    theirs_BxTxD: jax.Array,
    their_head_VxD: jax.Array,
    *,
    temperature: float,
) -> jax.Array:
    """τ²·KL(teacher ‖ model) of the distributions at temperature τ, in nats per token; both are chunked like the loss.

    The teacher is not differentiated. τ² keeps the size of the gradient (arXiv 1503.02531).
    """

    @jax.checkpoint
    def chunk_sum(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        ours, theirs = (
            jax.nn.log_softmax(logits(hidden, head) / temperature)
            for hidden, head in zip(chunk, (head_VxD, jax.lax.stop_gradient(their_head_VxD)), strict=True)
        )
        return jnp.sum(jnp.exp(theirs) * (theirs - ours))

    count = hidden_BxTxD.shape[0] * hidden_BxTxD.shape[1]
    chunks = _split(hidden_BxTxD, jax.lax.stop_gradient(theirs_BxTxD), head_VxD.shape[0])
    return temperature**2 * jnp.sum(jax.lax.map(chunk_sum, chunks)) / count


def token_losses(hidden_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Cross-entropy of every target in nats, [B, T] float32."""

    def rows_losses(head, hidden, targets):
        chunks = _split(hidden, targets, head.shape[0])
        losses_CxBxT = jax.lax.map(lambda chunk: _chunk_losses(chunk[0], head, chunk[1]), chunks)
        return rearrange(losses_CxBxT, "C B T -> B (C T)")

    on_rows = on_shards(rows_losses, (_WHOLE, _ROWS, _ROWS), _ROWS)
    return on_rows(head_VxD.astype(hidden_BxTxD.dtype), hidden_BxTxD, targets_BxT)


@jax.custom_vjp
def cross_entropy(hidden_BxTxD: jax.Array, head_VxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats per token."""
    return jnp.mean(token_losses(hidden_BxTxD, head_VxD, targets_BxT))


def _cross_entropy_forward(hidden_BxTxD, head_VxD, targets_BxT) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def chunk_sum(hidden, head, targets):
        return jnp.sum(_chunk_losses(hidden, head, targets)) / targets_BxT.size

    def rows_gradients(head, hidden, targets):
        def step(carry, chunk):
            loss, (d_hidden, d_head) = jax.value_and_grad(chunk_sum, (0, 1))(chunk[0], head, chunk[1])
            return (carry[0] + loss, carry[1] + d_head), d_hidden

        nothing = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32)), jnp.zeros(head.shape, head_VxD.dtype)
        sums, d_hidden = jax.lax.scan(step, nothing, _split(hidden, targets, head.shape[0]))
        return *sum_over(BATCH, sums), rearrange(d_hidden, "C B T D -> B (C T) D")

    on_rows = on_shards(rows_gradients, (_WHOLE, _ROWS, _ROWS), (_WHOLE, _WHOLE, _ROWS))
    loss, d_head, d_hidden = on_rows(head_VxD.astype(hidden_BxTxD.dtype), hidden_BxTxD, targets_BxT)
    return loss, (d_hidden, d_head)


def _cross_entropy_backward(gradients, cotangent) -> tuple[jax.Array, jax.Array, None]:
    d_hidden, d_head = gradients
    return d_hidden * cotangent.astype(d_hidden.dtype), d_head * cotangent, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _chunk_losses(hidden_BxTxD, head_VxD, targets_BxT) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(hidden_BxTxD, head_VxD), targets_BxT)


def _split(hidden_BxTxD, targets_BxT, vocab_size) -> tuple[jax.Array, jax.Array]:
    """Cuts along T into the fewest equal chunks that stay small; [C, B, T/C, …]."""
    B, T = targets_BxT.shape[:2]
    most = _CHUNK_ELEMENTS.get(platform(), _CHUNK_ELEMENTS_ELSEWHERE)
    count = next(c for c in range(1, T + 1) if T % c == 0 and (B * T // c * vocab_size <= most or c == T))
    return (
        rearrange(hidden_BxTxD, "B (C T) D -> C B T D", C=count),
        rearrange(targets_BxT, "B (C T) ... -> C B T ...", C=count),
    )
