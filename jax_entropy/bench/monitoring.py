"""What watching a run costs: the metrics of a watched step, and what the host does with them."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_entropy.bench.data import started
from jax_entropy.runs.metrics import read_metrics
from jax_entropy.runs.workdir import Workdir
from jax_entropy.state import TrainState
from jax_entropy.training.train import train

_LINES = 5
_WITHOUT = "without the penalty"


def bench_monitoring(config: ConfigDict, *, rounds: int = 20) -> dict[str, float]:
    """Milliseconds of steps, medians of turns; the host's share in a real run; and what watching costs in all.

    A step without the penalty, where the architecture has one, is its `SM…` alone, and uses no entropy. The sum is of a
    step as `config.train.log_every` has it: one in so many is watched, and each is looked at.
    """
    batches, turns = _turns(config)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for name in list(turns) * (rounds + 1):
        tokens = next(batches)["tokens"]
        start = time.perf_counter()
        turns[name](tokens)
        seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    plain, watched = medians["step"], medians["watched"]

    every = config.train.log_every
    never = (_LINES + 2) * every
    config.update_from_flattened_dict(
        {"train.num_steps": never - every, "train.evaluate_every": never, "train.checkpoint_every": never}
    )
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder, notify=lambda line: None)
        lines = read_metrics(Workdir(folder).metrics)
    shares = [line["performance"]["monitoring"] for line in lines if line["kind"] == "train"]
    host = statistics.median(shares[2:])  # the first line has the compilation
    return {
        **{f"{name}, ms": 1e3 * median for name, median in medians.items()},
        **({"penalty, price": plain / medians[_WITHOUT]} if _WITHOUT in medians else {}),
        "watching, price": watched / plain,
        "host, share": host,
        "monitoring, share": host + (watched - plain) / plain / every,
    }


def _turns(config: ConfigDict) -> tuple[Iterator, dict[str, Callable[[Any], None]]]:
    """Batches, and the kinds of steps that take turns with them, each a function of a batch."""
    _, *trained, batches = started(config)
    turns = {"step": _stepper(*trained, watch=False), "watched": _stepper(*trained, watch=True)}
    if config.architecture.startswith("EReg("):
        config = config.copy_and_resolve_references()
        config.architecture = config.architecture.removeprefix("EReg(").removesuffix(")")
        _, *trained, _ = started(config)
        turns = {_WITHOUT: _stepper(*trained, watch=False)} | turns
    return batches, turns


def _stepper(state: TrainState, train_step: Callable, *, watch: bool) -> Callable[[Any], None]:
    """Trains a state of its own, one step a call."""
    state = jax.tree.map(jnp.copy, state)  # a step is given its state

    def step(tokens: Any) -> None:
        nonlocal state
        state, _ = jax.block_until_ready(train_step(state, tokens, watch))

    return step
