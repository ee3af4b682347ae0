"""How fast the loader feeds tokens, beside how fast a training step eats them, and what feeding takes of the host."""

import statistics
import time
from collections.abc import Callable, Iterator

import jax
from absl import flags
from ml_collections import ConfigDict

from jax_entropy.bench.trainable import trainable
from jax_entropy.config import check
from jax_entropy.data import Corpus, prepare, train_iterator
from jax_entropy.state import TrainState

_STEPS = 10
_ACCELERATOR = 600_000  # tokens/s of GPT-2 124M on one card, which the loader must not hold up
_READERS = ((1, 0), (2, 0), (4, 0), (1, 1), (1, 2))  # threads, processes


def started(config: ConfigDict) -> tuple[Corpus, TrainState, Callable, Iterator]:
    """A config's corpus, initial state, jitted training step and batches, on one device."""
    check(config)
    corpus = prepare(config.data, config.model.context_length)
    _, state, train_step = trainable(config, corpus.tokenizer.vocab_size)
    batch_size = config.train.batch_size * config.optimizer.accumulate
    return corpus, state, train_step, train_iterator(corpus, batch_size=batch_size, seed=0)


def bench_data(
    corpus: Corpus, batch_size: int, *, num_threads: int, num_workers: int, prefetch: int = 16, seconds: float = 3.0
) -> dict[str, float]:
    """Reads training batches for a while, without a step behind them.

    Args:
      corpus: a prepared corpus.
      batch_size: B, chunks a batch.
      num_threads, num_workers, prefetch: as for `train_iterator`.
      seconds: how long to read.
    Returns:
      Predicted tokens a second, B · T a batch; the seconds until the first batch; and, of this process, how many cores
      would be busy with feeding an accelerator. Its own processor time is felt little by what else the machine does.
    """
    start = time.perf_counter()
    options = dict(num_threads=num_threads, num_workers=num_workers, prefetch=prefetch)
    batches = train_iterator(corpus, batch_size=batch_size, seed=0, **options)
    next(batches)
    first_batch_seconds = time.perf_counter() - start
    # What was read ahead during the start would flatter the rate.
    for _ in range(prefetch * max(1, num_workers)):
        next(batches)
    start, start_busy, count = time.perf_counter(), time.process_time(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    busy = time.process_time() - start_busy
    if num_workers:
        batches.close()
    tokens = count * batch_size * corpus.context_length
    return {
        "loader tokens/s": tokens / elapsed,
        "first batch, s": first_batch_seconds,
        f"cores at {_ACCELERATOR:,} tokens/s": busy / tokens * _ACCELERATOR,
    }


def bench_feeding(config: ConfigDict, *, seconds: float = 3.0) -> Iterator[dict[str, float]]:
    """Tokens/s of the loader with threads and with processes, and how many times those of the config's step."""
    corpus, state, train_step, batches = started(config)
    batch_size = config.train.batch_size * config.optimizer.accumulate
    taken = []
    for _ in range(_STEPS):
        tokens = next(batches)["tokens"]
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, tokens, False))
        taken.append(time.perf_counter() - start)
    step = batch_size * corpus.context_length / statistics.median(taken[1:])
    flags.FLAGS.mark_as_parsed()  # Grain's workers ask for them
    for num_threads, num_workers in dict.fromkeys([(config.data.num_threads, 0), *_READERS]):
        row = bench_data(corpus, batch_size, num_threads=num_threads, num_workers=num_workers, seconds=seconds)
        ratio = {"step tokens/s": step, "loader / step": row["loader tokens/s"] / step}
        yield dict(num_threads=num_threads, num_workers=num_workers) | row | ratio
