"""A corpus prepared once: documents in, array_record chunks of T + 1 tokens and a tokenizer out, found by fingerprint.

Everything that decides the chunks is in the fingerprint and the fingerprint is in the folder's name, so that corpora
of different sources, tokenizers or context lengths never meet.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jax_entropy import manifest
from jax_entropy.data import builder, packing
from jax_entropy.data.documents import Rows, TextFiles
from jax_entropy.data.sources import corpora_directory, open_documents
from jax_entropy.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.paths import writing

TOKENIZER_SAMPLE_BYTES = 1 << 28
_LONG_CHECK_BYTES = 1 << 31  # a few seconds of hashing


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
      directory: where it lies; holds `tokenizer.json` and the TFDS data set.
      source: which of the four sources it was made from.
      fingerprint: names everything that decided its chunks.
      context_length: T; a chunk holds T + 1 tokens.
      tokenizer: the one its tokens come from.
      num_train_chunks, num_validation_chunks: chunks of T + 1 tokens.
      metadata: what went in (`identity`, versions), how many files and rows were left out and why, and, for each split,
        documents, chunks, predicted tokens, the bytes they stand for, `bytes_per_token`, tokens that filled no chunk
        and the longest document (tokens).
    """

    directory: Path
    source: str
    fingerprint: str
    context_length: int
    tokenizer: Tokenizer
    num_train_chunks: int
    num_validation_chunks: int
    metadata: dict[str, Any]

    def chunks(self, split: str) -> Sequence[dict]:
        """Random access to {"tokens": [T + 1]} of a split, "train" or "validation"."""
        return builder.read_chunks(self.source, self.directory, split)


def prepare(config: Any, context_length: int, notify: Callable[[str], None] = print) -> Corpus:
    """Makes the corpus that `config.data` describes, or finds the one made before.

    Preparing is safe against kills and against other processes: it happens under a lock in a folder of its own, which
    gets its name only when it is complete and its hashes lie in it. For a moment it takes twice the space of the
    finished corpus. One that was made before counts only if every byte of it is as written; it is made again otherwise.

    Args:
      config: the `data` section of a configuration that `jax_entropy.config.check` has passed.
      context_length: T, in tokens.
      notify: is told, one line at a time, what is prepared, waited for, found damaged and left out.
    Raises:
      UserError: its source, tokenizer or folder cannot be used.
    """
    home = corpora_directory(config)
    request = _Request(config, context_length, open_documents(config, home), _given_tokenizer(config))
    directory = home / request.name
    if not directory.exists() and (same := _trained_here(request, home)) and not _damage(same, notify):
        return _load(request, same)
    if _damage(directory, notify):
        _check_writable(home)
        with writing(directory, "config.data.directory"), _locked(directory, notify):
            _remove_leftovers(home)
            if damage := _damage(directory, notify):
                if directory.exists():
                    notify(f"{str(directory)!r} is damaged ({damage}) and is prepared again")
                _build(request, directory, notify)
    return _load(request, directory)


@dataclasses.dataclass(frozen=True)
class _Request:
    """Everything that decides a corpus; `tokenizer` is None where one is to be trained."""

    config: Any
    context_length: int
    documents: TextFiles | Rows
    tokenizer: Tokenizer | None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        config = self.config
        return {
            "version": builder.VERSION,
            "source": config.source,
            "content": self.documents.digest,
            "python": platform.python_version() if config.source == "stdlib" else None,
            "tokenizer": self.tokenizer.digest() if self.tokenizer else f"BPE {config.vocab_size}",
            "context_length": self.context_length,
            "join_documents": config.join_documents,
            "validation_fraction": config.validation_fraction,
            "max_documents": config.max_documents,
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.config.source}-{self.fingerprint}"


def _check_writable(home: Path) -> None:
    if not os.access(home, os.W_OK):
        raise UserError(f"config.data.directory={str(home)!r} is not writable; name a folder that is")


def _given_tokenizer(config: Any) -> Tokenizer | None:
    try:
        return load_tokenizer(config.tokenizer) if config.tokenizer else None
    except UserError as error:
        raise UserError(f"config.data.tokenizer: {error}") from error


def _trained_here(request: _Request, home: Path) -> Path | None:
    """The same chunks under another name: made when the tokenizer, which is given now, was trained on this text."""
    directory = home / dataclasses.replace(request, tokenizer=None).name
    try:
        tokenizer = load_tokenizer(directory / "tokenizer.json")
    except UserError:  # no such corpus
        return None
    return directory if request.tokenizer and tokenizer.digest() == request.tokenizer.digest() else None


def _damage(directory: Path, notify: Callable[[str], None]) -> str | None:
    """What keeps a folder from being a complete corpus, None if nothing does: every byte of it is hashed."""
    try:
        if not directory.exists():
            return "missing"
        size = sum(path.stat().st_size for path in directory.rglob("*"))
    except OSError as error:  # as where another process is removing it
        return f"{error.filename} cannot be read: {error.strerror}"
    if size > _LONG_CHECK_BYTES:
        notify(f"Checking the {size / 1e9:.1f} GB of {str(directory)!r}")
    return manifest.damage(directory)


@contextlib.contextmanager
def _locked(directory: Path, notify: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(f"{directory}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify(f"Waiting for another process that is preparing {str(directory)!r}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(home: Path) -> None:
    """Removes what killed preparations left: folders still being built whose lock nobody holds."""
    for building in home.glob("*.building"):
        # The lock is held, or another user's.
        with contextlib.suppress(OSError), FileLock(building.with_suffix(".lock"), timeout=0):
            shutil.rmtree(building, ignore_errors=True)


def _build(request: _Request, directory: Path, notify: Callable[[str], None]) -> None:
    start, config = time.monotonic(), request.config
    building = directory.with_suffix(".building")
    for folder in (building, directory):
        if folder.exists():
            shutil.rmtree(folder)
    building.mkdir()
    notify(f"Preparing {config.source} in {str(directory)!r}")
    try:
        metadata = _write(request, building)
        if open_documents(config, directory.parent).digest != request.documents.digest:
            raise UserError(f"config.data.source={config.source!r} changed while it was read; start again")
        manifest.seal(building)
        building.rename(directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    if left_out := str(request.documents.left_out):
        notify(f"Left out: {left_out}")
    notify(
        f"Prepared {metadata['train']['tokens']:,} training and {metadata['validation']['tokens']:,} held-out tokens, "
        f"vocabulary {metadata['vocab_size']:,}, in {time.monotonic() - start:.1f} s"
    )


def _write(request: _Request, building: Path) -> dict[str, Any]:
    config, documents = request.config, request.documents
    cuts = packing.plan_cuts(
        documents,
        validation_fraction=config.validation_fraction,
        max_documents=config.max_documents,
        min_tail=8 * (request.context_length + 1),
    )
    tokenizer = request.tokenizer or train_tokenizer(
        packing.training_sample(documents, cuts, TOKENIZER_SAMPLE_BYTES), config.vocab_size
    )
    counts = packing.write_chunks(
        documents,
        cuts,
        tokenizer,
        building,
        context_length=request.context_length,
        join_documents=config.join_documents,
    )
    _check_counts(request, **counts)
    metadata = {
        "identity": request.identity,
        "vocab_size": tokenizer.vocab_size,
        "left_out": documents.left_out.counts(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("tensorflow-datasets", "tokenizers")},
        **{split: dataclasses.asdict(c) | {"bytes_per_token": c.bytes / c.tokens} for split, c in counts.items()},
    }
    files = {split: building / f"{split}.tokens" for split in counts}
    contents = builder.Contents(files, packing.token_dtype(tokenizer), request.context_length, metadata)
    builder.build(config.source, contents, building)
    for path in files.values():
        path.unlink()
    tokenizer.save(building / "tokenizer.json")
    return metadata


def _check_counts(request: _Request, train: packing.Counts, validation: packing.Counts) -> None:
    config, context_length = request.config, request.context_length
    if not train.documents + validation.documents:
        raise UserError(f"config.data.files={config.files!r} holds no text: every document is empty")
    if not train.chunks and config.join_documents:
        raise UserError(
            f"config.model.context_length={context_length} is too long: the {train.documents} documents of "
            f"config.data.source={config.source!r} have {train.tokens_left_out + 1} tokens together and "
            f"{context_length + 1} are needed; lower it"
        )
    if not train.chunks:
        raise UserError(
            f"config.model.context_length={context_length} is too long: the longest document of "
            f"config.data.source={config.source!r} has {train.longest_document} tokens and {context_length + 1} are "
            "needed; lower it or set config.data.join_documents=True"
        )
    if not validation.chunks:
        raise UserError(
            f"config.data.validation_fraction={config.validation_fraction} holds out no text of {context_length + 1} "
            f"tokens for config.model.context_length={context_length} (the longest has {validation.longest_document}); "
            "raise it or lower the context length"
        )


def _load(request: _Request, directory: Path) -> Corpus:
    metadata = builder.read_metadata(request.config.source, directory)
    return Corpus(
        directory=directory,
        source=request.config.source,
        fingerprint=request.fingerprint,
        context_length=request.context_length,
        tokenizer=load_tokenizer(directory / "tokenizer.json"),
        num_train_chunks=metadata["train"]["chunks"],
        num_validation_chunks=metadata["validation"]["chunks"],
        metadata=metadata,
    )
