"""What Orbax is spared or asked for, beside saving and restoring: odd paths, its noise, what a checkpoint holds."""

import functools
import glob
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Alias:
    """A directory by a name that Orbax and TensorStore can use.

    They take `[`, `*` and `?` in it for a pattern, a backslash for a separator, and text for UTF-8, and would write
    what can never be read. Such a directory gets a link of a harmless name, on this machine and until `close`.
    """

    def __init__(self, directory: Path) -> None:
        self.path, self._folder = directory, None
        if not _is_harmless(str(directory)):
            self._folder = tempfile.TemporaryDirectory(prefix="jax_entropy-")
            self.path = Path(self._folder.name, "link")
            self.path.symlink_to(directory)

    def close(self) -> None:
        """Removes the link."""
        if self._folder:
            self._folder.cleanup()


def _is_harmless(path: str) -> bool:
    return glob.escape(path) == path and "\\" not in path and path.isprintable()


def leaves(tree: Any) -> dict[str, str]:
    """Path → dtype and shape, as in {"params/head/kernel": "float32 (128, 4096)"}."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = f"{leaf.dtype} {tuple(leaf.shape)}"
    return found


def stored_leaves(path: Path) -> dict[str, str]:
    """The leaves of a saved tree; opens every array and reads none.

    Raises:
      ValueError: one cannot be opened.
    """
    return leaves(ocp.StandardCheckpointHandler().metadata(path).tree)


def reads_back(path: Path, saved: dict[str, str]) -> bool:
    """Whether the tree in `path` has the leaves that were saved, and each can be opened."""
    try:
        return stored_leaves(path) == saved
    except ValueError:
        return False


def storage_failure(error: OSError | ValueError) -> str | None:
    """The operating system's words for what went wrong; TensorStore hides its error number in a ValueError's text."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number.group(1))) if number else None


@functools.cache
def quieten() -> None:
    """Leaves out what Orbax says beside the errors that it raises: those end in one sentence."""
    # It logs the traceback of each,
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    # and leaves the other writes of a failed save behind, each of which reports to asyncio when it fails as well,
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
    # or to a loop that is gone by then.
    report = sys.unraisablehook
    sys.unraisablehook = lambda event: str(event.exc_value) == "Event loop is closed" or report(event)
