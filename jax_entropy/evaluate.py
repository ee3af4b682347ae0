"""Held-out quality of a model: perplexity, bits per byte and head entropies, independent of the batch size."""

import functools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy import data
from jax_entropy.loss import token_losses
from jax_entropy.model import Transformer
from jax_entropy.runs.load import Run, load_run, own_tokens
from jax_entropy.sharding import constrain


@functools.partial(jax.jit, static_argnums=0)
def _evaluate_batch(model: Transformer, variables: Any, tokens_BxT1, weight_B, bytes_V):
    """Per sequence: weight, loss in nats, bytes predicted [B], head entropy [B, L, N]; the same on every process."""
    hidden_BxTxD, head_VxD, aux = model.apply(variables, tokens_BxT1[:, :-1], method="hidden")
    loss_B = jnp.sum(token_losses(hidden_BxTxD, head_VxD, tokens_BxT1[:, 1:]), axis=1)
    bytes_B = jnp.sum(bytes_V[tokens_BxT1[:, 1:]], axis=1)
    entropy_BxLxN = jnp.moveaxis(jnp.mean(aux.stats.entropy, axis=-1), 1, 0)
    per_sequence = weight_B, loss_B, bytes_B, entropy_BxLxN
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), per_sequence)


def evaluate_batches(
    model: Transformer,
    variables: Any,
    batches: Iterable[tuple[Any, Any]],
    byte_lengths: np.ndarray,
) -> dict[str, Any]:
    """Evaluates `model` on every sequence once.

    Args:
      batches: pairs of tokens [B, T+1] and weights [B], sharded or not; weight 0 marks rows that only fill a batch.
      byte_lengths: bytes that each token of the vocabulary stands for, [V].
    Returns:
      validation_loss (nats/token), validation_perplexity, bits_per_byte, head_entropy (nats) [L, N], tokens (count),
      context_length (tokens).
    """
    loss = num_bytes = tokens = sequences = 0.0
    entropy = 0.0
    byte_lengths = jnp.asarray(byte_lengths)
    for tokens_BxT1, weight_B in batches:
        sums = jax.device_get(_evaluate_batch(model, variables, tokens_BxT1, weight_B, byte_lengths))
        weight_B, loss_B, bytes_B, entropy_BxLxN = (np.asarray(x, np.float64) for x in sums)
        # float64 and one sum per sequence: the figure does not depend on how sequences are batched
        loss += float(loss_B @ weight_B)
        num_bytes += float(bytes_B @ weight_B)
        entropy += np.tensordot(weight_B, entropy_BxLxN, 1)
        tokens += float(np.sum(weight_B)) * (tokens_BxT1.shape[1] - 1)
        sequences += float(np.sum(weight_B))
    mean = loss / tokens
    return dict(
        validation_loss=mean,
        validation_perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=loss / math.log(2) / num_bytes,
        head_entropy=np.asarray(entropy / sequences, np.float32),
        tokens=int(tokens),
        context_length=tokens_BxT1.shape[1] - 1,
    )


def held_out(run: Run, notify: Callable[[str], None]) -> data.Corpus:
    """The corpus of a run, in the run's own tokens."""
    context_length = run.config.model.context_length
    section = own_tokens(run.workdir, run.config)
    corpus = data.prepare(section, context_length, notify)
    if corpus.tokenizer.digest() != run.tokenizer.digest():
        notify("the corpus has changed since training; it is read with the run's own tokenizer")
        section.tokenizer = str(run.workdir.tokenizer)
        corpus = data.prepare(section, context_length, notify)
    return corpus


def evaluate(
    run: Run | str | os.PathLike,
    *,
    best: bool = False,
    batch_size: int = 32,
    notify: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a run on the validation split of its corpus, in its own tokens.

    Args:
      run: a workdir, or what `load_run` made of one, which saves loading it again.
      batch_size: sequences evaluated at once; does not change the numbers.
      best, notify: as for `load_run`.

    Returns:
      `step`, and what `evaluate_batches` returns.

    Raises:
      UserError: as `load_run` and `data.prepare` do.
    """
    run = run if isinstance(run, Run) else load_run(run, notify, best=best)
    batches = data.validation_batches(held_out(run, notify), batch_size=batch_size)
    return {"step": run.step, **evaluate_batches(run.model, run.variables, batches, run.tokenizer.byte_lengths())}
