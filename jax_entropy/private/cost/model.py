"""Bytes and rounds of a forward pass predicted from its sizes, by coefficients fitted to measured small ones.

Each kind of operation has a few counts that its cost is proportional to; coefficients are data, in costs.json.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError
from jax_entropy.private.cost.account import add, times
from jax_entropy.private.cost.memory import layout, read_memory
from jax_entropy.private.cost.profile import measure, random_variables
from jax_entropy.private.cost.work import Work, ciphertexts, exponentials, linear, work
from jax_entropy.private.engine.engine import Account, Setting
from jax_entropy.private.program.blueprint import PLAIN, Rewrites

FILE = Path(__file__).with_name("costs.json")


def key_of(kind: str, config: ModelConfig, plain: bool, embedding: str) -> str:
    """Costs that differ in more than counts: what a kind does depends on the architecture."""
    if kind == "vocabulary" and embedding == "public" and config.tied_head:
        return "vocabulary public"
    variant, plain = "", plain and kind != "temperature"  # which is the same product in both
    if kind == "residual":
        variant = f" {config.scaled}"
    if kind == "scores" and plain:
        variant = f" {config.learnable_temperature}"
    differs = ("scores", "mix", "softmax", "power softmax") if plain else ("temperature",)
    if kind in differs and config.num_heads == 1:  # the engine's compiler drops the axis
        variant += " one head"
    return f"{kind}{variant} {'plain' if plain else 'optimised'}"


def byte_counts(parts: list[Work], protocol: str, plain: bool) -> list[tuple[list[float], list[float]]]:
    """What each party's bytes are proportional to: with coefficients of its own, and with those that both have.

    A single pair where the parties do the same or take turns.
    """
    if protocol != "cheetah":
        return [(_sums(linear(of, plain) for of in parts), [])]
    each = [[ciphertexts(of, party) for of in parts] for party in (0, 1)]
    return [tuple(map(_sums, zip(*counts, strict=True))) for counts in each]


def _sums(counts: Iterable[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*counts, strict=True)]


def round_counts(parts: list[Work]) -> list[float]:
    return _sums([of.parts * waits for waits in of.waits] for of in parts)


def read_costs(setting: Setting) -> dict[str, Any]:
    """The coefficients that came with the package.

    Raises:
      UserError: a setting that was not measured.
    """
    all_costs = json.loads(FILE.read_text())
    if (name := name_of(setting)) not in all_costs:
        raise UserError(
            f"no coefficients for {name}; measured were {', '.join(all_costs)}, and `jax-entropy private profile` "
            "measures any model"
        )
    return all_costs[name]


def is_known(setting: Setting) -> bool:
    """Whether coefficients of a setting came with the package."""
    return name_of(setting) in json.loads(FILE.read_text())


def name_of(setting: Setting) -> str:
    """What coefficients are called; those of exponent=quadratic serve any number of squarings."""
    if setting.exponent == "quadratic":
        setting = setting._replace(exponent_iterations=0, layer_iterations=())
    weights = " shared weights" if setting.protocol == "cheetah" and not setting.colocated else ""
    weights += " exact" if setting.protocol == "cheetah" and not setting.low_bit_error else ""
    return f"{setting.protocol} {setting.fraction_bits} bits {setting.exponent} {setting.squarings}{weights}"


def predict(
    config: ModelConfig, num_tokens: int, setting: Setting, plain: bool = False, logits: str = "every",
    embedding: str = "shared", costs: dict[str, Any] | None = None,
) -> dict[str, Account]:  # fmt: skip
    """Bytes of each party (the mean of ABY3's, which take turns) and rounds of a warm forward pass, by kind.

    Args:
      logits: of "every" position, or of the "last" one.
      embedding: "shared", or "public": the table is given away, and with it a tied head.

    Seconds are not predicted (0).

    Raises:
      UserError: a kind of operation, or a setting, that was not measured.
    """
    costs, predicted = read_costs(setting) if costs is None else costs, {}
    for kind, of in work(config, num_tokens, plain, setting.protocol, logits, embedding).items():
        if (key := key_of(kind, config, plain, embedding)) not in costs:
            raise UserError(f"{kind} of {config} was not measured for the cost model under {setting.protocol}")
        predicted[kind] = _cost(of, costs[key], setting, plain)
    if "softmax" in predicted and setting.exponent == "quadratic":
        parts = [predicted["softmax"]]
        for kind, squared in _squarings(config, num_tokens, setting, plain, logits).items():
            parts += [times(_cost([of], costs[kind], setting, False), count) for of, count in squared if count]
        predicted["softmax"] = add(parts)
    return predicted


def _cost(of: list[Work], coefficients: dict[str, Any], setting: Setting, plain: bool) -> Account:
    """What some work costs by the coefficients of its kind."""
    counts = byte_counts(of, setting.protocol, plain)
    sent = [
        round(float(np.dot(solved, own + both)))
        for solved, (own, both) in zip(coefficients["bytes"], counts, strict=True)
    ]
    rounds = sum(part.parts * round(float(np.dot(coefficients["rounds"], part.waits))) for part in of)
    return Account(
        0.0, tuple(sent if len(sent) > 1 else sent * setting.num_parties), (0,) * setting.num_parties, rounds
    )


def _squarings(
    config: ModelConfig, num_tokens: int, setting: Setting, plain: bool, logits: str
) -> dict[str, list[tuple[Work, int]]]:
    """Squarings in every layer's exponentials beyond those that were measured: the engine's, and a program's own."""
    by_layer, measured = setting.bent_squarings(config.num_layers), Setting().squarings
    found: dict[str, list[tuple[Work, int]]] = {"squaring": [], "squaring in a program": []}
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for layer, (window, squarings) in enumerate(zip(config.windows, by_layer, strict=True)):
        alone = logits == "last" and not plain and layer == config.num_layers - 1
        alike.setdefault((window, squarings, alone), []).append(layer)
    for (_, squarings, alone), layers in alike.items():
        count = exponentials(config, layers[0], num_tokens, plain, alone)
        beyond = len(layers) * (setting.squarings - measured)
        found["squaring"].append((Work(1, elements=(count,), squared=(count,)), beyond))
        own = Work(1, elements=(count,), multiplied=(count,))
        found["squaring in a program"].append((own, len(layers) * (squarings - setting.squarings)))
    return found


def predict_total(
    config: ModelConfig, num_tokens: int, setting: Setting, plain: bool = False, logits: str = "every",
    embedding: str = "shared",
) -> Account:  # fmt: skip
    """The sum over kinds."""
    return add(predict(config, num_tokens, setting, plain, logits, embedding).values())


def count_by_layers(
    config: ModelConfig, setting: Setting, plain: bool, notify: Callable[[str], None], embedding: str = "shared"
) -> Account:
    """A warm forward pass whose blocks are measured, two of each kind at full size, and counted as often as they occur.

    For settings that the cost model does not know.

    Raises:
      UserError: the two blocks do not fit into memory.
    """
    of_each = [config.num_layers - config.ffn_free_layers, config.ffn_free_layers]
    few = [min(2, count) for count in of_each]
    small = dataclasses.replace(config, num_layers=sum(few), ffn_free_layers=few[1])
    rewrites = PLAIN if plain else Rewrites()
    T, limit = config.context_length, read_memory("")
    of = layout(small, T, setting, plain, limit=limit, embedding=embedding, streamable=True)
    measured = measure(small, random_variables(small), rewrites, T, setting, notify, embedding=embedding, layout=of)
    sums = [add(e.warm for e in measured.entries if e.layer is None)]
    for count, layers in ((of_each[0], range(few[0])), (of_each[1], range(few[0], sum(few)))):
        if layers:
            blocks = add(entry.warm for entry in measured.entries if entry.layer in layers)
            sums.append(times(blocks, count / len(layers)))
    return add(sums)
