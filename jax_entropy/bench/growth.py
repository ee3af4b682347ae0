"""How time and memory of a training step grow with each size of the model, beside its arithmetic.

Time is the process's own, so that what else runs on the machine is felt little; tables compare within a series.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jax_entropy.bench.trainable import trainable
from jax_entropy.census import census
from jax_entropy.config import default_config

_BASE = dict(num_layers=2, num_heads=4, model_dim=256, context_length=128, vocab_size=4096)
# What grows, through which values, and the tokens of a step, which stay.
SERIES = {
    "num_layers": ((2, 4, 8, 16, 32, 48), 2048),
    "context_length": ((128, 512, 2048, 8192), 8192),
    "vocab_size": ((4096, 16384, 65536, 131072), 2048),
    "num_heads": ((1, 2, 4, 8, 16), 2048),
}


def bench_growth(*, rounds: int, notify: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Rows of every series: processor seconds of a step (the least of `rounds`), FLOPs, temporaries and the state.

    `… / first` are against the series' first row, whose steps take turns with those of every other row, so that both
    have the same machine. Where nothing grows faster than its arithmetic, `seconds / first` stays at or below
    `GFLOP / first`. FLOPs are the products', under the causal mask. `notify` is told of each row as it is measured.
    """
    for name, (values, tokens) in SERIES.items():
        first_step, first = _compiled(_BASE | {name: values[0]}, tokens)
        for value in values:
            step, row = (first_step, first) if value == values[0] else _compiled(_BASE | {name: value}, tokens)
            turns = [(step(), first_step()) for _ in range(rounds + 1)][1:]  # the first one is slower
            seconds, seconds_of_first = map(min, zip(*turns, strict=True))
            ratios = {"seconds / first": seconds / seconds_of_first}
            ratios |= {f"{what} / first": row[what] / first[what] for what in ("GFLOP", "temporaries, MiB")}
            times, flops = ratios["seconds / first"], ratios["GFLOP / first"]
            notify(f"{name} {value:,}: {seconds:.3g} s, {times:.3g} times the first one's, its FLOPs {flops:.3g} times")
            yield dict(grows=name, value=value, seconds=seconds) | row | ratios


def _compiled(sizes: dict[str, int], tokens: int) -> tuple[Callable[[], float], dict[str, float]]:
    """A function that trains one step and returns its processor seconds; FLOPs and memory of the step."""
    config = default_config("EReg(SM+LN+G)")
    config.model.update({name: size for name, size in sizes.items() if name != "vocab_size"})
    model, state, train_step = trainable(config, sizes["vocab_size"])
    T, size = sizes["context_length"], sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    batch = jax.random.randint(jax.random.key(0), (tokens // T, T + 1), 0, sizes["vocab_size"])
    compiled = train_step.lower(state, batch, False).compile()

    def step() -> float:
        nonlocal state
        start = time.process_time()
        state, _ = jax.block_until_ready(compiled(state, batch))
        return time.process_time() - start

    return step, {
        "GFLOP": 3 * census(model.config).forward_flops * (tokens // T) / 1e9,
        "temporaries, MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "state, MiB": size / 2**20,
    }
