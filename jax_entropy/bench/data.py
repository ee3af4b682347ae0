"""How fast the loader feeds tokens, beside how fast a training step eats them."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from jax_entropy.config import check, model_config
from jax_entropy.data import Corpus, prepare, train_iterator
from jax_entropy.model import Transformer
from jax_entropy.state import TrainState, init_state, make_train_step

_STEPS = 10


def started(config: ConfigDict) -> tuple[Corpus, TrainState, Callable, Iterator]:
    """A config's corpus, initial state, jitted training step and batches, on one device."""
    check(config)
    corpus = prepare(config.data, config.model.context_length)
    model = Transformer(model_config(config, corpus.tokenizer.vocab_size))
    state = jax.jit(functools.partial(init_state, config, model))()
    train_step = jax.jit(make_train_step(config, model), static_argnums=2, donate_argnums=0)
    batch_size = config.train.batch_size * config.optimizer.accumulate
    return corpus, state, train_step, train_iterator(corpus, batch_size=batch_size, seed=0)


def bench_data(
    corpus: Corpus, batch_size: int, *, num_threads: int = 2, prefetch: int = 16, seconds: float = 3.0
) -> dict[str, float]:
    """Reads training batches for a while, without a step behind them.

    Args:
      corpus: a prepared corpus.
      batch_size: B, chunks a batch.
      num_threads, prefetch: as in `config.data`.
      seconds: how long to read.
    Returns:
      `tokens_per_second` (predicted tokens, B · T a batch), `batches_per_second` and `first_batch_seconds`.
    """
    start = time.perf_counter()
    batches = train_iterator(corpus, batch_size=batch_size, seed=0, num_threads=num_threads, prefetch=prefetch)
    next(batches)
    first_batch_seconds = time.perf_counter() - start
    # What was read ahead during the start would flatter the rate.
    for _ in range(prefetch):
        next(batches)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    return {
        "tokens_per_second": count * batch_size * corpus.context_length / elapsed,
        "batches_per_second": count / elapsed,
        "first_batch_seconds": first_batch_seconds,
    }


def bench_feeding(config: ConfigDict) -> dict[str, float]:
    """Tokens/s of the loader and of the training step of a config, and how many times faster the loader is."""
    corpus, state, train_step, batches = started(config)
    batch_size = config.train.batch_size * config.optimizer.accumulate
    loader = bench_data(corpus, batch_size, num_threads=config.data.num_threads, prefetch=config.data.prefetch)[
        "tokens_per_second"
    ]
    seconds = []
    for _ in range(_STEPS):
        tokens = next(batches)["tokens"]
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, tokens, False))
        seconds.append(time.perf_counter() - start)
    step = batch_size * corpus.context_length / statistics.median(seconds[1:])
    return {"loader tokens/s": loader, "step tokens/s": step, "loader / step": loader / step}
