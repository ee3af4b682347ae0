"""Hashes of a folder's files, written beside them: whether every byte is still as it was when the folder was sealed.

The manifest is what `sha256sum` writes, so that `sha256sum --check manifest.sha256` answers without this package.
"""

import hashlib
import os
from pathlib import Path

MANIFEST = "manifest.sha256"


def seal(directory: Path) -> None:
    """Writes the manifest of what lies in `directory` now."""
    (directory / MANIFEST).write_bytes(_lines(directory))


def damage(directory: Path) -> str | None:
    """What differs from the folder that was sealed, in a few words; None if nothing does."""
    try:
        recorded = (directory / MANIFEST).read_bytes()
        actual = _lines(directory)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    if recorded == actual:
        return None
    recorded_lines, actual_lines = recorded.splitlines(), actual.splitlines()
    changed = [line for line in actual_lines if line not in recorded_lines]
    missing = [line for line in recorded_lines if line not in actual_lines]
    name = next((line.partition(b"  ")[2].decode(errors="replace") for line in changed or missing), MANIFEST)
    return f"{name} is {'not as written' if changed or not missing else 'missing'}"


def _lines(directory: Path) -> bytes:
    lines = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(digest.encode() + b"  " + os.fsencode(path.relative_to(directory)) + b"\n")
    return b"".join(lines)
