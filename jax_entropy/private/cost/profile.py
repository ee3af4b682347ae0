"""The account of a private forward pass: every stage runs as a program of its own, its bytes and rounds are counted.

Bytes are what each party sends to all others, rounds are causal (a Lamport clock), seconds are those of all parties
computing on this machine; networks are added to them by `on_network`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Account, Engine, Setting
from jax_entropy.private.program.export import Export, abstract_inputs, lower
from jax_entropy.private.program.forward import forward
from jax_entropy.private.program.stage import (
    PLAIN,
    PUBLIC,
    TOKENS,
    Stage,
    Steps,
    export_name,
    run_stage,
)
from jax_entropy.private.session.inference import PrivateModel, compiler_options

KINDS = (
    "embedding", "LayerNorm", "RMSNorm", "projections", "temperature", "scores", "softmax", "mix", "output projection",
    "feed-forward", "GELU", "GELU (tanh)", "ReLU", "leaky ReLU", "residual", "vocabulary", "next token",
)  # fmt: skip


class Network(NamedTuple):
    """One-way latency in seconds, bandwidth of each party in bytes a second."""

    latency: float
    bandwidth: float


NETWORKS = {"lan": Network(0.0005, 1.25e8), "wan": Network(0.04, 1.25e7)}  # wan: the paper's 100 Mbit/s, 80 ms


_NUMBER = r"\d+(?:\.\d+)?"


def read_network(text: str) -> Network:
    """lan | wan | 100mbps,80ms (round trip). Raises UserError if it is neither."""
    if text in NETWORKS:
        return NETWORKS[text]
    found = re.fullmatch(rf"({_NUMBER})([mg])bps,({_NUMBER})ms", text)
    if not found or not float(found[1]) > 0:
        raise UserError(f"--network={text!r} must be lan, wan, or like 100mbps,80ms (bandwidth, round trip)")
    return Network(float(found[3]) / 2000, float(found[1]) * {"m": 1e6, "g": 1e9}[found[2]] / 8)


def on_network(account: Account, network: Network) -> float:
    """Seconds: computation, then waiting for rounds, then for the busiest party's bytes."""
    return account.seconds + account.rounds * network.latency + max(account.bytes) / network.bandwidth


class Entry(NamedTuple):
    """What one stage took: cold, when it ran first (weights opened, CHEETAH set up), and warm."""

    kind: str
    layer: int | None
    cold: Account
    warm: Account


class Profile(NamedTuple):
    """All entries of a forward pass over `num_tokens`; memory is the engine's peak, in bytes, all parties together."""

    architecture: str
    export: str  # of `export_name`
    setting: Setting
    num_tokens: int
    entries: tuple[Entry, ...]
    memory: int

    @property
    def plain(self) -> bool:
        return self.export == export_name(PLAIN)

    def by_kind(self, which: str = "warm") -> dict[str, Account]:
        """Sums over layers, in the order of KINDS."""
        sums = {}
        for kind in KINDS:
            if accounts := [getattr(entry, which) for entry in self.entries if entry.kind == kind]:
                sums[kind] = add(accounts)
        return sums

    def total(self, which: str = "warm") -> Account:
        return add(getattr(entry, which) for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        entries = [dict(kind=e.kind, layer=e.layer, cold=e.cold._asdict(), warm=e.warm._asdict()) for e in self.entries]
        return dict(
            architecture=self.architecture, export=self.export, setting=self.setting._asdict(),
            num_tokens=self.num_tokens, peak_memory_bytes=self.memory,
            total=dict(cold=self.total("cold")._asdict(), warm=self.total()._asdict()),
            entries=entries,
        )  # fmt: skip


def add(accounts: Iterable[Account]) -> Account:
    """One after another: everything adds up, party by party."""
    accounts = list(accounts)
    if not accounts:
        return Account(0.0, (0,), (0,), 0)
    parties = lambda columns: tuple(map(sum, zip(*columns)))  # noqa: E731
    return Account(
        sum(a.seconds for a in accounts), parties(a.bytes for a in accounts), parties(a.messages for a in accounts),
        sum(a.rounds for a in accounts),
    )  # fmt: skip


def times(account: Account, factor: float) -> Account:
    """The same thing so many times, one after another."""
    parties = lambda values: tuple(round(factor * value) for value in values)  # noqa: E731
    return Account(
        factor * account.seconds, parties(account.bytes), parties(account.messages), round(factor * account.rounds)
    )


def profile(
    exported: Export, tokens: list[int], setting: Setting, *, notify: Callable[[str], None] = lambda line: None
) -> Profile:
    """Runs every stage of a forward pass under the engine, twice, and accounts for it.

    Args:
      tokens: the prompt.
      notify: called with a line on the layer that begins.
    """
    shape = exported.shape
    stages = forward(shape, len(tokens))
    with Engine(setting) as engine:
        model = PrivateModel(engine, shape, {name: value.shape for name, value in exported.weights.items()})
        model.share_weights(exported.weights)
        model.put_tokens(tokens)
        runs = [
            _run_stages(
                model,
                stages,
                len(tokens),
                lambda layer, run=run: notify(f"{layer + 1} of {shape.num_layers} layers, {run}"),
            )  # fmt: skip
            for run in ("cold", "warm")
        ]
        memory = engine.ask("peak_memory")
    entries = tuple(
        Entry(stage.kind, stage.layer, cold, warm)
        for stage, cold, warm in zip(stages, *runs, strict=True)
        if cold.messages != (0,) * setting.num_parties or stage.kind in KINDS
    )
    return Profile(shape.architecture, export_name(shape.steps), setting, len(tokens), entries, memory)


def _run_stages(model: PrivateModel, stages: list[Stage], num_tokens: int, notify) -> list[Account]:
    accounts, known, layer = [], dict(model.types), None
    for stage in stages:
        if stage.layer not in (None, layer):
            notify(stage.layer)
        layer = stage.layer
        types = dict(zip(stage.inputs, abstract_inputs(model.shape, stage.inputs, num_tokens, known), strict=True))
        results = jax.eval_shape(lambda known, stage=stage: run_stage(stage, known), types)
        # stages of different layers differ in names only
        key = "|".join(
            [stage.kind, *(f"{_bare(name)}{value.shape}" for name, value in types.items()), *map(_bare, stage.outputs)]
        )
        if key not in model.programs:
            hlo = lower(stage.function, list(types.values()))
            visibility = ["public" if name in PUBLIC else "secret" for name in stage.inputs]
            model.engine.load(key, hlo, visibility, compiler_options(model.shape))
            model.programs[key] = stage.inputs, stage.outputs
        accounts.append(model.engine.run(key, stage.inputs, stage.outputs))
        known |= zip(stage.outputs, results, strict=True)
    return accounts


def _bare(name: str) -> str:
    return re.sub(r"^\d+\.", "", name)


class Ablation(NamedTuple):
    """A program with some steps: what it took, cold and warm, and its largest logit error against float32."""

    name: str
    cold: Account
    warm: Account
    error: float
    agreement: float


def ablation(
    export_with: Callable[[Steps], Export], tokens: list[int], setting: Setting, notify: Callable[[str], None]
) -> list[Ablation]:
    """The plain export, with GELU through erfc and with tokens as secret indices too, each step alone, and all of them.

    Indices are left out where there are more than 2¹⁵ pairs of tokens and entries to look among.
    """
    names = [f.name for f in dataclasses.fields(Steps) if f.name not in ("one_hot", "one_dot", "erf")]
    cases = {"plain": PLAIN, "plain, erfc": dataclasses.replace(PLAIN, erf=False)}
    cases["plain, indices"] = dataclasses.replace(PLAIN, one_hot=False)
    cases |= {f"plain + {name}": dataclasses.replace(PLAIN, **{name: True}) for name in names}
    cases["all"] = Steps()
    expected, rows, plain = None, [], None
    for name, steps in cases.items():
        exported = export_with(steps)
        if not steps.one_hot and len(tokens) * exported.shape.vocab_size > 1 << 15:
            continue
        if expected is None:
            expected = plain_logits(exported, tokens)
        if name not in ("plain", "all") and _same(exported, plain):
            continue  # this architecture has nothing for the step to do
        plain = plain or exported
        notify(name)
        cold, warm, logits = whole(exported, tokens, setting)
        agreement = float((logits.argmax(-1) == expected.argmax(-1)).mean())
        rows.append(Ablation(name, cold, warm, float(np.abs(logits - expected).max()), agreement))
    return rows


def _same(one: Export, other: Export) -> bool:
    """Whether a step changed nothing: the same weights, and no program that asks for it."""
    changed = [
        f.name
        for f in dataclasses.fields(Steps)
        if getattr(one.shape.steps, f.name) != getattr(other.shape.steps, f.name)
    ]
    if changed == ["erf"]:
        return one.shape.activation != "gelu"
    if changed in (["merged"], ["folded"], ["qkv"], ["temperature"]):
        return one.shape.weights == other.shape.weights and all(
            np.array_equal(one.weights[name], other.weights[name]) for name in one.weights
        )
    return False


def plain_logits(exported: Export, tokens: list[int]) -> np.ndarray:
    """The exported program's logits [T, V] in float32."""
    stages = forward(exported.shape, len(tokens))
    rows = np.eye(exported.shape.vocab_size, dtype=np.float32)[tokens]
    known: dict[str, Any] = exported.weights | {
        TOKENS: rows if exported.shape.steps.one_hot else np.asarray(tokens, np.int32)
    }
    for stage in stages:
        known |= zip(stage.outputs, run_stage(stage, known), strict=True)
    return np.asarray(known["logits"])


def whole(exported: Export, tokens: list[int], setting: Setting) -> tuple[Account, Account, np.ndarray]:
    """A forward pass as one program, cold and warm, and its logits [T, V]."""
    with Engine(setting) as engine:
        model = PrivateModel(engine, exported.shape, {name: value.shape for name, value in exported.weights.items()})
        model.share_weights(exported.weights)
        model.put_tokens(tokens)
        for _ in range(2):
            model.run("forward", forward(exported.shape, len(tokens)), ("logits",), len(tokens))
        logits = engine.get(["logits"], 0)["logits"]
    return model.accounts[-2][1], model.accounts[-1][1], logits
