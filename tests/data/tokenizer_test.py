import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_entropy.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from jax_entropy.errors import UserError
from tests.data.helpers import script

TEXTS = [script(i) for i in range(10)]
TOKENIZER = train_tokenizer(TEXTS, 400)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
AWKWARD = st.lists(st.sampled_from([END_OF_TEXT, "<|", "\r\n", "\n\n", " ", "\0", "\ufeff", "é", "e\u0301", "𝄞", "x"]))


@given(st.one_of(UNICODE, AWKWARD.map("".join)))
def test_any_text_comes_back_unchanged_and_never_holds_the_end_of_text(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.end_of_text not in ids
    assert TOKENIZER.byte_lengths()[ids].sum() == len(text.encode())


@given(st.binary())
def test_any_bytes_read_as_latin_1_come_back(data):
    assert TOKENIZER.decode(TOKENIZER.encode(data.decode("latin-1"))).encode("latin-1") == data


def test_every_token_has_its_length_and_every_byte_a_token():
    lengths = TOKENIZER.byte_lengths()
    assert lengths.dtype == np.int32 and lengths.shape == (TOKENIZER.vocab_size,)
    assert lengths[TOKENIZER.end_of_text] == 0
    assert np.delete(lengths, TOKENIZER.end_of_text).min() == 1
    assert (lengths == 1).sum() == 256


def test_training_is_deterministic_and_saving_loses_nothing(tmp_path):
    again = train_tokenizer(iter(TEXTS), 400)
    assert again.digest() == TOKENIZER.digest()
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.digest() == TOKENIZER.digest()
    text = f"a {END_OF_TEXT} b"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.end_of_text not in loaded.encode(text)
    assert loaded.decode([loaded.end_of_text]) == END_OF_TEXT


def test_end_of_text_in_the_training_text_is_only_text():
    tokenizer = train_tokenizer([END_OF_TEXT * 50] * 20, 300)
    assert tokenizer.end_of_text not in tokenizer.encode(END_OF_TEXT * 3)
    assert tokenizer.decode(tokenizer.encode(END_OF_TEXT * 3)) == END_OF_TEXT * 3


def test_stream_gives_the_ids_of_each_text_in_order_with_its_label():
    items = [(i, text) for i, text in enumerate([*TEXTS, "", END_OF_TEXT])]
    assert list(TOKENIZER.encode_stream(items)) == [(i, TOKENIZER.encode(text)) for i, text in items]


def test_stream_is_read_a_batch_at_a_time(monkeypatch):
    monkeypatch.setattr("jax_entropy.data.tokenizer._BATCH_CHARACTERS", 10)
    taken = []
    stream = TOKENIZER.encode_stream((taken.append(i), "abcdef") for i in range(100))
    next(stream)
    assert len(taken) == 2


def test_small_corpus_gives_fewer_tokens_than_asked():
    tokenizer = train_tokenizer(["ab ab"], 4096)
    assert 257 <= tokenizer.vocab_size < 300


@pytest.mark.parametrize("letters", ["abcdefgh", "(){}[]+-", "αβγδ", "01234567"])
def test_only_the_head_of_an_unbroken_run_is_trained_on(letters):
    run = "".join(random.Random(0).choices(letters, k=2000))
    tokenizer = train_tokenizer([f"x = {run}\n"] * 2, 400)
    assert tokenizer.digest() == train_tokenizer([f"x = {run[:256]}\n"] * 2, 400).digest()
    assert tokenizer.decode(tokenizer.encode(run)) == run


def test_settings_of_a_foreign_file_do_not_cut_pad_or_wrap_documents(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    settings["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END_OF_TEXT,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert list(loaded.encode_stream([(0, "a")])) == [(0, TOKENIZER.encode("a"))]


def test_end_of_text_that_was_an_ordinary_token_becomes_special(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.end_of_text == TOKENIZER.end_of_text
    assert loaded.encode(f"a{END_OF_TEXT}b") == TOKENIZER.encode(f"a{END_OF_TEXT}b")


@pytest.mark.parametrize("text", ["\ud800", "a\udcff"])
def test_text_that_is_not_unicode_is_the_users_mistake(text):
    with pytest.raises(UserError, match="not valid Unicode"):
        TOKENIZER.encode(text)


def test_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="config.data.vocab_size=256 is too small.*257"):
        train_tokenizer(TEXTS, 256)


def damage(settings, key, value):
    return json.dumps(settings | {key: value})


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda settings: "", "damaged"),
        (lambda settings: "{}", "damaged"),
        (lambda settings: "[1, 2]", "damaged"),
        (lambda settings: json.dumps(settings)[:1000], "damaged"),
        (lambda settings: damage(settings, "decoder", None), "not byte-level BPE"),
        (lambda settings: damage(settings, "added_tokens", []).replace(f'"{END_OF_TEXT}"', '"<s>"'), "has no <|endof"),
    ],
)
def test_unusable_tokenizer_file_is_one_sentence_that_names_it(tmp_path, change, sentence):
    TOKENIZER.save(tmp_path / "good.json")
    path = tmp_path / "bad.json"
    path.write_text(change(json.loads((tmp_path / "good.json").read_text())))
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value) and sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_tokenizer_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "no.json")
    with pytest.raises(UserError, match="is a folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path / "binary.json")
