"""Paths and files that people name: `~` is expanded, what is no path of this machine is refused, failures are told."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jax_entropy.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, as Linux has them


def local_path(text: str | os.PathLike, name: str) -> Path:
    """The path that a flag or field called `name` holds, with `~` expanded.

    Raises:
      UserError: an empty text, an address like gs://… or s3://…, a `~` that stands for no home, or what no file can be
        called.
    """
    if not isinstance(text, str | os.PathLike):
        raise UserError(f"{name}={text!r} is no path")
    text = os.fspath(text)
    if not text:
        raise UserError(f"{name}={text!r} is empty; name a path")
    if scheme := _SCHEME.match(text):
        raise UserError(
            f"{name}={text!r} is an address on a network ({scheme[0]}), and only folders of this machine can be used; "
            "mount it and name the folder"
        )
    if "\0" in text:
        raise UserError(f"{name}={text!r} holds a zero byte, which no path can")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{name}={text!r}: there is no home folder for its {text.split('/')[0]!r}; write it out"
        ) from None
    too_long = [part for part in path.parts if len(os.fsencode(part)) > _LONGEST_NAME]
    if too_long or len(os.fsencode(path)) > _LONGEST_PATH:
        shown = too_long[0] if too_long else str(path)
        raise UserError(
            f"{name}={shown[:40]}…: a name of {len(os.fsencode(shown))} bytes is too long; a part of a path holds "
            f"{_LONGEST_NAME}, all of it {_LONGEST_PATH}"
        )
    return path


def cache_directory() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/jax_entropy, or ~/.cache/jax_entropy.

    Raises:
      UserError: this user has no home folder.
    """
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "jax_entropy"
    try:
        return Path.home() / ".cache" / "jax_entropy"
    except RuntimeError:
        raise UserError("this user has no home folder for a cache; set XDG_CACHE_HOME to a folder") from None


@contextlib.contextmanager
def writing(path: str | os.PathLike, name: str = "") -> Iterator[None]:
    """Turns what the operating system refuses while `path` is written, given by `name`, into a UserError."""
    try:
        yield
    except OSError as error:
        given = f"{name}={os.fspath(path)}" if name else os.fspath(path)
        raise UserError(f"{given} cannot be written: {error.strerror or error}; choose another place") from error


@contextlib.contextmanager
def reading(path: str | os.PathLike, name: str = "") -> Iterator[None]:
    """Turns what the operating system refuses while `path` is read, given by `name`, into a UserError."""
    try:
        yield
    except OSError as error:
        given = f"{name}={os.fspath(path)!r}" if name else repr(os.fspath(path))
        raise UserError(f"{given} cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which then takes its place: it appears whole or not at all."""
    partial = path.with_name("partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def as_text(content: bytes, name: str) -> str:
    """Bytes that somebody gives as text, as they are.

    Args:
      name: what they come from, in a sentence.
    Raises:
      UserError: they are not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
