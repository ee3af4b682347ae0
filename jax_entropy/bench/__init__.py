"""Measurements that a person starts: attention implementations, whole steps beside PyTorch's, and feeding.

Each warms up, waits for its results, takes turns between contenders and reports medians and ratios of one run.
"""

from typing import Any

from rich.console import Console
from rich.table import Table


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """Rows with the same keys as a table."""
    table = Table()
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_spell(value) for value in row.values()))
    console.print(table)


def _spell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
