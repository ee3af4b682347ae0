"""Where documents come from: the standard library, a folder of text, or rows of Parquet and JSON-lines shards.

What is found but not read is counted, and told when a corpus is prepared.
"""

import functools
import glob
import itertools
import os
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

from jax_entropy.data.catalog import SOURCES
from jax_entropy.data.documents import LeftOut, Rows, TextFiles
from jax_entropy.errors import UserError
from jax_entropy.paths import cache_directory, local_path, reading, writing

TEXT_SUFFIXES = tuple(
    ".py .pyi .txt .md .rst .tex .org .c .h .cc .cpp .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .cs .swift"
    " .kt .scala .hs .ml .lua .pl .r .jl .sql .sh .html .css .toml .yaml .yml".split()
)
SHARD_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
CODEPARROT_REPOSITORY = "huggingface-course/codeparrot-ds-train"
_HUB_SECONDS = 5  # until it counts as out of reach
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_STDLIB_SKIPPED = _SKIPPED_FOLDERS | {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "ensurepip", "turtledemo", "encodings", "pydoc_data")
}


def corpora_directory(config: Any) -> Path:
    """Where downloads and prepared corpora are kept, made if it is not there.

    Raises:
      UserError: `config.data.directory` cannot be one.
    """
    home = local_path(config.directory, "config.data.directory") if config.directory else cache_directory()
    try:
        str(home).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"config.data.directory={str(home)!r} is not UTF-8, and shards need that; name another"
        ) from None
    with writing(home, "config.data.directory"):
        home.mkdir(parents=True, exist_ok=True)
    return home


def open_documents(config: Any, directory: Path) -> TextFiles | Rows:
    """Finds the documents that `config.data` names.

    Args:
      config: the `data` section of a configuration; `source` and `files` are read.
      directory: where downloads from the hub and prepared corpora are kept; what lies there is no text.
    Raises:
      UserError: text that it names is missing, empty, binary or out of reach.
    """
    source, left_out = SOURCES[config.source], LeftOut()
    if config.source == "stdlib":
        return _standard_library()
    if config.source == "codeparrot" and not config.files:
        return Rows(_download(CODEPARROT_REPOSITORY, directory / "hub"), source.column)
    if not config.files:
        hint = {
            "files": "name a folder, a file or a glob of text",
            "languini": "name a folder of books (.txt), or of Parquet or JSON-lines shards with a 'text' column; "
            "this corpus has no public copy to download",
        }
        raise UserError(f"config.data.files is empty for config.data.source={config.source!r}: {hint[config.source]}")
    given = local_path(config.files, "config.data.files")
    root, paths = _find(given, directory, left_out)
    if source.column:
        if shards := _shards(paths):
            for path in sorted(set(paths).difference(shards)):
                reason = "empty" if path.name.lower().endswith(SHARD_SUFFIXES) else "that are no shards"
                left_out.add(reason, path.relative_to(root).as_posix())
            return Rows(_once(root, shards, left_out), source.column, left_out)
        if config.source == "codeparrot":
            raise UserError(f"config.data.files={config.files!r} holds no shard ({', '.join(SHARD_SUFFIXES)})")
    return _text_files(given, root, paths, left_out)


def named_files(config: Any, directory: Path) -> dict[str, str]:
    """Where the files that `config.data` names really lie, by the names that decide which of them are held out.

    Two sections of one source, with the same files under the same names, split them alike.

    Args:
      config, directory: as for `open_documents`.
    Raises:
      UserError: there are none.
    """
    if config.source == "stdlib":
        root, paths = _standard_library_files()
    elif not config.files:
        return {"": CODEPARROT_REPOSITORY} if config.source == "codeparrot" else {}
    else:
        root, paths = _find(local_path(config.files, "config.data.files"), directory, LeftOut())
    return {path.relative_to(root).as_posix(): os.path.realpath(path) for path in paths}


def _standard_library_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    return root, [
        path
        for path in root.rglob("*.py")
        if not _STDLIB_SKIPPED & set(path.relative_to(root).parts) and path.name != "stringprep.py"
    ]


def _standard_library() -> TextFiles:
    root, paths = _standard_library_files()
    documents = TextFiles(root, paths)
    if len(documents) < 100 or documents.size < 1e6:
        raise UserError(
            f"config.data.source='stdlib' finds only {len(documents)} source files in {str(root)!r}; this Python comes "
            "without them, so set config.data.source='files' and config.data.files to a folder of text"
        )
    return documents


def _text_files(given: Path, root: Path, paths: list[Path], left_out: LeftOut) -> TextFiles:
    chosen = paths
    if given.is_dir():
        chosen = [path for path in paths if path.suffix.lower() in TEXT_SUFFIXES]
        for path in sorted(set(paths).difference(chosen)):
            left_out.add("of another suffix", path.relative_to(root).as_posix())
    hint = "; Parquet and JSON-lines shards belong to config.data.source='languini'" if _shards(paths) else ""
    if not chosen:
        raise UserError(
            f"config.data.files={str(given)!r} has no text: none of its {len(paths)} files ends in .py, .txt, .md or "
            f"another source suffix; a glob such as {str(root / '*.log')!r} takes any file{hint}"
        )
    documents = TextFiles(root, _once(root, chosen, left_out), left_out)
    if not len(documents):
        raise UserError(f"config.data.files={str(given)!r} has no text, but {left_out}{hint}")
    return documents


def _find(given: Path, directory: Path, left_out: LeftOut) -> tuple[Path, list[Path]]:
    """The root folder and the sorted files of a folder (hidden ones left out), a single file or a glob.

    The root of a glob is what stands before its first wildcard: names, and so the split, do not hang on what else is
    there.
    """
    field = f"config.data.files={str(given)!r}"
    with reading(given, "config.data.files"):
        if given.is_file():
            return given.parent, [given]
        if given.is_dir():
            if os.path.realpath(given) == os.path.realpath(directory):
                raise UserError(f"{field} is config.data.directory too: what is prepared there would become its text")
            if paths := _walk(given, directory, left_out):
                return given, paths
            found = str(left_out) and f", but {left_out}"
            raise UserError(f"{field} holds no files{found}; put .py, .txt or .md files into it")
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
    cache, paths = os.path.realpath(directory), []
    folders = functools.partial(_folders, root=root, directory=directory, left_out=left_out)
    for path in sorted({*_matching(root, given.parts[len(root.parts) :], folders)}):
        if Path(os.path.realpath(path)).is_relative_to(cache):
            left_out.add("with prepared corpora", path.parent.relative_to(root).as_posix())
        else:
            paths.append(path)
    if not paths:
        raise UserError(f"{field} matches no file; name a folder, a file or a glob of text")
    return root, paths


def _matching(
    folder: Path, pattern: Sequence[str], folders: Callable[[Path], Iterator[tuple[Path, list[str]]]]
) -> Iterator[Path]:
    """The files that a glob matches below a folder: Python's, whose `**` would follow links round and round."""
    if not pattern or not os.path.isdir(folder):
        return
    part, *rest = pattern
    if part == "**":
        for below, _ in folders(folder):
            yield from _matching(below, rest or ["*"], folders)
        return
    for name in glob.glob(part, root_dir=folder):
        if rest:
            yield from _matching(folder / name, rest, folders)
        elif os.path.isfile(folder / name):
            yield folder / name


def _once(root: Path, paths: list[Path], left_out: LeftOut) -> list[Path]:
    """Each file under one name: its own where that is among them, else the first of those that links give it."""
    real_root, names = Path(os.path.realpath(root)), {}
    for path in paths:
        names.setdefault(os.path.realpath(path), []).append(path)
    for real, same in names.items():
        same.sort(key=lambda path: (str(real_root / path.relative_to(root)) != real, path))
        for path in same[1:]:
            left_out.add("linked to what is read anyway", path.relative_to(root).as_posix())
    return sorted(same[0] for same in names.values())


def _walk(root: Path, directory: Path, left_out: LeftOut) -> list[Path]:
    """The files below a folder, in order."""
    paths = []
    for folder, names in _folders(root, root, directory, left_out, skipped=_SKIPPED_FOLDERS):
        for path in (folder / name for name in names):
            if path.name[0] == ".":
                left_out.add("hidden or generated", path.relative_to(root).as_posix())
            elif not os.path.isfile(path):
                left_out.add("that are no files", path.relative_to(root).as_posix())
            else:
                paths.append(path)
    return sorted(paths)


def _folders(
    start: Path, root: Path, directory: Path, left_out: LeftOut, skipped: Set[str] = frozenset()
) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, but no hidden ones, with the names of the files in each.

    Links to folders are followed, but not back, and to no folder twice.

    Args:
      root: the names of what is left out begin there.
      directory: what is prepared there is left out.
      skipped: names of folders that are left out too.
    """

    def is_hidden(name: str) -> bool:
        return name[0] == "." or name in skipped

    real_start, cache = Path(os.path.realpath(start)), os.path.realpath(directory)
    seen = {str(real_start)}
    for folder, subfolders, names in os.walk(start, onerror=_refuse, followlinks=True):
        kept = []
        for path in (Path(folder, name) for name in sorted(subfolders)):
            shown, real = path.relative_to(root).as_posix(), Path(os.path.realpath(path))
            is_below = real.is_relative_to(real_start) and not any(map(is_hidden, real.relative_to(real_start).parts))
            if is_hidden(path.name):
                left_out.add("hidden or generated", shown)
            elif str(real) == cache:
                left_out.add("with prepared corpora", shown)
            elif str(real) in seen or (path.is_symlink() and (is_below or real_start.is_relative_to(real))):
                left_out.add("linked to what is read anyway", shown)
            else:
                seen.add(str(real))
                kept.append(path.name)
        subfolders[:] = kept
        yield Path(folder), names


def _refuse(error: OSError) -> NoReturn:
    with reading(error.filename):
        raise error


def _shards(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.name.lower().endswith(SHARD_SUFFIXES) and os.path.getsize(path)]


def _download(repository: str, directory: Path) -> list[Path]:
    """Downloads the shards of a hub data set once; a finished copy is used again without asking the hub."""
    from huggingface_hub import HfApi, snapshot_download

    folder = directory / repository.replace("/", "--")
    finished = folder / ".finished"
    if not finished.exists():
        with writing(folder, "config.data.directory"):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            try:
                _within(_HUB_SECONDS, lambda: HfApi().dataset_info(repository, timeout=_HUB_SECONDS))
                patterns = [f"*{suffix}" for suffix in SHARD_SUFFIXES]
                snapshot_download(repository, repo_type="dataset", local_dir=folder, allow_patterns=patterns)
            except Exception as error:  # whatever the reason, what helps is the same
                raise UserError(
                    f"config.data.source='codeparrot' is out of reach: the hub does not give {repository} "
                    f"({type(error).__name__}); put its *.json.gz or *.parquet shards into a folder and set "
                    "config.data.files to it, or use config.data.source='stdlib' or 'files'"
                ) from error
            finished.touch()
    return _shards([path for path in _walk(folder, directory, LeftOut()) if path.name != "dataset_infos.json"])


def _within(seconds: float, ask: Callable[[], Any]) -> None:
    """Calls `ask`, raising TimeoutError after `seconds`: name resolution obeys no timeout of the hub's clients."""
    outcome = []

    def call() -> None:
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
