"""What a person reads: one way to print lines, tables, warnings and JSON, on any terminal, pipe or file.

Control characters in text from elsewhere (names, corpora, what a model wrote) are shown on a terminal, not obeyed.
"""

import codecs
import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # rich takes longer than all that `status` does
    from rich.console import Console
    from rich.table import Table

# how letters of ours are spelled where the encoding has none of them
_LETTERS = "×·−–—─…∞≥≤→√²³αβγλθ•░▒▓█"
_SPELLINGS = "x * - - - - ... inf >= <= -> sqrt 2 3 alpha beta gamma lambda theta * . : * #".split()
_PLAIN = dict(zip(_LETTERS, _SPELLINGS, strict=True))
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """`text` with control characters, but for line ends and tabs, written out: \\x1b."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def output(json_file: Path | None = None) -> TextIO:
    """Where text and tables go: standard output, or standard error where `--json=-` takes that."""
    return sys.stderr if json_file and str(json_file) == "-" else sys.stdout


def say(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints what a model or a corpus wrote: exactly, but on a terminal what would steer it is shown."""
    file = file or sys.stdout
    print(shown(text) if file.isatty() else text, file=file, end=end, flush=True)


def warn(line: str) -> None:
    """A line on standard error."""
    print(shown(line), file=sys.stderr)


def console(json_file: Path | None = None) -> "Console":
    """A console on `output(json_file)`; where that is no terminal, tables are as wide as they need to be."""
    from rich.console import Console

    class Shown(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*(shown(x) if isinstance(x, str) else x for x in objects), **dict(markup=False) | options)

    file = output(json_file)
    return Shown(file=file, highlight=False, soft_wrap=True, width=None if file.isatty() else 160)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1) -> "Table":
    """A table whose first `left` columns are names, the others numbers."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        made.add_column(
            name, justify="left" if i < left else "right", no_wrap=True, overflow="ignore" if i < left else "fold"
        )
    for row in rows:
        made.add_row(*(Text(shown(str(cell))) for cell in row))
    return made


def write_json(file: Path | None, content: Any) -> None:
    """Writes what a command found to the file of `--json`, if one is given; to standard output for `-`."""
    if file is None:
        return
    from jax_entropy.paths import writing
    from jax_entropy.runs.workdir import to_json

    text = json.dumps(to_json(content), indent=1) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
        return
    with writing(file, "--json"):
        file.write_text(text, encoding="utf-8")
    warn(f"wrote {file}")


class _Output(io.RawIOBase):
    """A file descriptor that a run can go on without: what cannot be written is dropped, and remembered."""

    def __init__(self, descriptor: int, outlives_reader: bool) -> None:
        self.descriptor, self.outlives_reader, self.failure = descriptor, outlives_reader, None

    def write(self, content: Any) -> int:
        try:
            return os.write(self.descriptor, content) if not self.failure else len(content)
        except OSError as error:
            if error.errno == errno.EPIPE and not self.outlives_reader:
                raise
            self.failure = error
            return len(content)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)


def prepare_streams(outlives_reader: bool) -> None:
    """Makes standard input, output and error usable, whatever the shell made of them, before a process prints.

    A closed one is the null device, a letter that its encoding lacks is spelled out, a full disk does not end a run.

    Args:
      outlives_reader: whether what is done goes on when nobody reads it any more, as training does.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: else the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error("jax_entropy", _spelled)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        buffer = io.BufferedWriter(_Output(descriptor, outlives_reader))
        line_buffered = descriptor == 2 or os.isatty(descriptor)
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, "jax_entropy", line_buffering=line_buffered))
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  (it is the process's)


def output_failure() -> OSError | None:
    """Why standard output could not be written, None if all of it was."""
    sys.stdout.flush()
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    spelled = (_PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in letters)
    return "".join(spelled), error.end
