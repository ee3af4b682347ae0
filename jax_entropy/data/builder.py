"""The TFDS side of a corpus: flat rows of tokens go in, versioned array_record shards with metadata come out.

It needs no TensorFlow, to write or to read.
"""

import contextlib
import dataclasses
import errno
import functools
import grp
import io
import itertools
import json
import os
import pwd
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from jax_entropy.data.catalog import SOURCES

VERSION = "1.0.0"
SHARD_BYTES = 1 << 25


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a builder writes: files of rows of T + 1 tokens, one a split, and the metadata that belongs to them."""

    files: Mapping[str, Path]
    dtype: type
    context_length: int
    metadata: Mapping[str, Any]

    def rows(self, split: str) -> np.ndarray:
        """Maps the file of a split: [chunks, T + 1]."""
        return np.memmap(self.files[split], self.dtype, "r").reshape(-1, self.context_length + 1)


class TokenChunks(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Chunks of T + 1 tokens, as a data set with the name of its source.

    Built shard by shard because TFDS's generator-based builders sort a split in memory and, above a gigabyte, in
    temporary files that only TensorFlow can write.
    """

    VERSION = tfds.core.Version(VERSION)
    url_infos = None  # nothing is downloaded, and looking for checksums needs a package that TFDS does not install

    def __init__(self, *, source: str, contents: Contents, data_dir: Path) -> None:
        self.name, self._contents = source, contents
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self._contents.context_length + 1,), dtype=self._contents.dtype)
        return tfds.core.DatasetInfo(
            builder=self,
            description=SOURCES[self.name].description,
            features=tfds.features.FeaturesDict({"tokens": tokens}),
            metadata=tfds.core.MetadataDict(self._contents.metadata),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Callable[[], Iterator]]]:
        shards = {}
        for split in self._contents.files:
            rows = self._contents.rows(split)
            count = min(len(rows), -(-rows.nbytes // SHARD_BYTES))
            bounds = [len(rows) * i // count for i in range(count + 1)]
            shards[split] = [functools.partial(self._shard, split, *pair) for pair in itertools.pairwise(bounds)]
        return shards

    def _shard(self, split: str, begin: int, end: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        rows = self._contents.rows(split)
        for i in tqdm(range(begin, end), f"writing {split}", unit=" chunks", disable=None, leave=False):
            yield i, {"tokens": np.array(rows[i])}


def build(source: str, contents: Contents, directory: Path) -> None:
    """Writes `contents` as the TFDS data set `source` below `directory`.

    Raises:
      OSError: the disk refuses.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), _nameless_owners():  # TFDS speaks of downloads
            TokenChunks(source=source, contents=contents, data_dir=directory).download_and_prepare()
    except (OSError, RuntimeError) as error:
        # array_record and TFDS have the operating system's reason in their text only.
        spelled = {"Not enough disk space": errno.ENOSPC} | {os.strerror(code): code for code in errno.errorcode}
        code = next((code for words, code in spelled.items() if words in str(error)), None)
        if getattr(error, "errno", None) or code is None:
            raise
        raise OSError(code, os.strerror(code)) from error


@contextlib.contextmanager
def _nameless_owners() -> Iterator[None]:
    """etils asks what the owner of a file is called, and fails where a container's user or group has no name."""

    def forgiving(ask: Callable[[int], Any]) -> Callable[[int], Any]:
        def answer(number: int) -> Any:
            try:
                return ask(number)
            except KeyError:
                return types.SimpleNamespace(pw_name="", gr_name="")

        return answer

    asked = pwd.getpwuid, grp.getgrgid
    pwd.getpwuid, grp.getgrgid = map(forgiving, asked)
    try:
        yield
    finally:
        pwd.getpwuid, grp.getgrgid = asked


def read_metadata(source: str, directory: Path) -> dict[str, Any]:
    """The metadata that was written with a data set."""
    return json.loads((directory / source / VERSION / "metadata.json").read_text())


def read_chunks(source: str, directory: Path, split: str) -> Sequence[dict[str, np.ndarray]]:
    """Random access to the chunks of a split."""
    return tfds.builder_from_directory(directory / source / VERSION).as_data_source(split=split)
