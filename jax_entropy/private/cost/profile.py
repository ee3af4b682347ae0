"""The account of a private forward pass: every stage runs as a program of its own, its bytes and rounds are counted.

Bytes are what each party sends to all others, rounds are causal (a Lamport clock), seconds are those of all parties
computing on this machine.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_entropy.architecture import ModelConfig
from jax_entropy.census import KINDS
from jax_entropy.model import Transformer
from jax_entropy.private.cost.account import add, on_network, read_network
from jax_entropy.private.engine.engine import Account, Engine, Setting
from jax_entropy.private.program.blueprint import Rewrites
from jax_entropy.private.program.export import Export, export
from jax_entropy.private.program.fixed_point import check_range, random_tokens
from jax_entropy.private.program.forward import forward, last
from jax_entropy.private.program.stage import LAST, Stage, input_types, run_stage
from jax_entropy.private.session.inference import PrivateModel


class Entry(NamedTuple):
    """What one stage took: cold, when it ran first (weights opened, CHEETAH set up), and warm."""

    kind: str
    layer: int | None
    cold: Account
    warm: Account


class Profile(NamedTuple):
    """All entries of a forward pass over `num_tokens`."""

    architecture: str
    export: str  # "optimised", "plain", or without what
    setting: Setting
    num_tokens: int
    logits: str  # of "every" position, or of the "last" one
    embedding: str  # "shared" or "public"
    peak_memory_bytes: int  # of the engine, all parties together
    entries: tuple[Entry, ...]

    def by_kind(self) -> dict[str, Account]:
        """Warm sums over layers, in the order of KINDS."""
        found = {kind.name: [entry.warm for entry in self.entries if entry.kind == kind.name] for kind in KINDS}
        return {kind: add(accounts) for kind, accounts in found.items() if accounts}

    def total(self, which: str = "warm") -> Account:
        """The sum of all entries, "cold" or "warm"."""
        return add(getattr(entry, which) for entry in self.entries)

    def to_json(self, network: str) -> dict[str, Any]:
        """What a file holds of it: its fields, both totals, and what a picture shows: each kind's cost on a network."""
        link = read_network(network)
        costs = {
            kind: dict(bytes=max(account.bytes), rounds=account.rounds, seconds=on_network(account, link))
            for kind, account in self.by_kind().items()
        }
        total = dict(cold=self.total("cold"), warm=self.total())
        return self._asdict() | dict(setting=self.setting._asdict(), total=total, network=network, costs=costs)


def random_variables(config: ModelConfig) -> Any:
    """Variables as a run starts with; bytes and rounds do not depend on values."""
    return jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def measure(
    config: ModelConfig, variables: Any, rewrites: Rewrites, num_tokens: int, setting: Setting,
    notify: Callable[[str], None], logits: str = "every", embedding: str = "shared",
) -> Profile:  # fmt: skip
    """The profile of a model on random tokens, under an engine of its own.

    Raises:
      UserError: its values leave the range of fixed point.
    """
    exported, tokens = (
        export(config, variables, rewrites, setting, embedding=embedding),
        random_tokens(config.vocab_size, num_tokens),
    )
    check_range(exported, tokens, setting)
    with Engine(setting) as engine:
        return profile(engine, exported, tokens, notify, logits)


def profile(
    engine: Engine, exported: Export, tokens: Sequence[int], notify: Callable[[str], None] = lambda line: None,
    logits: str = "every",
) -> Profile:  # fmt: skip
    """Runs every stage of a forward pass under a new engine, twice, and accounts for it.

    Args:
      tokens: the prompt.
      notify: called with a line on the layer that begins.
      logits: of "every" position, or of the "last" one.
    """
    blueprint = exported.blueprint
    stages = (last if logits == "last" else forward)(blueprint, len(tokens))
    model = PrivateModel.of(engine, exported)
    model.put_tokens(tokens)
    model.put_public(LAST, len(tokens) - 1)
    runs = [
        _run_stages(
            model, stages, len(tokens),
            lambda layer, run=run: notify(f"{layer + 1} of {blueprint.config.num_layers} layers, {run}"),
        )
        for run in ("cold", "warm")
    ]  # fmt: skip
    names = {kind.name for kind in KINDS}
    entries = tuple(
        Entry(stage.kind, stage.layer, cold, warm)
        for stage, cold, warm in zip(stages, *runs, strict=True)
        if any(cold.messages) or stage.kind in names  # splitting into heads is no operation, and free
    )
    return Profile(
        str(blueprint.config), str(blueprint.rewrites), engine.setting, len(tokens), logits,
        blueprint.embedding, engine.peak_memory(),
        entries,
    )  # fmt: skip


def _run_stages(
    model: PrivateModel, stages: list[Stage], num_tokens: int, notify: Callable[[int], None]
) -> list[Account]:
    accounts, known, layer = [], {}, None
    for stage in stages:
        if stage.layer not in (None, layer):
            notify(stage.layer)
        layer = stage.layer
        types = dict(zip(stage.inputs, input_types(model.blueprint, stage.inputs, num_tokens, known), strict=True))
        # stages of different layers differ in names only, or in their windows
        window = None if layer is None else model.blueprint.config.windows[layer]
        key = "|".join(
            [
                f"{stage.kind} {window}",
                *(f"{_bare(name)}{value.shape}" for name, value in types.items()),
                *map(_bare, stage.outputs),
            ]
        )
        if key not in model.programs:
            model.load(key, stage.function, stage.inputs, stage.outputs, num_tokens, known)
        accounts.append(model.engine.run(key, stage.inputs, stage.outputs))
        results = jax.eval_shape(lambda known, stage=stage: run_stage(stage, known), types)
        known |= zip(stage.outputs, results, strict=True)
    return accounts


def _bare(name: str) -> str:
    return re.sub(r"^\d+\.", "", name)
