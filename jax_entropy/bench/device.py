"""`bench device`: what one card reaches, in a few minutes and without corpus or network.

Every part is a process of its own under a time limit, and every row is on disk as soon as it is measured: a run that is
cut off leaves what it had. What the parts measure is in `parts.py`.
"""

import datetime
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_entropy.errors import UserError, nearest
from jax_entropy.paths import writing

# Parts in their order, and the share of the time that each may take.
PARTS = {
    "versions": 0.02, "ceilings": 0.03, "step": 0.27, "attention": 0.25, "correctness": 0.16, "memory": 0.04,
    "training": 0.05, "peers": 0.18,
}  # fmt: skip


def bench_device(
    out: Path, *, parts: Sequence[str] = tuple(PARTS), minutes: float = 8.0, notify: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measures this process's default device and writes `device.json` and `device.md` into the folder `out`.

    Args:
      parts: names of `PARTS`; time that one leaves over goes to those after it.
      minutes: that all parts together may take.
      notify: is told each part's begin and end.
    Returns:
      What is in device.json: command, date, and by part its rows, its seconds and how it ended.
    Raises:
      UserError: a part that does not exist, no time, or a folder that cannot be written.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"there is no part {part!r}{nearest(part, PARTS)}")
    if not 0 < minutes < math.inf:
        raise UserError(f"minutes={minutes} must be above 0, and finite")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    result = dict(
        command=f"jax-entropy bench device --parts={','.join(parts)} --minutes={minutes:g}",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), parts={},
    )  # fmt: skip
    deadline = time.monotonic() + 60 * minutes
    for i, part in enumerate(parts):
        left, share = deadline - time.monotonic(), PARTS[part] / sum(PARTS[name] for name in parts[i:])
        notify(f"{part}: up to {left * share:.0f} s")
        found = result["parts"][part] = dict(rows=[], seconds=0.0, ended="")
        _run(part, left * share, found, lambda: _write(out, result))
        notify(f"{part}: {len(found['rows'])} rows in {found['seconds']:.0f} s, {found['ended']}")
    return result


def _run(part: str, seconds: float, found: dict[str, Any], save: Callable[[], None]) -> None:
    """Runs a part's process, whose lines are rows, until it ends or its time is over."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "jax_entropy.bench.parts", part, str(max(seconds - 5, 1))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    words: list[str] = []
    reading = threading.Thread(target=lambda: words.extend(process.stderr), daemon=True)
    reading.start()
    killer = threading.Timer(max(seconds, 1), process.kill)
    killer.start()
    for line in process.stdout:
        if line.startswith("{"):
            found["rows"].append(json.loads(line))
            found["seconds"] = time.monotonic() - start
            save()
    code = process.wait()
    killer.cancel()
    reading.join(timeout=5)
    found["seconds"] = time.monotonic() - start
    last = next((word.strip() for word in reversed(words) if word.strip()), "no message")
    found["ended"] = {0: "complete", -9: "out of time"}.get(code, f"failed with code {code}: {last[:300]}")
    save()


def _write(out: Path, result: dict[str, Any]) -> None:
    with writing(out):
        (out / "device.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "device.md").write_text(markdown(result), encoding="utf-8")


def markdown(result: dict[str, Any]) -> str:
    """A table for each part; columns are the rows' names."""
    lines = [f"# What one device reaches\n\n`{result['command']}`, {result['date']}\n"]
    for part, found in result["parts"].items():
        lines.append(f"## {part}\n\n{found['ended'] or 'running'}, {found['seconds']:.0f} s\n")
        columns = list(dict.fromkeys(name for row in found["rows"] for name in row))
        if columns:
            lines += [_line(columns), _line(["---"] * len(columns))]
            lines += [_line([_spelled(row.get(name, "")) for name in columns]) for row in found["rows"]]
        lines.append("")
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
