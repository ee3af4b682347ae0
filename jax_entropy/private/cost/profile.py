"""The account of a private forward pass: every stage runs as a program of its own, its bytes and rounds are counted.

Bytes are what each party sends to all others, rounds are causal (a Lamport clock), seconds are those of all parties
computing on this machine.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_entropy.architecture import ModelConfig
from jax_entropy.census import KINDS
from jax_entropy.model import Transformer
from jax_entropy.private.cost.account import add, on_network, read_network
from jax_entropy.private.cost.memory import Layout
from jax_entropy.private.engine.engine import Account, Engine, Setting
from jax_entropy.private.program.blueprint import Rewrites
from jax_entropy.private.program.export import Export, export
from jax_entropy.private.program.fixed_point import check_range, random_tokens
from jax_entropy.private.program.forward import forward, last
from jax_entropy.private.program.stage import LAST, TOKENS, Stage, external_inputs, input_types, run_stage
from jax_entropy.private.session.inference import CLIENT, PrivateModel


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
    notify: Callable[[str], None], logits: str = "every", embedding: str = "shared", layout: Layout = Layout(),
) -> Profile:  # fmt: skip
    """The profile of a model on random tokens, under an engine of its own.

    Raises:
      UserError: its values leave the range of fixed point.
    """
    exported = export(config, variables, rewrites, setting, embedding=embedding, piece=layout.piece)
    tokens = random_tokens(config.vocab_size, num_tokens)
    check_range(exported, tokens, setting)
    if layout != Layout():
        notify(f"to fit into memory: {layout}")
    with Engine(setting) as engine:
        return profile(engine, exported, tokens, notify, logits, layout.streamed)


def profile(
    engine: Engine, exported: Export, tokens: Sequence[int], notify: Callable[[str], None] = lambda line: None,
    logits: str = "every", streamed: bool = False,
) -> Profile:  # fmt: skip
    """Runs every stage of a forward pass under a new engine, twice, and accounts for it.

    Args:
      tokens: the prompt.
      notify: called with a line on the layer that begins.
      logits: of "every" position, or of the "last" one.
      streamed: weights are shared a layer at a time, and dropped after it.
    """
    blueprint, model = exported.blueprint, PrivateModel(engine, exported.blueprint)
    stages = (last if logits == "last" else forward)(blueprint, len(tokens))
    engine.put([TOKENS], CLIENT, {TOKENS: exported.enter(tokens)})
    model.put_public(LAST, len(tokens) - 1)
    parts = [[*of] for _, of in itertools.groupby(stages, lambda stage: stage.layer)] if streamed else [stages]
    names, types, entries = {kind.name for kind in KINDS}, {}, []
    for number, part in enumerate(parts):
        model.share_weights(exported.weights, blueprint.present(*external_inputs(part)) if streamed else None)
        runs = [
            _run_stages(
                model, part, len(tokens), dict(types) if cold else types, cold,
                lambda layer, cold=cold: notify(
                    f"{layer + 1} of {blueprint.config.num_layers} layers, {'cold' if cold else 'warm'}"
                ),
            )
            for cold in (True, False)
        ]  # fmt: skip
        entries += [
            Entry(stage.kind, stage.layer, cold, warm)
            for stage, cold, warm in zip(part, *runs, strict=True)
            if any(cold.messages) or stage.kind in names  # splitting into heads is no operation, and free
        ]
        if streamed:
            read_later = external_inputs([stage for later in parts[number + 1 :] for stage in later])
            engine.keep([name for name in (*types, TOKENS, LAST) if name in read_later])
    return Profile(
        str(blueprint.config), str(blueprint.rewrites), engine.setting, len(tokens), logits,
        blueprint.embedding, engine.peak_memory(),
        tuple(entries),
    )  # fmt: skip


def _run_stages(
    model: PrivateModel, stages: list[Stage], num_tokens: int, known: dict[str, jax.ShapeDtypeStruct], cold: bool,
    notify: Callable[[int], None],
) -> list[Account]:  # fmt: skip
    """Runs stages one by one; a cold run leaves alone what they read, and writes beside it.

    Args:
      known: types of what was written before, and after it of what these write.
    """
    accounts, written, layer = [], set(), None
    names = lambda of: tuple(f"cold {name}" if cold and name in written else name for name in of)  # noqa: E731
    for stage in stages:
        if stage.layer not in (None, layer):
            notify(stage.layer)
        layer = stage.layer
        types = dict(zip(stage.inputs, input_types(model.blueprint, stage.inputs, num_tokens, known), strict=True))
        # stages of different layers differ in names only, in their windows, or in the squarings of their exponentials
        varied = (model.blueprint.config.windows, model.blueprint.squarings)
        own = None if layer is None else [values[layer] for values in varied if values]
        key = "|".join(
            [
                f"{stage.kind} {own}",
                *(f"{_bare(name)}{value.shape}" for name, value in types.items()),
                *map(_bare, stage.outputs),
            ]
        )
        if key not in model.programs:
            model.load(key, stage.function, stage.inputs, stage.outputs, num_tokens, known)
        inputs = names(stage.inputs)
        written.update(stage.outputs)
        accounts.append(model.engine.run(key, inputs, names(stage.outputs)))
        results = jax.eval_shape(lambda known, stage=stage: run_stage(stage, known), types)
        known |= zip(stage.outputs, results, strict=True)
    return accounts


def _bare(name: str) -> str:
    return re.sub(r"^\d+\.", "", name)
