"""How time and memory of a training step grow with each size of the model, beside its arithmetic.

Time is the process's own, so that what else runs on the machine is felt little; tables compare within a series.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jax_entropy.census import census
from jax_entropy.config import default_config, model_config
from jax_entropy.model import Transformer
from jax_entropy.state import init_state, make_train_step

_BASE = dict(num_layers=2, num_heads=4, model_dim=256, context_length=128, vocab_size=4096)
# What grows, through which values, and the tokens of a step, which stay.
SERIES = {
    "num_layers": ((2, 4, 8, 16, 32, 48), 2048),
    "context_length": ((128, 512, 2048, 8192), 8192),
    "vocab_size": ((4096, 16384, 65536, 131072), 2048),
    "num_heads": ((1, 2, 4, 8, 16), 2048),
}


def bench_growth(
    *, rounds: int, notify: Callable[[str], None], series: dict[str, tuple[tuple[int, ...], int]] = SERIES
) -> Iterator[dict[str, Any]]:
    """Rows of every series: processor seconds of a step (the least of `rounds`), FLOPs, temporaries and the state.

    `time / first` and `FLOPs / first` are against the series' first row; where nothing grows faster than its
    arithmetic, the one stays at or below the other. FLOPs are the products', under the causal mask.
    """
    for name, (values, tokens) in series.items():
        first: dict[str, Any] = {}
        for value in values:
            notify(f"{name} {value:,}")
            row = _measured(_BASE | {name: value}, tokens, rounds)
            first = first or row
            ratios = {f"{what} / first": row[what] / first[what] for what in ("seconds", "GFLOP", "temporaries, MiB")}
            yield dict(grows=name, value=value) | row | ratios


def _measured(sizes: dict[str, int], tokens: int, rounds: int) -> dict[str, float]:
    config = default_config("EReg(SM+LN+G)")
    config.model.update({name: size for name, size in sizes.items() if name != "vocab_size"})
    model = Transformer(model_config(config, sizes["vocab_size"]))
    state = jax.jit(functools.partial(init_state, config, model))()
    T, size = sizes["context_length"], sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    batch = jax.random.randint(jax.random.key(0), (tokens // T, T + 1), 0, sizes["vocab_size"])
    compiled = (
        jax.jit(make_train_step(config, model), static_argnums=2, donate_argnums=0).lower(state, batch, False).compile()
    )
    seconds = []
    for _ in range(rounds + 1):
        start = time.process_time()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.process_time() - start)
    counted = census(model.config)
    return {
        "seconds": min(seconds[1:]),
        "GFLOP": 3 * counted.forward_flops * (tokens // T) / 1e9,
        "temporaries, MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "state, MiB": size / 2**20,
    }
