"""Documents and the bytes that they are read from: text files, and rows of Parquet and JSON-lines shards.

They are read again on every pass, one document at a time, so that a corpus need not fit in memory.
"""

import codecs
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from jax_entropy.errors import UserError, nearest
from jax_entropy.paths import reading

BLOCK_BYTES = 1 << 17
_HOPELESS_ROWS = 1000  # damaged ones at the head of a shard, after which it is not read to its end


class LeftOut:
    """What a corpus does not take of the place that it was given: names, by reason, each once."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, None]] = {}

    def add(self, reason: str, name: str) -> None:
        """Notes that `name` is left out; saying so again, on another pass, changes nothing."""
        self._names.setdefault(reason, {})[name] = None

    def counts(self) -> dict[str, int]:
        """How many there are of each reason."""
        return {reason: len(names) for reason, names in self._names.items()}

    def __str__(self) -> str:
        firsts = {reason: f"{next(iter(names))!r}{', …' * (len(names) > 1)}" for reason, names in self._names.items()}
        return ", ".join(f"{count:,} {reason} ({firsts[reason]})" for reason, count in self.counts().items())


@dataclasses.dataclass(frozen=True)
class Document:
    """One text: a stable name, its size in bytes of UTF-8, and a way to open those bytes."""

    name: str
    size: int
    open: Callable[[], BinaryIO]

    def text(self, begin: int, end: int) -> Iterator[str]:
        """Yields the text between two byte offsets (moved up to whole characters) in pieces of about a block.

        Pieces end where a line starts without white space around the break, so that byte-level BPE gives the same
        tokens as for the whole; a block without such a place is cut anywhere.

        Raises:
          UserError: the file behind it is gone, cannot be read, or is no longer the text that it was.
        """
        try:
            with reading(self.name), self.open() as stream:
                begin, end = _whole_characters(stream, begin), _whole_characters(stream, end)
                stream.seek(begin)
                decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
                while begin < end:
                    data = stream.read(min(BLOCK_BYTES, end - begin))
                    if not data:
                        break
                    begin += len(data)
                    text = rest + decoder.decode(data)
                    cut = len(text) if begin == end else _line_start(text)
                    rest = text[cut:]
                    yield text[:cut]
                if rest:
                    yield rest
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name!r} changed while it was read; start again") from error


class TextFiles:
    """Files below one folder, each a document named by its relative path; what is not UTF-8 text is left out.

    Attributes:
      digest: SHA-256 of every path, size and content.
      left_out: what was found there and is not read.
    """

    def __init__(self, root: Path, paths: list[Path], left_out: LeftOut | None = None) -> None:
        self.root, self.left_out, self._sizes = root, left_out or LeftOut(), {}
        digest = hashlib.sha256()
        for name, path in _with_progress(sorted((path.relative_to(root).as_posix(), path) for path in paths), " files"):
            content = _digest_of_text(path)
            if content is None:
                self.left_out.add("not UTF-8 text", name)
            elif content[0]:
                self._sizes[name] = content[0]
                digest.update(os.fsencode(f"{name}\0{content[0]}\0{content[1]}\n"))
            else:
                self.left_out.add("empty", name)
        self.digest = digest.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Document]:
        for name, size in self._sizes.items():
            yield Document(name, size, functools.partial(open, self.root / name, "rb"))


class Rows:
    """Rows of Parquet and JSON-lines shards, each a document named by its index.

    A row that cannot be read keeps its index and has no text, so that the others stay on their side of the split.

    Attributes:
      digest: SHA-256 of the shards' bytes, in order.
      left_out: what was found there and is not read; rows join it as they are met.
    """

    def __init__(self, shards: list[Path], column: str, left_out: LeftOut | None = None) -> None:
        self.shards, self.column, self.left_out = shards, column, left_out or LeftOut()
        digest = hashlib.sha256(column.encode())
        for shard in _with_progress(shards, " shards"):
            with reading(shard), shard.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        self.digest = digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        index = 0
        for shard in self.shards:
            for data in self._texts(shard):
                yield Document(str(index), len(data), functools.partial(io.BytesIO, data))
                index += 1

    def _texts(self, shard: Path) -> Iterator[bytes]:
        """The text of each row.

        Raises:
          UserError: not one of a shard's rows, or of its first many, is readable.
        """
        rows, kind = (_parquet_rows, "parquet") if shard.name.lower().endswith(".parquet") else (_json_rows, "json")
        first_problem, damaged, readable = "", 0, False
        try:
            for place, row in rows(shard, self.column):
                try:
                    data, readable = _text_of(row, self.column), True
                except ValueError as problem:
                    first_problem = first_problem or f"{place} {problem}"
                    self.left_out.add("rows that cannot be read", f"{shard.name}, {place}")
                    data, damaged = b"", damaged + 1
                    if damaged == _HOPELESS_ROWS and not readable:
                        break
                else:
                    if not data:
                        self.left_out.add("rows without text", f"{shard.name}, {place}")
                yield data
        except UserError:
            raise
        except (OSError, EOFError, RuntimeError, ValueError, zlib.error) as error:  # pyarrow's and gzip's among them
            raise UserError(f"{str(shard)!r} cannot be read as {kind} ({_first_line(error)})") from error
        if damaged and not readable:
            raise UserError(f"{str(shard)!r}: none of its first {damaged:,} rows can be read as text: {first_problem}")


def _text_of(row: Any, column: str) -> bytes:
    """The bytes of a row's text, none for null.

    Raises:
      ValueError: what is wrong with it.
    """
    if isinstance(row, Exception):
        raise ValueError(f"is damaged ({_first_line(row)})")
    if not isinstance(row, dict):
        raise ValueError(f"holds {type(row).__name__} instead of an object with a column {column!r}")
    if column not in row:
        raise ValueError(f"has no column {column!r}{nearest(column, row) if row else ''}")
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        raise ValueError(f"holds {type(text).__name__} instead of text in column {column!r}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None


def _json_rows(shard: Path, _: str) -> Iterator[tuple[str, Any]]:
    """Place and content of each row of JSON lines, or of one JSON array; an exception where a row is damaged."""
    with (gzip.open if shard.name.lower().endswith(".gz") else open)(shard, "rb") as stream:
        head = stream.read(64).lstrip(codecs.BOM_UTF8 + b" \t\r\n")
        stream.seek(0)
        if head.startswith(b"["):
            yield from ((f"row {i}", row) for i, row in enumerate(json.load(stream), start=1))
            return
        for i, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield f"line {i}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"line {i}", error


def _parquet_rows(shard: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Place and content of each row, of one column; an exception where a row is damaged."""
    from pyarrow import parquet  # most corpora are text files

    with parquet.ParquetFile(shard) as file:
        columns = file.schema_arrow.names
        if column not in columns:
            if file.metadata.num_rows:
                raise UserError(f"{str(shard)!r} has no column {column!r}{nearest(column, columns)}")
            return
        i = 0
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for value in batch.column(column):
                i += 1
                try:
                    yield f"row {i}", {column: value.as_py()}
                except UnicodeDecodeError as error:
                    yield f"row {i}", error


def _with_progress(items: list, unit: str) -> Iterable:
    return tqdm(items, "hashing", unit=unit, disable=None, leave=False, delay=1)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:120]


def _digest_of_text(path: Path) -> tuple[int, str] | None:
    """Size and SHA-256 of a UTF-8 file, None for anything else.

    Raises:
      UserError: it cannot be read.
    """
    decoder, digest, size = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 0
    try:
        with reading(path), path.open("rb") as stream:
            while data := stream.read(BLOCK_BYTES):
                decoder.decode(data)
                if b"\0" in data:
                    return None
                digest.update(data)
                size += len(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return None
    return size, digest.hexdigest()


def _whole_characters(stream: BinaryIO, offset: int) -> int:
    stream.seek(offset)
    following = stream.read(3)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _line_start(text: str) -> int:
    last = re.search(r"\S\n\S", text[::-1])
    return len(text) - last.start() - 1 if last else len(text)
