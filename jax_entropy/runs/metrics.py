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
    texts = path.read_text("utf-8", "replace").removesuffix("\n").split("\n") if path.exists() else []
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            line["step"] + 0  # a number
        except (ValueError, TypeError, KeyError):
            if number == len(texts):
                break
            raise UserError(f"{str(path)!r} is damaged at line {number}: not a JSON object with a step") from None
        lines.append(line)
    return lines
