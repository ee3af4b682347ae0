"""`private precision`: what fraction bits and the form of the exponential cost, and what they leave of the logits."""

from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from jax_entropy import data
from jax_entropy.errors import UserError
from jax_entropy.evaluate import held_out
from jax_entropy.private.cost.profile import plain_logits, whole
from jax_entropy.private.engine.engine import Account, Setting
from jax_entropy.private.program.export import Export
from jax_entropy.private.program.fixed_point import check_range
from jax_entropy.runs.load import Run

# (fraction bits, exponential, its squarings), from the cheapest on.
SETTINGS = (
    (16, "taylor", 8), (18, "taylor", 8), (22, "taylor", 8), (16, "taylor", 10), (18, "taylor", 10), (20, "taylor", 10),
    (22, "taylor", 10), (18, "pade", 0), (22, "pade", 0),
)  # fmt: skip


class Precision(NamedTuple):
    """A setting, what a warm forward pass took, and its logits beside those of float32; or why it was refused."""

    setting: Setting
    account: Account | None
    largest_error: float
    mean_error: float
    agreement: float  # share of positions with the same likeliest token
    refused: str


def held_out_tokens(run: Run, num_tokens: int, notify) -> list[int]:
    """The first tokens of the validation text of a run's corpus."""
    tokens_1xT1, _ = next(iter(data.validation_batches(held_out(run, notify), batch_size=1)))
    return np.asarray(tokens_1xT1)[0, :num_tokens].tolist()


def measure_precision(exported: Export, tokens: list[int], base: Setting, notify) -> tuple[list[Precision], float]:
    """A row for each of SETTINGS, under the protocol of `base`, and the largest magnitude of a logit."""
    expected, rows = plain_logits(exported, tokens), []
    for bits, exponent, squarings in SETTINGS:
        setting = base._replace(
            fraction_bits=bits, exponent=exponent, exponent_iterations=squarings or base.exponent_iterations
        )
        notify(f"{bits} fraction bits, {exponent} {squarings or ''}")
        try:
            check_range(exported, tokens, setting)
        except UserError as error:
            rows.append(Precision(setting, None, np.inf, np.inf, 0.0, str(error)))
            continue
        _, account, logits = whole(exported, tokens, setting)
        error = np.abs(logits - expected)
        agreement = float((logits.argmax(-1) == expected.argmax(-1)).mean())
        rows.append(Precision(setting, account, float(error.max()), float(error.mean()), agreement, ""))
    return rows, float(np.abs(expected).max())


def cheapest(rows: list[Precision], tolerance: float, largest_logit: float) -> Precision | None:
    """The row of fewest bytes whose likeliest tokens all agree and whose errors stay under a share of the logits."""
    good = [row for row in rows if row.agreement == 1 and row.largest_error <= tolerance * largest_logit]
    return min(good, key=lambda row: (max(row.account.bytes), row.largest_error)) if good else None


def print_precision(rows: list[Precision], largest_logit: float, tolerance: float, console: Console) -> None:
    """The table, then the flags of the cheapest good row."""
    table = Table("fraction bits", "exponential", "MB sent", "rounds", "largest error", "mean error", "top-1",
                  box=None, pad_edge=False)  # fmt: skip
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for row in rows:
        setting = row.setting
        name = f"taylor {setting.exponent_iterations}" if setting.exponent == "taylor" else setting.exponent
        cells = ("refused", "", "", "", "")
        if row.account:
            cells = (
                f"{max(row.account.bytes) / 1e6:,.2f}", f"{row.account.rounds:,}", f"{row.largest_error:.4f}",
                f"{row.mean_error:.4f}", f"{row.agreement:.1%}",
            )  # fmt: skip
        table.add_row(str(setting.fraction_bits), name, *cells)
    console.print(table)
    console.print(f"largest logit: {largest_logit:.3g}")
    for row in rows:
        if row.refused:
            console.print(f"refused: {row.refused}", markup=False)
    best = cheapest(rows, tolerance, largest_logit)
    if best is None:
        return console.print(f"none keeps all likeliest tokens and errors under {tolerance:.1%} of the largest logit")
    flags = f"--fraction_bits={best.setting.fraction_bits} --exponent={best.setting.exponent}"
    if best.setting.exponent == "taylor":
        flags += f" --exponent_iterations={best.setting.exponent_iterations}"
    console.print(f"cheapest with the same tokens and errors under {tolerance:.1%} of the largest logit: {flags}")


def to_json(rows: list[Precision]) -> list[dict[str, Any]]:
    return [
        row._asdict() | dict(setting=row.setting._asdict(), account=row.account and row.account._asdict())
        for row in rows
        if not row.refused
    ]
