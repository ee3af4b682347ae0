"""The table of a sweep in words: cells for a terminal or Markdown, and all numbers as CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from jax_entropy.runs.workdir import to_json
from jax_entropy.sweep.table import NETWORK, Row

Cells = tuple[list[str], list[list[str]]]  # names of the columns, and the rows
_NONE = "–"


def quality(rows: Sequence[Row]) -> Cells:
    """Perplexities, ratios (beside them the paper's, where it prints them) and entropies."""
    baselines = list(dict.fromkeys(label for row in rows for label in row.ratios))
    printed = {row.label: row.published.perplexity for row in rows if row.published and row.published.perplexity}
    columns = ["architecture", "rate", "perplexity"]
    for label in baselines:
        columns += [f"÷ {label}", *(["paper's ÷"] * (label in printed))]
    columns += ["heads by quarter, %", "entropy by layer", "NaN", "sent back", "tokens", "time"]
    cells = []
    for row in rows:
        found = [row.label, _rate(row), _perplexity(row)]
        for label in baselines:
            found.append(_ratio(row, label))
            if label in printed:
                found.append(f"{printed[row.label] / printed[label]:.3f}" if row.label in printed else _NONE)
        found.append(" / ".join(f"{100 * share:.0f}" for share in row.bands) or _NONE)
        found.append(" ".join(f"{value:.2f}" for value in row.layer_entropy) or _NONE)
        found += [str(row.nan_count), str(row.sent_back), f"{row.tokens / 1e6:.2f} M"]
        found.append(_NONE if row.seconds is None else f"{row.seconds:,.0f} s")
        cells.append(found)
    return columns, cells


def private(rows: Sequence[Row]) -> Cells:
    """Predicted cost of private execution by protocol, and in the paper's system where its tables cover the size."""
    protocols = list(dict.fromkeys(protocol for row in rows for protocol in row.private))
    columns = ["architecture"]
    columns += [f"{protocol}: {what}" for protocol in protocols for what in ("MB", "rounds", f"s on {NETWORK}")]
    papers = any(row.paper_system for row in rows)
    columns += ["the paper's system: GB", "minutes"] * papers
    cells = []
    for row in rows:
        found = [row.label]
        for protocol in protocols:
            cost = row.private.get(protocol)
            found += [_NONE] * 3 if cost is None else [
                f"{cost.bytes / 1e6:,.1f}", f"{cost.rounds:,}", f"{cost.seconds:,.1f}"
            ]  # fmt: skip
        if papers:
            system = row.paper_system
            found += [_NONE] * 2 if system is None else [f"{system.gigabytes:.2f}", f"{system.minutes:.2f}"]
        cells.append(found)
    return columns, cells


def markdown(rows: Sequence[Row], title: str, facts: Sequence[str]) -> str:
    """Both tables as Markdown, the diagnoses of what diverged, and `facts` about how it was run."""
    diagnoses = [f"- `{row.label}` diverged: {row.diagnosis}" for row in rows if row.diverged]
    blocks = [f"# {title}", *facts, _grid(quality(rows)), *diagnoses]
    blocks += ["Private execution of one forward pass over the context, predicted:", _grid(private(rows))]
    return "\n\n".join(blocks) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """A line for each point and a column for each number; names of nested ones are joined by dots."""
    flat = [_flatten(to_json(row)) for row in rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def json_text(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Every number, beside `facts` about how it was run."""
    return json.dumps(to_json(facts | dict(rows=list(rows))), indent=1) + "\n"


def _rate(row: Row) -> str:
    """The learning rate, and whether one beyond those that were tried might be better."""
    rates = [float(rate) for rate in row.tuning]
    ends = {min(rates): ", the lowest", max(rates): ", the highest"} if len(rates) > 1 else {}
    return _number(row.learning_rate, "g") + ends.get(row.learning_rate, "")


def _perplexity(row: Row) -> str:
    notes = [f"{row.diverged} diverged"] * bool(row.diverged) + [f"{row.unfinished} to run"] * bool(row.unfinished)
    ended = f" ({len(row.ended)})" if row.ended else ""
    spread = f" ± {row.spread:.2f}" if row.spread is not None else ""
    return ", ".join([_number(row.perplexity, ".2f") + spread + ended, *notes])


def _ratio(row: Row, label: str) -> str:
    if label not in row.ratios:
        return _NONE
    found = row.ratios[label]
    interval = f" [{found.low:.3f}, {found.high:.3f}]" if found.low < found.high else ""
    return f"{found.value:.3f}{interval}"


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None or not math.isfinite(value) else format(value, form)


def _grid(cells: Cells) -> str:
    columns, rows = cells
    lines = [columns, ["---"] * len(columns), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
