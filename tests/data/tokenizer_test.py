import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_entropy.data.tokenizer import END_OF_TEXT, _probe, load_tokenizer, train_tokenizer
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
    TOKENIZER.save(tmp_path / "not UTF-8 \udcff.json")
    loaded = load_tokenizer(tmp_path / "not UTF-8 \udcff.json")
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


def test_the_entries_of_a_larger_model_that_are_tokens_are_known(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    settings, V = json.loads((tmp_path / "tokenizer.json").read_text()), TOKENIZER.vocab_size
    settings["model"]["vocab"]["unmerged"] = V + 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    known = load_tokenizer(tmp_path / "tokenizer.json").known(V + 4)
    assert known.tolist() == [True] * V + [False, False, True, False]


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


def test_ids_that_would_fill_the_memory_are_refused(tmp_path):
    def far(settings):
        vocabulary = settings["model"]["vocab"]
        return settings | {"model": settings["model"] | {"vocab": vocabulary | {"zzz": 2**31}}}

    with pytest.raises(UserError, match="has a token of id 2,147,483,648; at most"):
        load_changed(tmp_path, far)


def changed(**parts):
    return lambda settings: {**settings, **parts}


def without_bytes(settings):
    vocabulary = settings["model"]["vocab"]
    kept = {token: i for token, i in vocabulary.items() if token not in "æÄĬ"}  # 0xE6, 0xC4, 0x8A
    merges = [pair for pair in settings["model"]["merges"] if not set("æÄĬ") & set("".join(pair))]
    return settings | {"model": settings["model"] | {"vocab": kept, "merges": merges}}


def with_added(content, **options):
    token = dict(
        id=400, content=content, single_word=False, lstrip=False, rstrip=False, normalized=False, special=False
    )
    return lambda settings: settings | {"added_tokens": settings["added_tokens"] + [token | options]}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
LOSSY = {
    "bytes without a token": (without_bytes, r"3 bytes without a token \(0x8A, …\)"),
    "unk_token": (
        lambda settings: (lost := without_bytes(settings)) | {"model": lost["model"] | {"unk_token": "a"}},
        "model.unk_token='a'",
    ),
    "add_prefix_space": (
        changed(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}),
        "'no space' comes .*' no space'",
    ),
    "NFC": (
        changed(
            normalizer={"type": "NFC"},
            pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT | {"behavior": "Isolated"}, BYTE_LEVEL]},
        ),
        r"e\\u0301 .* look at: normalizer NFC$",
    ),
    "lowercase": (changed(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    "no pre-tokenizer": (changed(pre_tokenizer=None), "no ByteLevel pre_tokenizer"),
    "spaces removed": (
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}),
        "'no space' comes back as 'nospace'; look at: pre_tokenizer Split",
    ),
    "end_of_word_suffix": (
        lambda settings: settings | {"model": settings["model"] | {"end_of_word_suffix": "</w>"}},
        "its model has {'end_of_word_suffix': '</w>'}",
    ),
    "lstrip": (with_added("beta", lstrip=True), "'a  beta  b' comes back as 'abeta  b'; look at: .*of 'beta'"),
    "rstrip": (with_added("beta", rstrip=True), "'a  beta  b' comes back as 'a  betab'; look at: .*of 'beta'"),
    "an added token outside ASCII": (with_added("é"), r"the added token '\\xe9', which is not ASCII"),
    "decoder": (
        changed(
            decoder={
                "type": "Sequence",
                "decoders": [BYTE_LEVEL, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
            }
        ),
        "' one at both ends ' comes back as 'one",
    ),
    "dropout": (
        lambda settings: settings | {"model": settings["model"] | {"dropout": 0.1}},
        "model.dropout=0.1.*; set model.dropout to null",
    ),
}


def load_changed(tmp_path, change):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    settings = change(json.loads((tmp_path / "tokenizer.json").read_text()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    return load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("change, sentence", LOSSY.values(), ids=LOSSY)
def test_tokenizer_that_changes_text_is_refused_and_what_does_it_is_named(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_changed(tmp_path, change)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_the_probe_holds_every_byte_of_utf_8():
    assert {*range(256)} - set("".join(_probe(())).encode()) == {0xC0, 0xC1, *range(0xF5, 0x100)}


SPLIT_DIGITS = {"type": "Split", "pattern": {"Regex": r"\d{1,3}"}, "behavior": "Isolated", "invert": False}
LOSSLESS = {
    "special tokens that strip": with_added("<mask>", lstrip=True, special=True),
    "added tokens": with_added("    "),
    "digits split": changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT_DIGITS, BYTE_LEVEL]}),
    "unk_token that is never needed": lambda settings: (
        settings | {"model": settings["model"] | {"unk_token": END_OF_TEXT}}
    ),
    "byte-level normalizer": changed(normalizer={"type": "ByteLevel"}, pre_tokenizer=None),
}


@pytest.mark.parametrize("change", LOSSLESS.values(), ids=LOSSLESS)
def test_tokenizer_of_another_making_is_read_where_text_comes_back(tmp_path, change):
    tokenizer = load_changed(tmp_path, change)
    for text in ("".join(TEXTS), "a <mask>  b     c 12345\r\n", END_OF_TEXT):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_what_no_probe_finds_the_text_itself_does(tmp_path):
    replace = {"type": "Replace", "pattern": {"String": "epsilon"}, "content": "eps"}
    tokenizer = load_changed(tmp_path, changed(normalizer=replace))
    assert tokenizer.decode(tokenizer.encode("delta")) == "delta"
    sentence = "the tokenizer changes text: 'elta epsilon' comes back as 'elta eps'"
    with pytest.raises(UserError, match=sentence):
        tokenizer.encode("a delta epsilon")
    with pytest.raises(UserError, match=sentence):
        list(tokenizer.encode_stream([(0, "delta"), (1, "a delta epsilon")]))


def test_missing_tokenizer_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "no.json")
    with pytest.raises(UserError, match="is a folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path / "binary.json")
