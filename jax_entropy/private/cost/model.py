"""Bytes and rounds of a forward pass predicted from its sizes, by coefficients fitted to measured small ones.

Each kind of operation has a few counts that its cost is proportional to; coefficients are data, in costs.json.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.errors import UserError
from jax_entropy.private.cost.account import add, times
from jax_entropy.private.cost.memory import check_size, read_memory
from jax_entropy.private.cost.profile import Profile, measure, random_variables
from jax_entropy.private.cost.work import Work, ciphertexts, linear, work
from jax_entropy.private.engine.engine import Account, Setting
from jax_entropy.private.program.blueprint import PLAIN, Rewrites

_FILE = Path(__file__).with_name("costs.json")
# What is measured for the coefficients, every architecture at every size, plain and optimised.
ARCHITECTURES = (
    ("SM+LN+G", {}), ("SM+LN+G", dict(activation="gelu_tanh")), ("SM+R", {}), ("EReg(SM(t)+ScFuFFN)", {}),
    ("SM+RN+LR(0.01)", dict(final_norm="rms")), ("SM+Conv4+RoPE", {}), ("PSM(2)+FN+BiFFN+QKN", {}), ("PSM(8)+DyT", {}),
    ("SM+Cap(30)", {}),
)  # fmt: skip
SIZES = tuple(
    dict(num_layers=L, num_heads=N, model_dim=D, context_length=T, vocab_size=V)
    for L, N, D, T, V in (
        (1, 2, 32, 16, 64),
        (1, 4, 32, 32, 96),
        (2, 2, 64, 32, 64),
        (1, 3, 48, 64, 128),
        (1, 4, 128, 64, 160),
        (1, 6, 96, 96, 300),
        (1, 4, 256, 96, 128),
        (1, 1, 32, 16, 64),
        (1, 1, 48, 32, 96),
        (2, 1, 64, 64, 80),
        (1, 1, 256, 96, 64),
    )
)


def _key(kind: str, config: ModelConfig, plain: bool) -> str:
    """Costs that differ in more than counts: what a kind does depends on the architecture."""
    variant, plain = "", plain and kind != "temperature"  # which is the same product in both
    if kind == "residual":
        variant = f" {config.scaled}"
    if kind == "scores" and plain:
        variant = f" {config.learnable_temperature}"
    differs = ("scores", "mix", "softmax", "power softmax") if plain else ("temperature",)
    if kind in differs and config.num_heads == 1:  # the engine's compiler drops the axis
        variant += " one head"
    return f"{kind}{variant} {'plain' if plain else 'optimised'}"


def _byte_counts(parts: list[Work], protocol: str, plain: bool) -> list[tuple[list[float], list[float]]]:
    """What each party's bytes are proportional to: with coefficients of its own, and with those that both have.

    A single pair where the parties do the same or take turns.
    """
    if protocol != "cheetah":
        return [(_sums(linear(of, plain) for of in parts), [])]
    each = [[ciphertexts(of, party) for of in parts] for party in (0, 1)]
    return [tuple(map(_sums, zip(*counts, strict=True))) for counts in each]


def _sums(counts: Iterable[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*counts, strict=True)]


def _round_counts(parts: list[Work]) -> list[float]:
    return _sums([of.parts * waits for waits in of.waits] for of in parts)


def fit(measured: Iterable[tuple[ModelConfig, Profile]]) -> dict[str, Any]:
    """Coefficients by kind from warm profiles of one setting, by least squares without negative ones."""
    rows: dict[str, list[tuple[list[Work], Profile, Account]]] = {}
    for config, profile in measured:
        plain = profile.export == str(PLAIN)
        consists = work(config, profile.num_tokens, plain, profile.setting.protocol, profile.logits)
        for kind, account in profile.by_kind().items():
            rows.setdefault(_key(kind, config, plain), []).append((consists[kind], profile, account))
    coefficients = {}
    for key, found in rows.items():
        counts, costs = [], []
        for of, profile, account in found:
            parties = _byte_counts(of, profile.setting.protocol, profile.export == str(PLAIN))
            costs += account.bytes if len(parties) > 1 else [np.mean(account.bytes)]
            for party, (own, both) in enumerate(parties):
                before, after = ([0] * len(own) * count for count in (party, len(parties) - party - 1))
                counts.append([*before, *own, *after, *both])
        width = len(own)
        solved = _solve_whole(counts, costs, first=len(parties) * width)
        coefficients[key] = dict(
            bytes=[solved[i * width : (i + 1) * width] + solved[len(parties) * width :] for i in range(len(parties))],
            rounds=_solve([_round_counts(of) for of, *_ in found], [account.rounds for *_, account in found]),
        )
    return coefficients


def _solve_whole(counts: list[list[float]], costs: Any, first: int) -> list[float]:
    """As `_solve`; from the `first` on, coefficients that come close to whole numbers are these.

    They are how often a kind fills ciphertexts. What a measurement has beside it is the store of random numbers, which
    one run fills for the next.
    """
    counts, costs = np.asarray(counts, np.float64), np.asarray(costs, np.float64)
    solution = np.asarray(_solve(counts, costs))
    whole = (np.arange(len(solution)) >= first) & (np.abs(solution - solution.round()) < 0.2)
    solution[whole] = solution[whole].round()
    solution[~whole] = _solve(counts[:, ~whole], costs - counts[:, whole] @ solution[whole])
    return solution.tolist()


def _solve(counts: list[list[float]], costs: Any) -> list[float]:
    """Coefficients of the least squares; what CHEETAH's stores add or save does not grow with the sizes."""
    counts = np.asarray(counts, np.float64)
    unit = np.maximum(counts.max(0), 1)
    solution, _ = scipy.optimize.nnls(counts / unit, np.asarray(costs, np.float64))
    return (solution / unit).tolist()


def is_known(setting: Setting) -> bool:
    """Whether coefficients of a setting came with the package."""
    return _name(setting) in json.loads(_FILE.read_text())


def read_costs(setting: Setting) -> dict[str, Any]:
    """The coefficients that came with the package.

    Raises:
      UserError: a setting that was not measured.
    """
    all_costs = json.loads(_FILE.read_text())
    if (name := _name(setting)) not in all_costs:
        raise UserError(
            f"no coefficients for {name}; measured were {', '.join(all_costs)}, and `jax-entropy private profile` "
            "measures any model"
        )
    return all_costs[name]


def check_writable() -> None:
    """Checks that coefficients can be written into the package.

    Raises:
      UserError: they cannot.
    """
    if not os.access(_FILE, os.W_OK):
        raise UserError(f"the coefficients in {_FILE} cannot be written; calibrate from a checkout of the source")


def write_costs(setting: Setting, coefficients: dict[str, Any]) -> None:
    """Puts a setting's coefficients beside those of others."""
    all_costs = json.loads(_FILE.read_text())
    _FILE.write_text(json.dumps(all_costs | {_name(setting): coefficients}, indent=1, sort_keys=True) + "\n")


def _name(setting: Setting) -> str:
    weights = " shared weights" if setting.protocol == "cheetah" and not setting.colocated else ""
    weights += " exact" if setting.protocol == "cheetah" and not setting.low_bit_error else ""
    return f"{setting.protocol} {setting.fraction_bits} bits {setting.exponent} {setting.squarings}{weights}"


def predict(
    config: ModelConfig, num_tokens: int, setting: Setting, plain: bool = False, logits: str = "every",
    costs: dict[str, Any] | None = None,
) -> dict[str, Account]:  # fmt: skip
    """Bytes of each party (the mean of ABY3's, which take turns) and rounds of a warm forward pass, by kind.

    Args:
      logits: of "every" position, or of the "last" one.

    Seconds are not predicted (0).

    Raises:
      UserError: a kind of operation, or a setting, that was not measured.
    """
    costs, predicted = read_costs(setting) if costs is None else costs, {}
    for kind, of in work(config, num_tokens, plain, setting.protocol, logits).items():
        if (key := _key(kind, config, plain)) not in costs:
            raise UserError(f"{kind} of {config} was not measured for the cost model under {setting.protocol}")
        counts = _byte_counts(of, setting.protocol, plain)
        sent = [
            round(float(np.dot(solved, own + both)))
            for solved, (own, both) in zip(costs[key]["bytes"], counts, strict=True)
        ]
        rounds = sum(part.parts * round(float(np.dot(costs[key]["rounds"], part.waits))) for part in of)
        each = tuple(sent if len(sent) > 1 else sent * setting.num_parties)
        predicted[kind] = Account(0.0, each, (0,) * setting.num_parties, rounds)
    return predicted


def predict_total(
    config: ModelConfig, num_tokens: int, setting: Setting, plain: bool = False, logits: str = "every"
) -> Account:
    """The sum over kinds."""
    return add(predict(config, num_tokens, setting, plain, logits).values())


def count_by_layers(config: ModelConfig, setting: Setting, plain: bool, notify: Callable[[str], None]) -> Account:
    """A warm forward pass whose blocks are measured, two of each kind at full size, and counted as often as they occur.

    For settings that the cost model does not know.

    Raises:
      UserError: the two blocks do not fit into memory.
    """
    of_each = [config.num_layers - config.ffn_free_layers, config.ffn_free_layers]
    few = [min(2, count) for count in of_each]
    small = dataclasses.replace(config, num_layers=sum(few), ffn_free_layers=few[1])
    rewrites = PLAIN if plain else Rewrites()
    check_size(small, config.context_length, setting, plain, limit=read_memory(""))
    measured = measure(small, random_variables(small), rewrites, config.context_length, setting, notify)
    sums = [add(e.warm for e in measured.entries if e.layer is None)]
    for count, layers in ((of_each[0], range(few[0])), (of_each[1], range(few[0], sum(few)))):
        if layers:
            blocks = add(entry.warm for entry in measured.entries if entry.layer in layers)
            sums.append(times(blocks, count / len(layers)))
    return add(sums)


def calibrate(setting: Setting, notify: Callable[[str], None]) -> None:
    """Measures what the cost model is fitted to and writes the coefficients of this setting into the package."""
    check_writable()
    measured = []
    for name, fields in ARCHITECTURES:
        for size in SIZES:
            config = architecture(name, **size, **fields)
            variables, T = random_variables(config), config.context_length
            for rewrites in (PLAIN, Rewrites()):
                measured.append((config, measure(config, variables, rewrites, T, setting, lambda line: None)))
            notify(f"{len(measured)} of {2 * len(ARCHITECTURES) * len(SIZES)} measured")
    write_costs(setting, fit(measured))
