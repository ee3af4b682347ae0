"""How fast the loader feeds tokens, to set beside how fast a step eats them."""

import time

from jax_entropy.data import Corpus, train_iterator


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
