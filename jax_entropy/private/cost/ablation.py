"""What each rewrite is worth: every one added alone to the plain export, and left out alone of all of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jax_entropy.private.cost.account import run_whole
from jax_entropy.private.engine.engine import Account, Engine
from jax_entropy.private.program.blueprint import PLAIN, REWRITES, Rewrites
from jax_entropy.private.program.export import Export
from jax_entropy.private.program.forward import float32_logits, forward
from jax_entropy.private.program.stage import compose, external_inputs, input_types


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
    """The plain export, also with GELU through erfc and with tokens as secret indices; each rewrite added to it alone;
    all of them; and each alone left out of all.

    Rewrites that change nothing of this model are left out, and indices where there are more than 2¹⁵ pairs of tokens
    and entries to look among.
    """
    names = [name for name in REWRITES if name not in ("one_hot", "erf")]  # which are in the plain export already
    cases = [("plain", PLAIN), ("plain, erfc", dataclasses.replace(PLAIN, erf=False))]
    cases += [("plain, indices", dataclasses.replace(PLAIN, one_hot=False))]
    cases += [(f"plain + {name}", dataclasses.replace(PLAIN, **{name: True})) for name in names]
    cases += [("all", Rewrites())]
    cases += [(f"all but {name}", dataclasses.replace(Rewrites(), **{name: False})) for name in names]
    plain, whole = export_with(PLAIN), export_with(Rewrites())
    expected, rows = float32_logits(plain, tokens), []
    for name, rewrites in cases:
        if not rewrites.one_hot and len(tokens) * plain.blueprint.config.vocab_size > 1 << 15:
            continue
        exported, whence = export_with(rewrites), plain if name.startswith("plain") else whole
        if exported.blueprint.rewrites != whence.blueprint.rewrites and _same(exported, whence, len(tokens), engine):
            continue
        notify(name)
        cold, warm, logits = run_whole(engine.reset(engine.setting), exported, tokens)
        agreement = float((logits.argmax(-1) == expected.argmax(-1)).mean())
        rows.append(Ablation(name, cold, warm, float(np.abs(logits - expected).max()), agreement))
    return rows


def _same(one: Export, other: Export, num_tokens: int, engine: Engine) -> bool:
    """Whether two exports are executed alike: the same weights, opened or not, in the same program."""
    opens = [export.blueprint.rewrites.cached and engine.setting.protocol == "semi2k" for export in (one, other)]
    if opens[0] != opens[1] or one.weights.keys() != other.weights.keys():
        return False
    if not all(np.array_equal(one.weights[name], other.weights[name]) for name in one.weights):
        return False
    return _program(one, num_tokens) == _program(other, num_tokens)


def _program(exported: Export, num_tokens: int) -> str:
    stages = forward(exported.blueprint, num_tokens)
    names = external_inputs(stages)
    return str(jax.make_jaxpr(compose(stages, names, ("logits",)))(*input_types(exported.blueprint, names, num_tokens)))
