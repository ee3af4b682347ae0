"""Coefficients of the cost model from small profiles: what is measured for them, and how they are fitted."""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.errors import UserError
from jax_entropy.private.cost.model import FILE, byte_counts, key_of, name_of, round_counts
from jax_entropy.private.cost.profile import Profile, measure, random_variables
from jax_entropy.private.cost.work import SLOTS, Work, work
from jax_entropy.private.engine.engine import Account, Engine, Setting
from jax_entropy.private.program.blueprint import PLAIN, Rewrites
from jax_entropy.private.program.stage import lower

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


def fit(measured: Iterable[tuple[ModelConfig, Profile]]) -> dict[str, Any]:
    """Coefficients by kind from warm profiles of one setting, by least squares without negative ones."""
    rows: dict[str, list[tuple[list[Work], Profile, Account]]] = {}
    for config, profile in measured:
        plain = profile.export == str(PLAIN)
        consists = work(config, profile.num_tokens, plain, profile.setting.protocol, profile.logits, profile.embedding)
        for kind in consists:
            key = key_of(kind, config, plain, profile.embedding)
            rows.setdefault(key, []).append((consists[kind], profile, profile.by_kind()[kind]))
    coefficients = {}
    for key, found in rows.items():
        counts, costs = [], []
        for of, profile, account in found:
            parties = byte_counts(of, profile.setting.protocol, profile.export == str(PLAIN))
            costs += account.bytes if len(parties) > 1 else [np.mean(account.bytes)]
            for party, (own, both) in enumerate(parties):
                before, after = ([0] * len(own) * count for count in (party, len(parties) - party - 1))
                counts.append([*before, *own, *after, *both])
        width = len(own)
        solved = _solve_whole(counts, costs, first=len(parties) * width)
        coefficients[key] = dict(
            bytes=[solved[i * width : (i + 1) * width] + solved[len(parties) * width :] for i in range(len(parties))],
            rounds=_solve([round_counts(of) for of, *_ in found], [account.rounds for *_, account in found]),
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


def check_writable() -> None:
    """Checks that coefficients can be written into the package.

    Raises:
      UserError: they cannot.
    """
    if not os.access(FILE, os.W_OK):
        raise UserError(f"the coefficients in {FILE} cannot be written; calibrate from a checkout of the source")


def write_costs(setting: Setting, coefficients: dict[str, Any]) -> None:
    """Puts a setting's coefficients beside those of others."""
    all_costs = json.loads(FILE.read_text())
    FILE.write_text(json.dumps(all_costs | {name_of(setting): coefficients}, indent=1, sort_keys=True) + "\n")


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
    write_costs(setting, fit(measured) | calibrate_alone(setting))


def calibrate_alone(setting: Setting) -> dict[str, Any]:
    """The coefficients of what is a single operation: a tied head that is public, and squarings.

    These are within the engine's exponential, what one more of them takes, or a program's own.
    """
    size, found = 4 * SLOTS, {}
    x, table = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((size // 256, 64), (64, 256)))
    values = jax.ShapeDtypeStruct((size,), np.float32)

    def run(function: Callable, types: list[jax.ShapeDtypeStruct], squarings: int = 6) -> tuple[np.ndarray, int]:
        with Engine(setting._replace(exponent_iterations=squarings, layer_iterations=())) as engine:
            names = ["x", "table"][: len(types)]
            engine.load("alone", lower(function, types), ["secret", "public"][: len(types)], {})
            for name, of in zip(names, types, strict=True):
                engine.put([name], 0, {name: np.full(of.shape, -0.5, np.float32)}, public=name == "table")
            runs = [engine.run("alone", names, ["y"]) for _ in range(9)][1:]
        return np.mean([run.bytes for run in runs], axis=0), min(run.rounds for run in runs)

    fewer, more = run(jnp.exp, [values], 6), run(jnp.exp, [values], 7)
    cases = {
        "vocabulary public": (Work(1, elements=(size,)), run(jnp.matmul, [x, table])),
        "squaring": (Work(1, elements=(size,), squared=(size,)), (more[0] - fewer[0], more[1] - fewer[1])),
        "squaring in a program": (Work(1, elements=(size,), multiplied=(size,)), run(jnp.square, [values])),
    }
    for kind, (of, (each, rounds)) in cases.items():
        counts = byte_counts([of], setting.protocol, False)
        sent = each if len(counts) > 1 else [np.mean(each)]
        # ciphertexts are counted as they are; what else is sent, by the number
        found[kind] = dict(
            bytes=[
                [max((total - sum(both)) / size, 0.0), *[1.0] * len(both)]
                for total, (_, both) in zip(map(float, sent), counts, strict=True)
            ],
            rounds=[int(rounds)],
        )
    return found
