"""What fraction bits and the form of the exponential cost, and what they leave of the logits; squarings by layer."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jax_entropy import data
from jax_entropy.errors import UserError
from jax_entropy.evaluate import held_out
from jax_entropy.private.cost.account import run_whole
from jax_entropy.private.engine.engine import Account, Engine, Setting
from jax_entropy.private.program.export import Export
from jax_entropy.private.program.fixed_point import check_range, lowest_exponent, lowest_exponents
from jax_entropy.private.program.forward import float32_logits
from jax_entropy.runs.load import Run

# (fraction bits, exponential, its squarings), from the cheapest on.
SETTINGS = (
    (18, "quadratic", 5), (16, "quadratic", 6), (18, "quadratic", 6), (20, "quadratic", 6), (22, "quadratic", 7),
    (18, "taylor", 8), (18, "taylor", 10), (22, "taylor", 10), (18, "pade", 0), (22, "pade", 0),
)  # fmt: skip


class Precision(NamedTuple):
    """A setting, what a warm forward pass took, and its logits beside those of float32; or why it was refused."""

    setting: Setting
    account: Account | None
    largest_error: float
    mean_error: float
    agreement: float  # share of positions with the same likeliest token
    refused: str


def held_out_tokens(run: Run, num_tokens: int, notify: Callable[[str], None]) -> list[int]:
    """The first tokens of the validation text of a run's corpus."""
    tokens_1xT1, _ = next(iter(data.validation_batches(held_out(run, notify), batch_size=1)))
    return np.asarray(tokens_1xT1)[0, :num_tokens].tolist()


def measure_precision(
    engine: Engine, exported: Export, tokens: Sequence[int], notify: Callable[[str], None]
) -> tuple[list[Precision], float]:
    """A row for each of SETTINGS, under the engine's protocol, and the largest magnitude of a logit."""
    expected, rows, base = float32_logits(exported, tokens), [], engine.setting
    for bits, exponent, squarings in SETTINGS:
        notify(f"{bits} fraction bits, {exponent} {squarings or ''}")
        setting = base._replace(fraction_bits=bits, exponent=exponent, exponent_iterations=squarings)
        rows.append(_measure(engine, exported, tokens, expected, setting))
    return rows, float(np.abs(expected).max())


def _measure(
    engine: Engine, exported: Export, tokens: Sequence[int], expected: np.ndarray, setting: Setting
) -> Precision:
    try:
        check_range(exported.under(setting), tokens, setting)
    except UserError as error:
        return Precision(setting, None, np.inf, np.inf, 0.0, str(error))
    _, account, logits = run_whole(engine.reset(setting), exported.under(setting), tokens)
    error = np.abs(logits - expected)
    agreement = float((logits.argmax(-1) == expected.argmax(-1)).mean())
    return Precision(setting, account, float(error.max()), float(error.mean()), agreement, "")


def measure_by_layer(
    engine: Engine, exported: Export, tokens: Sequence[int], tolerance: float, notify: Callable[[str], None]
) -> tuple[list[Precision], float]:
    """As `measure_precision`, but layer by layer as few squarings of the quadratic exponential as are good enough.

    A layer's range is twice what the tokens need. Fraction bits are not chosen: an engine has one number of them, and
    no byte depends on it.

    Args:
      tolerance: of the largest logit, the largest error allowed, as `cheapest`.
    Raises:
      UserError: the model takes no exponential.
    """
    config = exported.blueprint.config
    if config.power:
        raise UserError(f"{config} takes no exponential, whose squarings could be chosen by layer")
    expected, rows, base = float32_logits(exported, tokens), {}, engine.setting
    largest = float(np.abs(expected).max())
    limits = {squarings: lowest_exponent("quadratic", squarings) for squarings in range(4, 13)}
    lowest = lowest_exponents(exported, tokens)
    fewest = tuple(next((n for n, limit in limits.items() if limit <= 2 * low), 12) for low in lowest)

    def is_good(iterations: tuple[int, ...]) -> bool:
        if iterations not in rows:
            notify(f"squarings by layer: {','.join(map(str, iterations))}")
            alike = dict(exponent_iterations=iterations[0]) if len({*iterations}) == 1 else {}
            setting = base._replace(**alike or dict(layer_iterations=iterations))
            rows[iterations] = _measure(engine, exported, tokens, expected, setting)
        return cheapest([rows[iterations]], tolerance, largest) is not None

    chosen = tuple(max(Setting().squarings, few) for few in fewest)
    if is_good(chosen) and not is_good(fewest):
        for layer, few in enumerate(fewest):
            while chosen[layer] > few:
                fewer = (*chosen[:layer], chosen[layer] - 1, *chosen[layer + 1 :])
                if not is_good(fewer):
                    break
                chosen = fewer
    elif fewest in rows:
        chosen = fewest
    # The engine's own squarings, as many as the fewest, may be cheaper than a program's.
    for least in range(min(chosen) + 1, max(chosen) + 1):
        is_good(tuple(max(squarings, least) for squarings in chosen))
    return list(rows.values()), largest


def cheapest(rows: list[Precision], tolerance: float, largest_logit: float) -> Precision | None:
    """The row of fewest bytes whose likeliest tokens all agree and whose errors stay under a share of the logits.

    A quarter of the tolerance is left to other runs, whose truncations round otherwise, and to other texts.
    """
    good = [row for row in rows if row.agreement == 1 and row.largest_error <= 0.75 * tolerance * largest_logit]
    return min(good, key=lambda row: (max(row.account.bytes), row.largest_error)) if good else None
