"""Batches of chunks for training and validation, read by Grain.

Global batch k holds the same chunks on any number of processes, so a run can go on where another number left it.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jax_entropy.data.corpus import Corpus
from jax_entropy.errors import UserError


def train_iterator(
    corpus: Corpus,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 16,
    num_workers: int = 0,
) -> grain.DatasetIterator:
    """Iterates for ever over shuffled training batches, in a new order each epoch.

    An epoch is the shuffled chunks without the last ones that fill no batch. `get_state` and `set_state` count batches
    and know nothing of `process_count`; a checkpoint keeps what `get_state` gives.

    Args:
      corpus: a prepared corpus.
      batch_size: B, chunks in the global batch.
      seed: of the shuffle.
      process_index, process_count: this process reads its share of every global batch.
      num_threads: threads that read ahead.
      prefetch: batches that are read ahead.
      num_workers: processes that read instead of this one's threads; `get_state` is then of another form.
    Returns:
      Iterator of {"tokens": int32 [B / process_count, T + 1]}.
    Raises:
      UserError: B is larger than the number of chunks or is not divisible by `process_count`.
    """
    batch_per_process = _divide(batch_size, process_count)
    if batch_size > corpus.num_train_chunks:
        raise UserError(
            f"a step reads {batch_size} chunks (config.train.batch_size · config.optimizer.accumulate), and the corpus "
            f"has {corpus.num_train_chunks} for training, of {corpus.context_length + 1} tokens; read fewer, or use a "
            "larger corpus"
        )
    chunks = corpus.chunks("train")
    used = corpus.num_train_chunks // batch_size * batch_size
    dataset = (
        grain.MapDataset.range(corpus.num_train_chunks)
        .seed(seed)
        .shuffle()[:used][process_index::process_count]
        .repeat(None)
        .batch(batch_per_process, drop_remainder=True)
        .map(lambda indices: {"tokens": _read(chunks, indices)})
    )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    reader = dataset.to_iter_dataset(options)
    return iter(reader.mp_prefetch(grain.MultiprocessingOptions(num_workers)) if num_workers else reader)


def validation_batches(
    corpus: Corpus, *, batch_size: int, process_index: int = 0, process_count: int = 1, max_chunks: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterates once over the validation chunks, always in the same order.

    Args:
      corpus: a prepared corpus.
      batch_size: B, chunks in the global batch.
      process_index, process_count: this process reads its share of every global batch.
      max_chunks: how many chunks, evenly spaced over the split; 0 takes all.
    Yields:
      tokens int32 [B / process_count, T + 1] and weight float32 [B / process_count]: 0 for the rows that pad the last
      batch, else 1.
    Raises:
      UserError: B is not divisible by `process_count`.
    """
    _divide(batch_size, process_count)
    chunks, total = corpus.chunks("validation"), corpus.num_validation_chunks
    count = min(max_chunks, total) or total

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin in range(0, count, batch_size):
            rows = np.arange(begin, begin + batch_size)[process_index::process_count]
            weight = rows < count
            # Rows of weight 0 repeat the last chunk: real text, so that nothing they cause can be out of range.
            yield _read(chunks, np.minimum(rows, count - 1) * total // count), weight.astype(np.float32)

    return batches()


def _read(chunks: Sequence[dict[str, np.ndarray]], indices: np.ndarray) -> np.ndarray:
    # All chunks of a batch in one call: three times as fast as one by one.
    return np.stack([chunk["tokens"] for chunk in chunks.__getitems__(indices.tolist())]).astype(np.int32)


def _divide(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a batch of {batch_size} chunks (config.train.batch_size · config.optimizer.accumulate) must be a "
            f"multiple of the {process_count} processes"
        )
    return batch_size // process_count
