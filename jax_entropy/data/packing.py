"""Which text trains, which is held out, and how token streams become chunks of T + 1 tokens.

Everything here streams: what stays in memory is one number a document and a few mebibytes of text.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jax_entropy.data.documents import Document
from jax_entropy.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")


def plan_cuts(
    documents: Iterable[Document], *, validation_fraction: float, max_documents: int, min_tail: int
) -> np.ndarray:
    """Decides, for every document, the byte offset at which training text ends and validation text begins.

    A document is held out whole when the hash of its name is below `validation_fraction`. Where that holds out less
    than a third or more than three times the wanted share of the bytes (few documents), they are held out in the order
    of their hashes until the share is reached. Where that fails too (a single document, or one that outweighs
    the rest), the end of every document is held out, or, where no end is as long as `min_tail`, that of the longest.

    Args:
      documents: read once, for names and sizes.
      validation_fraction: share of the text that is held out.
      max_documents: how many documents to take, chosen by the first entries of numpy's permutation with seed 0 (what
        Hugging Face's `shuffle(seed=0)` puts first); 0 takes all.
      min_tail: bytes.
    Returns:
      int64 [documents]: bytes before the offset train, those after it validate; −1 where a document is left out.
    """
    documents = tqdm(documents, "counting", unit=" documents", disable=None, leave=False)
    pairs = ((document.size, _hash(document.name)) for document in documents)
    table = np.fromiter(pairs, np.dtype([("size", np.int64), ("hash", np.float64)]))
    chosen = np.ones(len(table), bool)
    if 0 < max_documents < len(table):
        chosen[np.random.default_rng(0).permutation(len(table))[max_documents:]] = False
    cuts = np.full(len(table), -1)
    cuts[chosen] = _cut(table["size"][chosen], table["hash"][chosen], validation_fraction, min_tail)
    return cuts


def _cut(size: np.ndarray, name_hash: np.ndarray, fraction: float, min_tail: int) -> np.ndarray:
    total = size.sum()
    order = np.argsort(name_hash)
    first = np.empty(len(size), bool)
    first[order] = np.cumsum(size[order]) - size[order] < fraction * total
    for held in (name_hash < fraction, first):
        if fraction / 3 * total <= size[held].sum() <= min(3 * fraction, (1 + fraction) / 2) * total:
            return np.where(held, 0, size)
    tail = (fraction * size).astype(np.int64)
    tail[tail < min_tail] = 0
    if not tail.any():
        longest = np.argmax(size)
        tail[longest] = min(min_tail, size[longest] // 2)
    return size - tail


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


def training_sample(documents: Iterable[Document], cuts: np.ndarray, max_bytes: int) -> Iterator[str]:
    """Yields the training text, or evenly spaced pieces of about `max_bytes` of it where there is more."""
    keep = min(1.0, max_bytes / max(1, cuts[cuts > 0].sum()))
    count = 0
    documents = tqdm(documents, "training the tokenizer", len(cuts), unit=" documents", disable=None, leave=False)
    for document, cut in zip(documents, cuts, strict=True):
        for text in document.text(0, cut) if cut > 0 else ():
            count += 1
            if int(count * keep) > int((count - 1) * keep):
                yield text


def pack(tokens: np.ndarray, context_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a stream of tokens into chunks that share one token, so that every token but the first is predicted once.

    Args:
      tokens: [n].
      context_length: T.
    Returns:
      chunks [k, T + 1] (only full ones) and the rest of the stream, which starts with the last chunk's last token.
    """
    count = max(0, (len(tokens) - 1) // context_length)
    if not count:
        return np.empty((0, context_length + 1), tokens.dtype), tokens
    windows = np.lib.stride_tricks.sliding_window_view(tokens, context_length + 1)
    return windows[::context_length][:count], tokens[count * context_length :]


@dataclasses.dataclass
class Counts:
    """What one split holds: predicted tokens and the bytes that they stand for, and the tokens that filled no chunk."""

    documents: int = 0
    chunks: int = 0
    tokens: int = 0
    bytes: int = 0
    tokens_left_out: int = 0
    longest_document: int = 0


class _SplitFile:
    """Appends the chunks of one split to a flat file of rows."""

    def __init__(self, path: Path, tokenizer: Tokenizer, context_length: int, join: bool) -> None:
        self.counts = Counts()
        self._file = path.open("wb")
        self._byte_lengths, self._end_of_text = tokenizer.byte_lengths(), tokenizer.end_of_text
        self._dtype, self._context_length, self._join = token_dtype(tokenizer), context_length, join
        self._rest, self._length = np.empty(0, self._dtype), 0

    def add(self, ids: list[int]) -> None:
        self._length += len(ids)
        self._cut(ids)

    def end_document(self) -> None:
        self.counts.documents += 1
        self.counts.longest_document = max(self.counts.longest_document, self._length)
        self._length = 0
        if self._join:
            self._cut([self._end_of_text])
        else:
            self._drop_rest()

    def close(self) -> None:
        self._drop_rest()
        self._file.close()

    def _cut(self, ids: list[int]) -> None:
        tokens = np.concatenate([self._rest, np.asarray(ids, self._dtype)])
        chunks, self._rest = pack(tokens, self._context_length)
        self._file.write(np.ascontiguousarray(chunks).tobytes())
        self.counts.chunks += len(chunks)
        self.counts.tokens += len(chunks) * self._context_length
        self.counts.bytes += int(self._byte_lengths[chunks[:, 1:]].sum())

    def _drop_rest(self) -> None:
        self.counts.tokens_left_out += max(0, len(self._rest) - 1)
        self._rest = self._rest[:0]


def token_dtype(tokenizer: Tokenizer) -> type:
    """The narrowest type that holds the tokenizer's ids."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def write_chunks(
    documents: Iterable[Document],
    cuts: np.ndarray,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    context_length: int,
    join_documents: bool,
) -> dict[str, Counts]:
    """Tokenises every document once and writes `train.tokens` and `validation.tokens`, rows of T + 1 tokens.

    Without `join_documents` no chunk crosses a document; with it each document is followed by the end-of-text token
    and the next one.
    """
    files = [_SplitFile(directory / f"{split}.tokens", tokenizer, context_length, join_documents) for split in SPLITS]
    progress = tqdm(total=len(cuts), desc="tokenising", unit=" documents", disable=None, leave=False)

    def texts() -> Iterator[tuple[tuple[_SplitFile, bool], str]]:
        for document, cut in zip(documents, cuts, strict=True):
            spans = ((0, cut), (cut, document.size)) if cut >= 0 else ()
            for file, (begin, end) in zip(files, spans, strict=False):  # no spans: left out
                if begin < end:
                    yield from (((file, False), text) for text in document.text(begin, end))
                    yield (file, True), ""
            progress.update()

    with contextlib.ExitStack() as stack:
        for closed in (*files, progress):
            stack.enter_context(contextlib.closing(closed))
        for (file, ends_document), ids in tokenizer.encode_stream(texts()):
            file.add(ids)
            if ends_document:
                file.end_document()
    return {split: file.counts for split, file in zip(SPLITS, files, strict=True)}
