"""What the pictures of a page are drawn from: every number of its runs, and what differs between them.

`browser/` reads it. Names and texts go in as JSON inside the block, and come out as text, never as HTML.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_entropy.census import GROUPS, KINDS
from jax_entropy.config import flatten
from jax_entropy.data import load_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.parts import row_maximum
from jax_entropy.paths import local_path, reading
from jax_entropy.report.block import Block
from jax_entropy.report.costs import compared_costs, measured_kind, model_of, private_cost, terms
from jax_entropy.report.drawing import DEPTH, HEAT_MAP
from jax_entropy.report.history import History, printable
from jax_entropy.report.verdict import newest_entropy
from jax_entropy.runs.workdir import to_json

_POSITIONS = 128  # of temperatures, evenly spread
_TEXT_NUMBERS = 300_000  # of the text, over all evaluations that are shown
_OWN = ("seed", "data.directory", "data.num_threads", "data.prefetch")  # differ without another experiment


def payload(histories: Sequence[History], sweep: dict[str, Any] | None = None) -> str:
    """All runs as one block of text, in the order of the page, and what `read_sweep` found of a sweep."""
    numbers = sum(array.size for history in histories for array in history.train.values())
    block = Block(numbers)
    tokenizers = sorted({history.tokenizer for history in histories})
    runs = [_run(history, block) | dict(tokenizer=tokenizers.index(history.tokenizer)) for history in histories]
    header = dict(
        runs=runs,
        colors=dict(heat=_hex(HEAT_MAP), depth=_hex(DEPTH)),
        differences=_differences(histories),
        groups=_groups(histories),
        sweep=sweep,
    )
    return block.text(to_json(header))


def read_sweep(folder: str | Path) -> dict[str, Any]:
    """The points of a sweep that have both a perplexity and predicted private costs.

    Raises:
      UserError: the folder holds no table of a sweep.
    """
    file = local_path(folder, "sweep") / "table.json"
    try:
        with reading(file, "sweep"):
            rows = json.loads(file.read_text("utf-8"))["rows"]
        protocols = [protocol for row in rows for protocol in row["private"]]
        points = [
            dict(
                label=printable(row["label"]), perplexity=float(row["perplexity"]), spread=row["spread"],
                **{name: float(row["private"][protocols[0]][name]) for name in ("bytes", "rounds", "seconds")},
            )
            for row in rows
            if row["perplexity"] is not None and protocols[:1] and protocols[0] in row["private"]
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"sweep={str(file)!r} is damaged: it is not the table of a sweep") from None
    return dict(
        name=printable(file.parent.resolve().name), protocol=printable(str((protocols or [""])[0])), points=points
    )


def _run(history: History, block: Block) -> dict[str, Any]:
    penalty = history.config.get("penalty") or {}
    L, N = history.train["head_entropy"].shape[1:]
    return dict(
        name=history.name,
        architecture=history.architecture,
        layers=L,
        heads=N,
        maxima=history.maxima(),
        most=history.layer_maxima("context"),
        tolerance=penalty.get("tolerance") if history.train.get("threshold", np.zeros(0)).ndim == 3 else None,
        train={name: block.put(array, exact=name == "step") for name, array in history.train.items()},
        evaluate={name: block.put(array, exact=name == "step") for name, array in history.evaluate.items()},
        incidents=[
            dict(step=incident["step"], what=printable(str(incident.get("what", "")))) for incident in history.incidents
        ],
        text=_text(history, block),
        private=_private(history),
    )


def _text(history: History, block: Block) -> dict[str, Any] | None:
    """Readings of the same tokens, as many of them as the page has room for, the last among them."""
    readings = [reading for reading in history.text if reading.entropy.shape == history.text[-1].entropy.shape]
    if not readings:
        return None
    last = readings[-1]
    room = max(1, _TEXT_NUMBERS // last.entropy.size)
    chosen = sorted({round(i) for i in np.linspace(len(readings) - 1, 0, min(room, len(readings)))})
    readings = [readings[i] for i in chosen]
    pieces = history.pieces or [*map(load_tokenizer(history.workdir.tokenizer).pieces, last.tokens)]
    found = dict(
        step=[reading.step for reading in readings],
        pieces=[[printable(text, "\n\t") for text in texts] for texts in pieces],
        most=[dict(layers=layers, values=block.put(most_T)) for layers, most_T in _most(history, last.entropy.shape)],
        loss=block.put(np.stack([reading.loss for reading in readings])),
        entropy=block.put(np.stack([reading.entropy for reading in readings])),
    )
    if last.temperature is not None:
        T = last.temperature.shape[-1]
        positions = np.unique(np.linspace(0, T - 1, min(T, _POSITIONS)).astype(int))
        temperatures = np.stack([reading.temperature[..., positions] for reading in readings])
        found |= dict(positions=positions, temperature=block.put(temperatures))
    return found


def _most(history: History, shape: tuple[int, ...]) -> list[tuple[list[int], np.ndarray]]:
    """The most entropy that the row at each position can have, [T] in nats, and the layers in which it is that."""
    L, T, model = shape[0], shape[-1], model_of(history)
    windows, num_slots = (model.windows, model.num_slots) if model else (history.windows or (T,) * L, 0)
    layers: dict[int, list[int]] = {}
    for layer, window in enumerate(windows):
        layers.setdefault(min(window, T), []).append(layer)
    return [(of, np.asarray(row_maximum(T, 0, window, num_slots))) for window, of in layers.items()]


def _private(history: History) -> dict[str, Any] | None:
    cost = private_cost(history)
    if not cost or "costs" not in cost:
        return None
    group = {kind.name: kind.group for kind in KINDS}
    return dict(
        costs=[
            dict(
                kind=printable(str(kind)),
                group=GROUPS.index(group[measured]) if (measured := measured_kind(str(kind))) in group else len(GROUPS),
                **of_kind,
            )
            for kind, of_kind in cost["costs"].items()
        ],
        network=printable(str(cost.get("network", ""))),
        terms=printable(terms(cost)),
    )


def _differences(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Fields of the configurations that are not the same in all runs, and how the runs ended."""
    if len(histories) < 2:
        return []
    flat = [flatten(history.config) for history in histories]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [
        dict(name=printable(name), values=[_cell(one.get(name)) for one in flat])
        for name in names
        if name != "data.directory" and len({json.dumps(one.get(name), default=str) for one in flat}) > 1
    ]
    costs = compared_costs(histories)
    on = next((printable(terms(cost)) for cost in costs if cost), "")
    warm = [cost and cost["total"]["warm"] for cost in costs]
    for name, values in (
        ("validation loss [nats/token]", [_last(history.evaluate, "validation_loss") for history in histories]),
        ("bits per byte", [_last(history.evaluate, "bits_per_byte") for history in histories]),
        ("training cross-entropy [nats/token]", [_last(history.train, "cross_entropy") for history in histories]),
        ("mean head entropy [nats]", [float(newest_entropy(history)[0].mean()) for history in histories]),
        ("steps", [int(history.steps_E[-1]) for history in histories]),
        (f"private forward pass [MB], {on}", [total and max(total["bytes"]) / 1e6 for total in warm]),
        (f"private forward pass [rounds], {on}", [total and total["rounds"] for total in warm]),
    ):
        if any(value is not None for value in values):
            rows.append(dict(name=name, values=[_cell(value) for value in values], measured=True))
    return rows


def _last(metrics: dict[str, np.ndarray], name: str) -> float | None:
    return float(metrics[name][-1]) if name in metrics else None


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else printable(str(value))


def _groups(histories: Sequence[History]) -> list[list[int]]:
    """Runs that differ in nothing but their seed and where they read from."""
    found: dict[str, list[int]] = {}
    for i, history in enumerate(histories):
        fields = {name: value for name, value in flatten(history.config).items() if name not in _OWN}
        found.setdefault(json.dumps(fields, sort_keys=True, default=str), []).append(i)
    return list(found.values())


def _hex(colors: Any) -> str:
    return "".join("{:02x}{:02x}{:02x}".format(*colors(i, bytes=True)[:3]) for i in range(256))
