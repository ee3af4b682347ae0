"""What each rewrite is worth: the plain export, every rewrite alone, and all of them together."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jax_entropy.private.cost.account import run_whole
from jax_entropy.private.engine.engine import Account, Engine
from jax_entropy.private.program.blueprint import PLAIN, REWRITES, Rewrites
from jax_entropy.private.program.export import Export
from jax_entropy.private.program.forward import float32_logits


class Ablation(NamedTuple):
    """A program with some rewrites: what it took, cold and warm, and its largest logit error against float32."""

    name: str
    cold: Account
    warm: Account
    error: float
    agreement: float  # share of positions with the same likeliest token


def ablation(
    engine: Engine, export_with: Callable[[Rewrites], Export], tokens: Sequence[int], notify: Callable[[str], None]
) -> list[Ablation]:
    """The plain export, with GELU through erfc and with tokens as secret indices too, each rewrite alone, all of them.

    Indices are left out where there are more than 2¹⁵ pairs of tokens and entries to look among.
    """
    # what is in the plain export already, and what is of a single query
    names = [name for name in REWRITES if name not in ("one_hot", "erf", "one_dot", "last_row", "shifts")]
    cases = {"plain": PLAIN, "plain, erfc": dataclasses.replace(PLAIN, erf=False)}
    cases["plain, indices"] = dataclasses.replace(PLAIN, one_hot=False)
    cases |= {f"plain + {name}": dataclasses.replace(PLAIN, **{name: True}) for name in names}
    cases["all"] = Rewrites()
    plain = export_with(PLAIN)
    expected, rows = float32_logits(plain, tokens), []
    for name, rewrites in cases.items():
        if not rewrites.one_hot and len(tokens) * plain.blueprint.config.vocab_size > 1 << 15:
            continue
        exported = export_with(rewrites)
        if name not in ("plain", "all") and _same(exported, plain):
            continue  # this architecture has nothing for the rewrite to do
        notify(name)
        cold, warm, logits = run_whole(engine.reset(engine.setting), exported, tokens)
        agreement = float((logits.argmax(-1) == expected.argmax(-1)).mean())
        rows.append(Ablation(name, cold, warm, float(np.abs(logits - expected).max()), agreement))
    return rows


def _same(one: Export, other: Export) -> bool:
    """Whether a rewrite changed nothing: the same weights, and no program that asks for it."""
    before, after = other.blueprint.rewrites, one.blueprint.rewrites
    changed = [name for name in REWRITES if getattr(before, name) != getattr(after, name)]
    if changed == ["erf"]:
        return one.blueprint.config.activation != "gelu"
    if changed in (["merged"], ["folded"], ["qkv"], ["temperature"]):
        return one.weights.keys() == other.weights.keys() and all(
            np.array_equal(one.weights[name], other.weights[name]) for name in one.weights
        )
    return False
