"""A run's numbers for other programs: everything that was logged, with all digits that were."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_entropy.paths import writing
from jax_entropy.report.costs import private_cost
from jax_entropy.report.history import History
from jax_entropy.report.verdict import verdict

COLUMNS = ("run", "kind", "step", "metric", "layer", "head", "value")


def numbers(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Each run's configuration, verdict, incidents, private cost, and metrics as arrays over its steps."""
    return [
        dict(
            name=history.name,
            workdir=history.workdir.path,
            config=history.config,
            verdict=verdict(history),
            incidents=history.incidents,
            private=private_cost(history),
            train=history.train,
            evaluate=history.evaluate,
        )
        for history in histories
    ]


def write_csv(path: Path, histories: Sequence[History]) -> None:
    """Writes one line a number; `layer` and `head` are empty where a number is of none.

    Raises:
      UserError: the file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for history in histories:
                writer.writerows(_lines(history))


def _lines(history: History) -> Iterator[tuple[Any, ...]]:
    for kind, metrics in (("train", history.train), ("evaluate", history.evaluate)):
        for name, array in metrics.items():
            if name == "step":
                continue
            for e, step in enumerate(metrics["step"].astype(int)):
                for index, value in np.ndenumerate(array[e]):
                    number = f"{value:.7g}" if np.isfinite(value) else ""
                    if name.startswith("bands_"):  # shares of quarters
                        yield history.name, kind, step, f"{name}/{'/'.join(map(str, index))}", "", "", number
                    else:
                        yield history.name, kind, step, name, *itertools.islice((*index, "", ""), 2), number
