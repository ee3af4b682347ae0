"""What running programs takes: sums of accounts, a forward pass as one program, and seconds on a network."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Account, Engine
from jax_entropy.private.program.export import Export
from jax_entropy.private.session.inference import CLIENT, PrivateModel


class Network(NamedTuple):
    """One-way latency in seconds, bandwidth of each party in bytes a second."""

    latency: float
    bandwidth: float


NETWORKS = {"lan": Network(0.0005, 1.25e8), "wan": Network(0.04, 1.25e7)}  # wan: the paper's 100 Mbit/s, 80 ms
_NUMBER = r"\d+(?:\.\d+)?"


def read_network(text: str) -> Network:
    """lan | wan | 100mbps,80ms (round trip).

    Raises:
      UserError: it is neither.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    found = re.fullmatch(rf"({_NUMBER})([mg])bps,({_NUMBER})ms", text)
    if not found or not float(found[1]) > 0:
        raise UserError(f"network={text!r} must be lan, wan, or like 100mbps,80ms (bandwidth, round trip)")
    return Network(float(found[3]) / 2000, float(found[1]) * {"m": 1e6, "g": 1e9}[found[2]] / 8)


def on_network(account: Account, network: Network) -> float:
    """Seconds: computation, then waiting for rounds, then for the busiest party's bytes."""
    return account.seconds + account.rounds * network.latency + max(account.bytes) / network.bandwidth


def add(accounts: Iterable[Account]) -> Account:
    """One after another: everything adds up, party by party."""
    accounts = list(accounts)
    if not accounts:
        return Account(0.0, (0,), (0,), 0)
    parties = lambda columns: tuple(map(sum, zip(*columns, strict=True)))  # noqa: E731
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


def run_whole(engine: Engine, exported: Export, tokens: Sequence[int]) -> tuple[Account, Account, np.ndarray]:
    """A forward pass as one program of an engine that is new: its account cold and warm, and its logits [T, V]."""
    model = PrivateModel.of(engine, exported)
    model.put_tokens(tokens)
    for _ in range(2):
        model.forward(len(tokens))
    (_, cold), (_, warm) = model.accounts[-2:]
    return cold, warm, engine.get(["logits"], CLIENT)["logits"]
