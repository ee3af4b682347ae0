"""Where documents come from: the standard library, a folder of text, or rows of Parquet and JSON-lines shards.

A source is read again on every pass, one document at a time, so that a corpus need not fit in memory.
"""

import codecs
import dataclasses
import functools
import glob
import hashlib
import io
import logging
import os
import re
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock

from jax_entropy.errors import UserError, nearest


class Source(NamedTuple):
    """One value of `config.data.source`: how it is called in print, and the column that shards of it have."""

    title: str  # "": the name of its files
    description: str
    column: str = ""


SOURCES = {
    "stdlib": Source(
        "Python standard library",
        "The source of the running Python's standard library, without tests and generated tables.",
    ),
    "files": Source("", "Files of text or source code."),
    "codeparrot": Source(
        "CodeParrot", "Python scripts of the Hugging Face course's filtered CodeParrot set.", column="content"
    ),
    "languini": Source("Languini books", "Books, as in Languini Kitchen.", column="text"),
}
TEXT_SUFFIXES = tuple(
    ".py .pyi .txt .md .rst .tex .org .c .h .cc .cpp .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .cs .swift"
    " .kt .scala .hs .ml .lua .pl .r .jl .sql .sh .html .css .toml .yaml .yml".split()
)
SHARD_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
CODEPARROT_REPOSITORY = "huggingface-course/codeparrot-ds-train"
BLOCK_BYTES = 1 << 17
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_STDLIB_SKIPPED = _SKIPPED_FOLDERS | {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "turtledemo", "encodings", "pydoc_data")
}


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
        """
        with self.open() as stream:
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


class TextFiles:
    """Files below one folder, each a document named by its relative path; what is not UTF-8 text is left out.

    Attributes:
      digest: SHA-256 of every path, size and content.
      skipped: number of files left out because they are not UTF-8 text.
    """

    def __init__(self, root: Path, paths: list[Path]):
        self.root, self.skipped, self._sizes = root, 0, {}
        digest = hashlib.sha256()
        for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
            content = _digest_of_text(path)
            if content is None:
                self.skipped += 1
            elif content[0]:
                self._sizes[name] = content[0]
                digest.update(f"{name}\0{content[0]}\0{content[1]}\n".encode())
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
    """Rows of Parquet and JSON-lines shards, read through Hugging Face `datasets`, each a document named by its index.

    Attributes:
      digest: SHA-256 of the shards' bytes, in order.
    """

    def __init__(self, shards: list[Path], column: str):
        self.shards, self.column, self.skipped = shards, column, 0
        digest = hashlib.sha256(column.encode())
        for shard in shards:
            with shard.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        self.digest = digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        index = 0
        for shard in self.shards:
            for text in _texts_of_shard(shard, self.column):
                data = text.encode()
                yield Document(str(index), len(data), functools.partial(io.BytesIO, data))
                index += 1


def open_documents(config: Any, directory: Path) -> TextFiles | Rows:
    """Finds the documents that `config.data` names.

    Args:
      config: the `data` section of a configuration; `source` and `files` are read.
      directory: where downloads from the hub are kept.

    Raises:
      UserError: the text that it names is missing, empty, binary or out of reach.
    """
    if config.source == "stdlib":
        return _standard_library()
    if config.source == "codeparrot" and not config.files:
        return Rows(_download(CODEPARROT_REPOSITORY, directory / "hub"), "content")
    if not config.files:
        hint = {
            "files": "name a folder, a file or a glob of text",
            "languini": "name a folder of books (.txt), or of Parquet or JSON-lines shards with a 'text' column; "
            "this corpus has no public copy to download",
        }
        raise UserError(f"config.data.files is empty for config.data.source={config.source!r}: {hint[config.source]}")
    root, paths = _find(config.files)
    if config.source != "files":
        if shards := _shards(paths):
            return Rows(shards, "content" if config.source == "codeparrot" else "text")
        if config.source == "codeparrot":
            raise UserError(f"config.data.files={config.files!r} holds no shard ({', '.join(SHARD_SUFFIXES)})")
    return _text_files(config.files, root, paths)


def _standard_library() -> TextFiles:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in root.rglob("*.py")
        if not _STDLIB_SKIPPED & set(path.relative_to(root).parts) and path.name != "stringprep.py"
    ]
    documents = TextFiles(root, paths)
    if len(documents) < 100 or documents.size < 1e6:
        raise UserError(
            f"config.data.source='stdlib' finds only {len(documents)} source files in {root}; this Python comes "
            "without them, so set config.data.source='files' and config.data.files to a folder of text"
        )
    return documents


def _text_files(pattern: str, root: Path, paths: list[Path]) -> TextFiles:
    chosen = paths
    if Path(pattern).expanduser().is_dir():
        chosen = [path for path in paths if path.suffix.lower() in TEXT_SUFFIXES]
    hint = "; Parquet and JSON-lines shards belong to config.data.source='languini'" if _shards(paths) else ""
    if not chosen:
        raise UserError(
            f"config.data.files={pattern!r} has no text: none of its {len(paths)} files ends in .py, .txt, .md or "
            f"another source suffix; a glob such as {str(root / '*.log')!r} takes any file{hint}"
        )
    documents = TextFiles(root, chosen)
    if not len(documents):
        raise UserError(
            f"config.data.files={pattern!r} has no text: of {len(chosen)} files {documents.skipped} are binary "
            f"(not UTF-8) and {len(chosen) - documents.skipped} are empty{hint}"
        )
    return documents


def _find(pattern: str) -> tuple[Path, list[Path]]:
    """Returns the root folder and the sorted files of a folder (hidden ones left out), a single file or a glob."""
    path = Path(pattern).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        paths = []
        for folder, subfolders, names in os.walk(path, onerror=_unreadable):
            subfolders[:] = [name for name in subfolders if name[0] != "." and name not in _SKIPPED_FOLDERS]
            paths += [Path(folder, name) for name in names if name[0] != "."]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise UserError(f"config.data.files={pattern!r} is an empty folder; put .py, .txt or .md files into it")
        return path, sorted(paths)
    paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not paths:
        raise UserError(f"config.data.files={pattern!r} matches no file; name a folder, a file or a glob of text")
    return Path(os.path.commonpath([name.parent for name in paths])), paths


def _unreadable(error: OSError):
    raise UserError(f"config.data.files: {error.filename} cannot be read ({error.strerror})")


def _shards(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.name.lower().endswith(SHARD_SUFFIXES) and path.stat().st_size]


def _download(repository: str, directory: Path) -> list[Path]:
    """Downloads the shards of a hub data set once; a finished copy is used again without asking the hub."""
    from huggingface_hub import HfApi, snapshot_download

    folder = directory / repository.replace("/", "--")
    finished = folder / ".finished"
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            try:
                _within(5, lambda: HfApi().dataset_info(repository, timeout=4))
                patterns = [f"*{suffix}" for suffix in SHARD_SUFFIXES]
                snapshot_download(repository, repo_type="dataset", local_dir=folder, allow_patterns=patterns)
            except Exception as error:  # whatever the reason, what helps is the same
                raise UserError(
                    f"config.data.source='codeparrot' is out of reach: the hub does not give {repository} "
                    f"({type(error).__name__}); put its *.json.gz or *.parquet shards into a folder and set "
                    "config.data.files to it, or use config.data.source='stdlib' or 'files'"
                ) from error
            finished.touch()
    return _shards([path for path in _find(str(folder))[1] if path.name != "dataset_infos.json"])


def _within(seconds: float, ask: Callable[[], Any]):
    """Calls `ask`, raising TimeoutError after `seconds`: name resolution obeys no timeout of the hub's clients."""
    outcome = []

    def call():
        try:
            outcome.append((ask(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    if outcome[0][1]:
        raise outcome[0][1]


def _texts_of_shard(shard: Path, column: str) -> Iterator[str]:
    import datasets  # a second of imports that most runs do not need

    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    kind = "parquet" if shard.name.lower().endswith(".parquet") else "json"
    try:
        name = glob.escape(str(shard.resolve()))
        try:
            rows = datasets.load_dataset(kind, data_files={"train": name}, split="train", streaming=True)
        except StopIteration:
            return
        for row in rows:
            if column not in row:
                raise UserError(f"{shard} has no column {column!r}{nearest(column, row)}")
            if not isinstance(row[column] or "", str):
                raise UserError(f"{shard}: column {column!r} holds {type(row[column]).__name__} instead of text")
            yield row[column] or ""
    except UserError:
        raise
    except Exception as error:  # pyarrow, gzip and datasets each have their own
        raise UserError(f"{shard} cannot be read as {kind} ({type(error).__name__})") from error


def _digest_of_text(path: Path) -> tuple[int, str] | None:
    """Returns size and SHA-256 of a UTF-8 file, None for anything else."""
    decoder, digest, size = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            while data := stream.read(BLOCK_BYTES):
                decoder.decode(data)
                if b"\0" in data:
                    return None
                digest.update(data)
                size += len(data)
        decoder.decode(b"", final=True)
    except (OSError, UnicodeDecodeError):
        return None
    return size, digest.hexdigest()


def _whole_characters(stream: BinaryIO, offset: int) -> int:
    stream.seek(offset)
    following = stream.read(3)
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _line_start(text: str) -> int:
    last = re.search(r"\S\n\S", text[::-1])
    return len(text) - last.start() - 1 if last else len(text)
