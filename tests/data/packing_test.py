import dataclasses
import functools
import io
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_entropy.data import documents as documents_module
from jax_entropy.data import packing
from jax_entropy.data.documents import Document
from jax_entropy.data.tokenizer import train_tokenizer
from jax_entropy.errors import UserError
from tests.data.helpers import script

TEXTS = [script(i, lines) for i, lines in enumerate([1, 5, 40, 0, 100, 7])]
TOKENIZER = train_tokenizer(TEXTS, 400)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def document(text: str, name: str = "a.py") -> Document:
    data = text.encode()
    return Document(name, len(data), functools.partial(io.BytesIO, data))


def documents(texts) -> list[Document]:
    return [document(text, f"file{i}.py") for i, text in enumerate(texts)]


def plan(texts, fraction=0.05, max_documents=0, min_tail=0):
    return packing.plan_cuts(
        documents(texts), validation_fraction=fraction, max_documents=max_documents, min_tail=min_tail
    )


@given(st.lists(st.integers(0, 999), max_size=60), st.integers(1, 20))
def test_pack_predicts_every_token_but_the_first_once(tokens, context_length):
    chunks, rest = packing.pack(np.array(tokens, np.uint16), context_length)
    assert chunks.shape[1] == context_length + 1
    predicted = [*chunks[:, 1:].ravel(), *rest[1:]]
    assert predicted == tokens[1:]
    assert len(rest[1:]) < context_length
    # A chunk starts with the last token of the one before it.
    assert [*chunks[1:, 0]] == [*chunks[:-1, -1]]
    assert [*chunks[:1, 0], *rest[:1]][:1] == tokens[:1]


@given(UNICODE, st.integers(0, 200), st.integers(1, 9))
def test_the_two_sides_of_a_cut_make_the_document(text, cut, block):
    size = len(text.encode())
    cut = min(cut, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "BLOCK_BYTES", block)
        train, validation = ("".join(document(text).text(*span)) for span in ((0, cut), (cut, size)))
    assert train + validation == text
    assert cut <= len(train.encode()) < cut + 4


def test_pieces_of_a_text_have_the_tokens_of_the_whole(monkeypatch):
    text = script(3, 3000)
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 1000)
    pieces = list(document(text).text(0, len(text.encode())))
    assert len(pieces) > 20 and max(map(len, pieces)) < 2000
    assert sum((TOKENIZER.encode(piece) for piece in pieces), []) == TOKENIZER.encode(text)


def test_a_document_is_read_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 1000)
    stream = io.BytesIO(b"word\n" * 100_000)
    pieces = Document("a", 500_000, lambda: stream).text(0, 500_000)
    next(pieces)
    assert stream.tell() <= 1000


def test_many_alike_documents_are_held_out_whole_and_by_name_alone():
    texts = ["x" * 100] * 1000
    cuts = plan(texts)
    assert set(cuts) == {0, 100}
    assert 25 <= (cuts == 0).sum() <= 75
    assert (plan(["y" * 300] * 1000) == 0).tolist() == (cuts == 0).tolist()
    assert (plan(texts[:500]) == cuts[:500]).all()


@pytest.mark.parametrize("count", [7, 20, 25, 40, 60])
def test_fewer_documents_are_held_out_whole_too(count):
    cuts = plan(["x" * 100] * count)
    assert set(cuts) == {0, 100}
    assert 0.05 / 3 * count <= (cuts == 0).sum() <= 0.15 * count


@pytest.mark.parametrize("sizes", [[1000], [1000, 1000], [100_000, 10, 10], [40] * 10 + [10**5], [1000] * 6])
def test_few_or_lopsided_documents_are_cut_at_their_ends(sizes):
    cuts = plan(["x" * size for size in sizes])
    assert (np.array(sizes) - cuts).tolist() == [int(0.05 * size) for size in sizes]


def test_an_end_is_long_enough_for_a_chunk_but_at_most_half():
    assert plan(["x" * 20_000, "x" * 3000, "x" * 100], min_tail=800).tolist() == [19_000, 3000, 100]
    assert plan(["x" * 9000, "x" * 3000, "x" * 100], min_tail=800).tolist() == [8200, 3000, 100]
    assert plan(["x" * 1000], min_tail=800).tolist() == [500]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=80), st.floats(0.01, 0.9), st.integers(0, 500))
def test_both_sides_have_text_and_neither_takes_what_is_not_there(sizes, fraction, max_documents):
    cuts = plan(["x" * size for size in sizes], fraction, max_documents, min_tail=50)
    chosen = cuts >= 0
    assert chosen.sum() == (min(max_documents, len(sizes)) or len(sizes))
    held = (np.array(sizes) - cuts)[chosen]
    assert (held >= 0).all()
    total = np.array(sizes)[chosen].sum()
    if total > 50 * len(sizes):
        assert 0 < held.sum() < total


def test_max_documents_takes_the_first_of_the_hub_shuffle():
    cuts = plan(["x" * 100] * 50, max_documents=7)
    assert set(np.flatnonzero(cuts >= 0)) == set(np.random.default_rng(0).permutation(50)[:7])
    assert (plan(["x" * 100] * 50, max_documents=60) >= 0).all()


def test_max_documents_is_what_datasets_would_choose():
    rows = pytest.importorskip("datasets").Dataset.from_dict({"i": list(range(50))})
    expected = set(rows.shuffle(seed=0).select(range(7))["i"])
    assert set(np.flatnonzero(plan(["x" * 100] * 50, max_documents=7) >= 0)) == expected


def test_tokenizer_sample_is_the_training_text_or_evenly_spaced_pieces_of_it(monkeypatch):
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 10)
    texts = ["".join(f"{d}{i:03}\n......" for i in range(100)) for d in "abcd"]
    cuts = np.array([1000, 600, -1, 0])
    everything = "".join(packing.training_sample(documents(texts), cuts, 10**6))
    assert everything == texts[0][:1000] + texts[1][:600]
    sample = list(packing.training_sample(documents(texts), cuts, 400))
    assert 350 <= len("".join(sample)) <= 450
    assert {piece[0] for piece in sample if piece[0] in "abcd"} <= {"a", "b"}
    assert any("a09" in piece for piece in sample) and any("b05" in piece for piece in sample)


def written(tmp_path, texts, cuts, context_length, join):
    counts = packing.write_chunks(
        documents(texts), np.array(cuts), TOKENIZER, tmp_path, context_length=context_length, join_documents=join
    )
    rows = {
        split: np.fromfile(tmp_path / f"{split}.tokens", np.uint16).reshape(-1, context_length + 1).tolist()
        for split in packing.SPLITS
    }
    return rows, counts


def chunks_of(tokens, context_length):
    return [tokens[i : i + context_length + 1] for i in range(0, len(tokens) - context_length, context_length)]


@pytest.mark.parametrize("context_length", [1, 7, 32])
def test_without_joining_no_chunk_crosses_a_document_and_only_full_ones_are_kept(tmp_path, context_length):
    sizes = [len(text.encode()) for text in TEXTS]
    cuts = [sizes[0], sizes[1], 0, 0, sizes[4], -1]
    rows, counts = written(tmp_path, TEXTS, cuts, context_length, join=False)
    ids = [TOKENIZER.encode(text) for text in TEXTS]
    assert rows["train"] == sum((chunks_of(ids[i], context_length) for i in (0, 1, 4)), [])
    assert rows["validation"] == chunks_of(ids[2], context_length)
    assert all(TOKENIZER.end_of_text not in row for row in rows["train"])
    predicted = sum(len(ids[i]) - 1 for i in (0, 1, 4))
    train = counts["train"]
    assert (train.documents, train.chunks) == (3, len(rows["train"]))
    assert train.tokens == len(rows["train"]) * context_length
    assert train.tokens + train.tokens_left_out == predicted
    assert train.longest_document == len(ids[4])
    lengths = TOKENIZER.byte_lengths()
    assert train.bytes == sum(int(lengths[row[1:]].sum()) for row in rows["train"])


@pytest.mark.parametrize("context_length", [1, 7, 32])
def test_joined_documents_are_one_stream_with_the_end_of_text_between_them(tmp_path, context_length):
    sizes = [len(text.encode()) for text in TEXTS]
    rows, counts = written(tmp_path, TEXTS, sizes, context_length, join=True)
    stream = sum(([*TOKENIZER.encode(text), TOKENIZER.end_of_text] for text in TEXTS if text), [])
    assert rows["train"] == chunks_of(stream, context_length)
    assert counts["train"].tokens + counts["train"].tokens_left_out == len(stream) - 1
    assert rows["validation"] == [] and dataclasses.astuple(counts["validation"]) == (0,) * 6


def test_a_cut_document_is_on_both_sides_without_overlap(tmp_path):
    text = script(9, 200)
    size = len(text.encode())
    rows, _ = written(tmp_path, [text], [size * 3 // 4], 1, join=False)
    train, validation = (
        TOKENIZER.decode([rows[split][0][0], *(row[1] for row in rows[split])]) for split in packing.SPLITS
    )
    assert train + validation == text


def test_files_are_closed_where_a_document_breaks_off(tmp_path):
    changed = Document("b.py", 4, functools.partial(io.BytesIO, b"\xff" * 4))
    with pytest.raises(UserError, match="changed while it was read") as _:  # keeps what was on the way
        packing.write_chunks([changed], np.array([4]), TOKENIZER, tmp_path, context_length=2, join_documents=True)
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    assert not [link for link in links if os.path.exists(link) and os.readlink(link).startswith(str(tmp_path))]


def test_text_that_spells_the_end_of_text_is_stored_as_text(tmp_path):
    text = "<|endoftext|>" * 20
    rows, _ = written(tmp_path, [text], [len(text)], 4, join=False)
    assert rows["train"] and TOKENIZER.end_of_text not in sum(rows["train"], [])


def test_ids_are_stored_in_the_narrowest_type_that_holds_them():
    assert packing.token_dtype(TOKENIZER) is np.uint16
    large = dataclasses.make_dataclass("Large", ["vocab_size"])
    assert packing.token_dtype(large(65_536)) is np.uint16
    assert packing.token_dtype(large(65_537)) is np.uint32
