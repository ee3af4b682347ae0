"""What a run wrote down line by line: metrics.jsonl and guard.jsonl, one JSON object with a step a line."""

import json
from pathlib import Path
from typing import Any

from jax_entropy.errors import UserError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file in their order; none if it is not there.

    The last line may be cut short: the run was killed, or is just now writing.

    Raises:
      UserError: a line before the last is not a JSON object with a step.
    """
    texts = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.exists() else []
    lines = [_parsed(text) for text in texts]
    if None in lines[:-1]:
        number = lines.index(None) + 1
        raise UserError(f"{str(path)!r} is damaged at line {number}: not a JSON object with a step")
    return [line for line in lines if line is not None]


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the whole lines up to `step`, none if it is 0; a kill leaves the old file or the new one."""
    kept = path.with_suffix(".new")
    with path.open("rb") as old, kept.open("wb") as new:
        for text in old:
            line = _parsed(text) if step and text.endswith(b"\n") else None
            if line is not None and line["step"] <= step:
                new.write(text)
    kept.replace(path)


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line, None for what is no JSON object with a step."""
    try:
        line = json.loads(text)
        return line if isinstance(line["step"], (int, float)) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
