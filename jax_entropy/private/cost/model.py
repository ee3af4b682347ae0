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
    """A warm forward pass of which a block of each kind is measured, at full size, and counted as often as it occurs.

    For settings that the cost model does not know.

    Raises:
      UserError: these blocks do not fit into memory.
    """
    kinds = _kinds_of_blocks(config, setting)
    layers = _one_of_each(config, kinds)
    letters = "".join("L" if config.windows[layer] == config.context_length else "S" for layer in layers)
    small = dataclasses.replace(
        config, num_layers=len(layers), window_pattern=letters if "S" in letters else "",
        window=config.window if "S" in letters else 0,
        ffn_free_layers=sum(layer >= config.num_layers - config.ffn_free_layers for layer in layers),
    )  # fmt: skip
    if setting.layer_iterations:
        setting = setting._replace(layer_iterations=tuple(setting.layer_iterations[layer] for layer in layers))
    T, rewrites = config.context_length, PLAIN if plain else Rewrites()
    of = layout(small, T, setting, plain, limit=read_memory(""), embedding=embedding, streamable=True)
    measured = measure(small, random_variables(small), rewrites, T, setting, notify, embedding=embedding, layout=of)
    sums = [add(entry.warm for entry in measured.entries if entry.layer is None)]
    for kind in {*kinds}:
        alike = [i for i, layer in enumerate(layers) if kinds[layer] == kind]
        blocks = add(entry.warm for entry in measured.entries if entry.layer in alike)
        sums.append(times(blocks, kinds.count(kind) / len(alike)))
    return add(sums)


def _kinds_of_blocks(config: ModelConfig, setting: Setting) -> list[tuple]:
    """What the cost of each layer's block depends on beside the sizes of the model.

    Raises:
      UserError: the setting is of another number of layers.
    """
    L = config.num_layers
    return [
        (layer == 0, layer == L - 1, layer < L - config.ffn_free_layers, *of)
        for layer, *of in zip(
            range(L), config.windows, config.embedded_values, setting.bent_squarings(L) or (0,) * L, strict=True
        )
    ]


def _one_of_each(config: ModelConfig, kinds: list[tuple]) -> list[int]:
    """Layers, one of each kind among them, that are a model; every other one has embedded values where that is so."""
    alternate = config.value_embedding and config.value_embedding_layers == "alternate"
    chosen: list[int] = []  # from the last on
    for layer in sorted({kind: layer for layer, kind in enumerate(kinds)}.values(), reverse=True):
        if alternate and chosen and config.embedded_values[layer] == config.embedded_values[chosen[-1]]:
            chosen.append(layer + 1)
        chosen.append(layer)
    return chosen[::-1]
