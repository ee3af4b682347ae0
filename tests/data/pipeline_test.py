import itertools
import os

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jax_entropy import data
from jax_entropy.bench.data import bench_data
from jax_entropy.errors import UserError
from tests.data.helpers import data_config, write_folder

T, B = 16, 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    write_folder(path / "text", count=40)
    return data.prepare(data_config(path / "home", files=str(path / "text")), T)


def iterator(corpus, **overrides):
    options = dict(batch_size=B, seed=3, num_threads=2, prefetch=4) | overrides
    return data.train_iterator(corpus, **options)


def take(iterator, count):
    return [batch["tokens"] for batch in itertools.islice(iterator, count)]


def all_rows(corpus, split):
    return np.stack([chunk["tokens"] for chunk in corpus.chunks(split)])


def multiset(tokens):
    return sorted(map(tuple, np.concatenate(tokens).tolist()))


def test_batches_are_chunks_of_the_corpus(corpus):
    (batch,) = itertools.islice(iterator(corpus), 1)
    assert set(batch) == {"tokens"}
    assert batch["tokens"].shape == (B, T + 1) and batch["tokens"].dtype == np.int32
    assert set(map(tuple, batch["tokens"].tolist())) <= set(map(tuple, all_rows(corpus, "train").tolist()))


def test_an_epoch_holds_every_chunk_once_but_those_that_fill_no_batch(corpus):
    batches = corpus.num_train_chunks // B
    assert batches > 3 and corpus.num_train_chunks % B
    remaining = multiset([all_rows(corpus, "train")])
    for row in multiset(take(iterator(corpus), batches)):
        remaining.remove(row)
    assert len(remaining) == corpus.num_train_chunks % B


def test_epochs_and_seeds_differ_in_order_and_repeat_exactly(corpus):
    batches = corpus.num_train_chunks // B
    two_epochs = take(iterator(corpus), 2 * batches)
    assert not (np.stack(two_epochs[:batches]) == np.stack(two_epochs[batches:])).all()
    assert (np.stack(take(iterator(corpus), 2 * batches)) == np.stack(two_epochs)).all()
    assert not (np.stack(take(iterator(corpus, seed=4), batches)) == np.stack(two_epochs[:batches])).all()


@pytest.mark.parametrize("threads, prefetch", [(0, 0), (1, 1), (4, 64)])
def test_reading_ahead_does_not_change_the_batches(corpus, threads, prefetch):
    other = take(iterator(corpus, num_threads=threads, prefetch=prefetch), 9)
    assert (np.stack(other) == np.stack(take(iterator(corpus), 9))).all()


@pytest.mark.parametrize("process_count", [2, 3, 4])
def test_global_batch_is_the_same_set_on_any_number_of_processes(corpus, process_count):
    batches = 2 * (corpus.num_train_chunks // B) + 1
    whole = take(iterator(corpus), batches)
    parts = [
        take(iterator(corpus, process_index=i, process_count=process_count), batches) for i in range(process_count)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert all(share.shape == (B // process_count, T + 1) for share in shares)
        assert multiset(shares) == multiset([batch])


@pytest.mark.parametrize("done", [0, 1, 5, 60])
def test_resuming_from_a_state_goes_on_as_if_unbroken(corpus, done):
    unbroken = iterator(corpus)
    take(unbroken, done)
    state = unbroken.get_state()
    expected = take(unbroken, 7)
    resumed = iterator(corpus)
    take(resumed, 3)
    resumed.set_state(state)
    assert (np.stack(take(resumed, 7)) == np.stack(expected)).all()


def test_a_run_may_go_on_with_another_number_of_processes(corpus):
    unbroken = iterator(corpus)
    take(unbroken, 5)
    halves = [iterator(corpus, process_index=i, process_count=2) for i in range(2)]
    for half in halves:
        half.set_state(unbroken.get_state())
    expected = take(unbroken, 1)
    assert multiset(sum((take(half, 1) for half in halves), [])) == multiset(expected)


def test_orbax_saves_and_restores_the_position(corpus, tmp_path):
    unbroken = iterator(corpus)
    take(unbroken, 4)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(unbroken)))
        manager.wait_until_finished()
        expected = take(unbroken, 3)
        resumed = iterator(corpus)
        manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    assert (np.stack(take(resumed, 3)) == np.stack(expected)).all()


def gathered(corpus, **options):
    batches = list(data.validation_batches(corpus, **options))
    tokens, weight = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return tokens, weight, len(batches)


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
def test_validation_reads_every_chunk_once_in_order_and_pads_with_weight_0(corpus, batch_size):
    tokens, weight, count = gathered(corpus, batch_size=batch_size)
    total = corpus.num_validation_chunks
    assert count == -(-total // batch_size) and len(tokens) == count * batch_size
    assert tokens.dtype == np.int32 and weight.dtype == np.float32
    assert weight.tolist() == [1.0] * total + [0.0] * (len(weight) - total)
    assert (tokens[:total] == all_rows(corpus, "validation")).all()


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("max_chunks", [0, 9])
def test_validation_is_the_same_set_on_any_number_of_processes(corpus, process_count, max_chunks):
    options = dict(batch_size=8, max_chunks=max_chunks)
    tokens, weight, count = gathered(corpus, **options)
    parts = [gathered(corpus, process_index=i, process_count=process_count, **options) for i in range(process_count)]
    assert {part[2] for part in parts} == {count}
    assert multiset([t[w > 0] for t, w, _ in parts]) == multiset([tokens[weight > 0]])


def test_validation_subset_is_fixed_and_spread_over_the_split(corpus):
    tokens, weight, _ = gathered(corpus, batch_size=4, max_chunks=6)
    total = corpus.num_validation_chunks
    assert weight.sum() == 6
    expected = all_rows(corpus, "validation")[[i * total // 6 for i in range(6)]]
    assert (tokens[weight > 0] == expected).all()
    assert gathered(corpus, batch_size=4, max_chunks=10**6)[1].sum() == total


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            dict(batch_size=100_000),
            "a step reads 100000 chunks .config.train.batch_size · config.optimizer.accumulate.",
        ),
        (dict(batch_size=0), "a batch of 0 chunks .* must be a multiple of the 1 processes"),
        (dict(batch_size=10, process_count=4), "a batch of 10 chunks .* must be a multiple of the 4"),
    ],
)
def test_impossible_batches_are_one_sentence(corpus, options, sentence):
    with pytest.raises(UserError, match=sentence):
        iterator(corpus, **options)
    if options["batch_size"] < 100:
        with pytest.raises(UserError, match=sentence):
            data.validation_batches(corpus, **options)


def test_loader_benchmark_counts_tokens(corpus):
    rates = bench_data(corpus, B, num_threads=1, num_workers=0, prefetch=2, seconds=0.2)
    assert rates["loader tokens/s"] > 10_000 and rates["first batch, s"] > 0
    busy = rates["cores at 600,000 tokens/s"] / 600_000 * rates["loader tokens/s"]
    assert 0 < busy <= os.cpu_count()
