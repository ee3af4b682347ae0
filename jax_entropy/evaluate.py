"""Held-out quality of a model: perplexity, bits per byte and head entropies, independent of the batch size."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jax_entropy import data
from jax_entropy.config import check
from jax_entropy.data.packing import pack
from jax_entropy.data.sources import corpora_directory, named_files
from jax_entropy.entropy import max_entropy
from jax_entropy.errors import UserError, check_kind, check_number
from jax_entropy.loss import token_losses
from jax_entropy.model import Transformer
from jax_entropy.paths import as_text, local_path, reading
from jax_entropy.runs.load import Run, loaded, own_tokens
from jax_entropy.runs.reading import TOKENS, Reading
from jax_entropy.sharding import constrain

_PLACE = ("directory", "num_threads", "prefetch")  # where a corpus lies and how it is read, not what it is
_SPLIT = ("source", "files", "validation_fraction", "max_documents")  # what decides which text is held out


@functools.partial(jax.jit, static_argnums=0)
def _evaluate_batch(
    model: Transformer, variables: Any, tokens_BxT1, weight_B, bytes_V
) -> tuple[tuple[jax.Array, ...], Reading, jax.Array | None]:
    """Per sequence: weight, loss in nats, bytes predicted [B], head entropy [B, L, N]; how the first were read; and the
    most entropy that a head can have on average, [L], None where it is that of causal attention.

    The same on every process.
    """
    hidden_BxTxD, head_VxD, aux = model.apply(variables, tokens_BxT1[:, :-1], method="hidden")
    loss_BxT = token_losses(hidden_BxTxD, head_VxD, tokens_BxT1[:, 1:])
    loss_B = jnp.sum(loss_BxT, axis=1)
    bytes_B = jnp.sum(bytes_V[tokens_BxT1[:, 1:]], axis=1)
    entropy_BxLxN = jnp.moveaxis(jnp.mean(aux.stats.entropy, axis=-1), 1, 0)
    per_sequence = weight_B, loss_B, bytes_B, entropy_BxLxN
    R, T = max(1, TOKENS // loss_BxT.shape[1]), min(TOKENS, loss_BxT.shape[1])
    reading = Reading(
        tokens=tokens_BxT1[:R, : T + 1],
        loss=loss_BxT[:R, :T],
        entropy=jnp.moveaxis(aux.stats.entropy[:, :R, :, :T], 1, 2),
        temperature=aux.temperature,
    )
    maximum_L = None if aux.maximum is None else jnp.mean(aux.maximum, axis=1)
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), (per_sequence, reading, maximum_L))


def evaluate_batches(
    model: Transformer,
    variables: Any,
    batches: Iterable[tuple[Any, Any]],
    byte_lengths: np.ndarray,
    read: Callable[[Reading], None] | None = None,
) -> dict[str, Any]:
    """Evaluates `model` on every sequence once.

    Args:
      batches: pairs of tokens [B, T+1] and weights [B], sharded or not, of any B and T; weight 0 marks rows that only
        fill a batch.
      byte_lengths: bytes that each token of the vocabulary stands for, [V].
      read: is given how the first few hundred tokens were read.
    Returns:
      validation_loss (nats/token), validation_perplexity, bits_per_byte, head_entropy (nats) [L, N], maximum_causal
      (the most that it can be of the longest, nats) [L], tokens (count), context_length (tokens, of the longest).
    """
    loss = num_bytes = tokens = entropy = 0.0
    context_length, maximum_L = 0, None
    byte_lengths = jnp.asarray(byte_lengths)
    for tokens_BxT1, weight_B in batches:
        sums, reading, most_L = _evaluate_batch(model, variables, tokens_BxT1, weight_B, byte_lengths)
        if read:
            read(jax.device_get(reading))
            read = None
        sums = jax.device_get(sums)
        weight_B, loss_B, bytes_B, entropy_BxLxN = (np.asarray(x, np.float64) for x in sums)
        # float64 and one sum per sequence: the figure does not depend on how sequences are batched
        loss += float(loss_B @ weight_B)
        num_bytes += float(bytes_B @ weight_B)
        length = tokens_BxT1.shape[1] - 1
        entropy += np.tensordot(weight_B * length, entropy_BxLxN, 1)
        tokens += float(np.sum(weight_B)) * length
        if length > context_length:
            context_length, maximum_L = length, jax.device_get(most_L)
    mean = loss / tokens
    if maximum_L is None:
        maximum_L = np.full(entropy.shape[0], max_entropy(context_length, "causal"))
    return dict(
        validation_loss=mean,
        validation_perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=loss / math.log(2) / num_bytes,
        head_entropy=np.asarray(entropy / tokens, np.float32),
        maximum_causal=np.asarray(maximum_L, np.float32),
        tokens=int(tokens),
        context_length=context_length,
    )


def held_out(run: Run, notify: Callable[[str], None]) -> data.Corpus:
    """The corpus of a run, in the run's own tokens.

    Raises:
      UserError: it has changed since: what is held out of it now may have been trained on.
    """
    corpus = data.prepare(own_tokens(run.workdir, run.config), run.config.model.context_length, notify)
    if run.corpus not in (None, corpus.fingerprint):
        raise UserError(
            f"the text of {_name(run.config.data)} has changed since {run.workdir.path} was trained on it, so what is "
            "held out of it now may have been trained on; restore it, or name a text to evaluate on"
        )
    return corpus


def evaluate(
    run: Run | str | os.PathLike,
    *,
    best: bool = False,
    batch_size: int = 32,
    text: str | os.PathLike | None = None,
    section: ConfigDict | None = None,
    notify: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a run in its own tokens, by default on the validation split of its corpus.

    Args:
      run: a workdir, or what `load_run` made of one, which saves loading it again.
      batch_size: sequences evaluated at once; does not change the numbers.
      text: a file of text to evaluate on instead, all of it.
      section: the `data` section of a configuration, to evaluate on the validation split of its corpus instead.
      best, notify: as for `load_run`; a run that is loaded has its checkpoint already.
    Returns:
      `step`, `text` (what it was evaluated on, in words), and what `evaluate_batches` returns.
    Raises:
      UserError: the run's corpus has changed, `text` cannot be read, a value of `section` cannot work, it would hold
        out text that the run was trained on, it and `text` are both given, and as `load_run` and `data.prepare` do.
    """
    check_number("batch_size", batch_size, 1)
    check_kind("section", section, ConfigDict | None, "the data section of a config")
    if text is not None and section is not None:
        raise UserError("text and section exclude each other: each names a text")
    run = loaded(run, notify, best=best)
    if text is not None:
        batches, words = _text_batches(run, text, batch_size), f"on {os.fspath(text)}"
    else:
        corpus, words = _corpus(run, section, notify)
        batches = data.validation_batches(corpus, batch_size=min(batch_size, corpus.num_validation_chunks))
    measured = evaluate_batches(run.model, run.variables, batches, run.tokenizer.byte_lengths())
    return {"step": run.step, "text": words, **measured}


def _corpus(run: Run, section: ConfigDict | None, notify: Callable[[str], None]) -> tuple[data.Corpus, str]:
    """A corpus whose validation split is to be judged on, and what that split is in words."""
    own = run.config.data
    words = "held out" if run.corpus else f"held out of {_name(own)}, which it is not known to have been trained on"
    if section is None:
        return held_out(run, notify), words
    check(_with_data(run.config, section))
    if _is_split_alike(run, section):
        there = own.copy_and_resolve_references()
        there.update({name: section[name] for name in _PLACE})
        corpus = held_out(run._replace(config=_with_data(run.config, there)), notify)
        if section.join_documents == own.join_documents:
            return corpus, words
    section = section.copy_and_resolve_references()
    section.tokenizer = str(run.workdir.tokenizer)
    corpus = data.prepare(section, run.config.model.context_length, notify)
    return corpus, f"on the validation split of {_name(section)}"


def _is_split_alike(run: Run, section: ConfigDict) -> bool:
    """Whether a section names the text of the run itself, and holds out the same of it.

    Raises:
      UserError: it holds out other parts of text that the run was trained on.
    """
    own = run.config.data
    if all(section[name] == own[name] for name in _SPLIT):
        return True
    directory = corpora_directory(section)
    named, own_files = named_files(section, directory), {}
    with contextlib.suppress(UserError):  # it may be gone, and then it is not what the section names
        own_files = named_files(own, directory)
    changed = [name for name in _SPLIT if section[name] != own[name] and (name != "files" or named != own_files)]
    if changed and run.corpus and set(named.values()) & set(own_files.values()):
        given = ", ".join(f"config.data.{name}={section[name]!r} instead of {own[name]!r}" for name in changed)
        raise UserError(
            f"{given} holds out other parts of the text of {run.workdir.path}, which it may have been trained on; "
            "leave what the run has there, or name a text of which it has seen nothing"
        )
    return not changed


def _with_data(config: ConfigDict, section: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data = section
    return config


def _name(section: ConfigDict) -> str:
    if section.source == "stdlib":  # which reads no files, whatever the section names
        return "Python's standard library"
    return section.files or section.source


def _text_batches(run: Run, path: str | os.PathLike, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A file as one document that is predicted from its first token on; the rest of it is a sequence of its own."""
    path = local_path(path, "text")
    with reading(path, "text"):
        content = as_text(path.read_bytes(), str(path))
    if not content:
        raise UserError(f"{path} holds no text")
    tokens = np.array([run.tokenizer.end_of_text, *run.tokenizer.encode(content)], np.int32)
    chunks, rest = pack(tokens, run.config.model.context_length)
    batch_size = max(1, min(batch_size, len(chunks)))

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin in range(0, len(chunks), batch_size):
            rows = np.arange(begin, begin + batch_size)
            yield chunks[np.minimum(rows, len(chunks) - 1)], (rows < len(chunks)).astype(np.float32)
        if len(rest) > 1:
            yield rest[None], np.ones(1, np.float32)

    return batches()
