"""Byte-level BPE: any text goes in and comes out unchanged, and only the program itself can write the end of text.

Trained on the spot by Hugging Face `tokenizers`, or read from an existing `tokenizer.json` of GPT-2's kind. A file that
loses or changes text is refused, and every text that is encoded is held to its bytes.
"""

import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Two cores encode 1.5 times as fast as one. Where nothing is said, the library warns at every fork of the process.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import tokenizers
from ml_collections import ConfigDict
from tokenizers import decoders, models, pre_tokenizers, trainers

from jax_entropy.errors import UserError
from jax_entropy.paths import local_path, reading

END_OF_TEXT = "<|endoftext|>"
_MOST_IDS = 1 << 20  # four times the largest vocabulary in use; tables and embeddings have a row for each
_AFFIXES = ("end_of_word_suffix", "continuing_subword_prefix")
_BATCH_CHARACTERS, _BATCH_TEXTS = 1 << 21, 1 << 14
_LONG_RUN = re.compile(r"\w{256,}|[^\w\s]{256,}|\s{256,}")


class Tokenizer:
    """A byte-level BPE tokenizer.

    Attributes:
      vocab_size: V, one more than the largest id.
      end_of_text: id of `<|endoftext|>`; text that contains these characters does not encode to it.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # no file holds that
        self._backend = backend
        self._ids = np.array([*backend.get_vocab().values()])
        self._bytes = _token_bytes(backend)
        self.vocab_size = len(self._bytes)
        self.end_of_text = backend.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`.

        Raises:
          UserError: it is not valid Unicode (lone surrogates).
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise UserError(f"text is not valid Unicode: {text[:40]!a}") from None
        self._check_unchanged(text, ids)
        return ids

    def encode_stream(self, texts: Iterable[tuple[Any, str]]) -> Iterator[tuple[Any, list[int]]]:
        """Yields (label, ids) for each (label, text) in order, encoding two mebibytes at a time on all cores."""
        batch, characters = [], 0
        for item in texts:
            batch.append(item)
            characters += len(item[1])
            if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_TEXTS:
                yield from self._encode_batch(batch)
                batch, characters = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, items: list[tuple[Any, str]]) -> Iterator[tuple[Any, list[int]]]:
        encodings = self._backend.encode_batch_fast([text for _, text in items], add_special_tokens=False)
        for (label, text), encoding in zip(items, encodings, strict=True):
            self._check_unchanged(text, ids := encoding.ids)
            yield label, ids

    def _check_unchanged(self, text: str, ids: list[int]) -> None:
        # What a probe cannot find, the text itself does, for a thirtieth of the time that encoding takes.
        survived = b"".join(map(self._bytes.__getitem__, ids))
        if survived != text.encode():
            raise UserError(f"the tokenizer changes text: {_difference(text, survived.decode(errors='replace'))}")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each id adds; a character of several tokens belongs to the one that completes it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(self._bytes[i]) if self._bytes[i] else self.decode([i]) for i in map(int, ids)]

    def known(self, vocab_size: int) -> np.ndarray:
        """Which entries of a model are tokens, bool [vocab_size]: tables may be padded, and ids left out."""
        return np.isin(np.arange(vocab_size), self._ids)

    def byte_lengths(self) -> np.ndarray:
        """The bytes of UTF-8 that each token stands for, int32 [V]; special tokens and unused ids have none."""
        return np.array([len(token) for token in self._bytes], np.int32)

    def digest(self) -> str:
        """The SHA-256 of what `save` writes."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `tokenizer.json` that `load_tokenizer` and Hugging Face read."""
        Path(path).write_text(self._backend.to_str(pretty=True), "utf-8")  # a path of any bytes


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE whose id 0 is the end of text.

    Args:
      texts: training text, read once.
      vocab_size: largest V, 257 or more (the bytes and the end of text); a small corpus gives fewer tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # An unbroken run of a million letters is one "word" and would be trained on for minutes.
    backend.train_from_iterator((_LONG_RUN.sub(lambda run: run[0][:256], text) for text in texts), trainer)
    return Tokenizer(backend)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
      UserError: the file is missing, damaged, not byte-level BPE, changes text, or lacks `<|endoftext|>`.
    """
    path = local_path(path, "tokenizer")
    name = f"tokenizer {str(path)!r}"
    with reading(path, "tokenizer"):
        if path.is_dir():
            raise UserError(f"{name} is a folder; name the tokenizer.json in it")
        if not path.is_file():
            raise UserError(f"{name} does not exist; name a tokenizer.json, or nothing to train one")
        return parse_tokenizer(path.read_bytes(), name)


def read_backend(text: str) -> tokenizers.Tokenizer:
    """The library's tokenizer, of any kind, from a tokenizer.json, whose truncation and padding are not for documents.

    Raises:
      Exception: it is none.
    """
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return backend


def parse_tokenizer(text: str | bytes, name: str) -> Tokenizer:
    """As `load_tokenizer`, from the content of such a file; errors call it `name`."""
    try:
        text = text if isinstance(text, str) else text.decode()
        settings = json.loads(text)
        affixes = {field: affix for field in _AFFIXES if (affix := settings["model"].get(field))}
        # With an affix the library cuts characters in two, and can end the process.
        backend = None if affixes else read_backend(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{name} is damaged or not a tokenizer.json ({type(error).__name__}: {error})") from error
    if affixes:
        raise UserError(f"{name} is not byte-level BPE: its model has {affixes}; use one of GPT-2's kind")
    if settings["model"].get("type", "BPE") != "BPE" or '"ByteLevel"' not in json.dumps(settings.get("decoder")):
        raise UserError(f"{name} is not byte-level BPE; use one of GPT-2's kind")
    if backend.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"{name} has no {END_OF_TEXT}; add it to the file's added_tokens as special")
    if dropout := settings["model"].get("dropout"):
        raise UserError(f"{name} gives one text many encodings (model.dropout={dropout}); set model.dropout to null")
    if (largest := max(backend.get_vocab().values())) >= _MOST_IDS:
        raise UserError(f"{name} has a token of id {largest:,}; at most {_MOST_IDS:,} ids can be used")
    backend.add_special_tokens([END_OF_TEXT])
    tokenizer = Tokenizer(backend)
    for text in _probe(token["content"] for token in settings.get("added_tokens", ())):
        back = tokenizer.decode(backend.encode(text, add_special_tokens=False).ids)
        if back != text:
            suspects = ", ".join(_suspects(settings)) or "its added_tokens and decoder"
            raise UserError(f"{name} changes text: {_difference(text, back)}; look at: {suspects}")
    return tokenizer


def _token_bytes(backend: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes that each id stands for; special tokens and unused ids have none."""
    vocabulary, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
    table = [b""] * (1 + max(vocabulary.values()))
    for token, i in vocabulary.items():
        if i not in added and _BYTES.keys() >= set(token):
            table[i] = bytes(_BYTES[character] for character in token)
        elif i not in added or not added[i].special:
            table[i] = token.encode()
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: the character that stands for each byte is its own where that can be printed, else the next of 256…"""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()
# one character of each first byte of UTF-8, and with them each following byte
_CHARACTERS = "".join(map(chr, (*range(0x801), *range(0x1000, 0xD001, 0x1000), *range(0xE000, 0x110000, 0x1000))))
_AWKWARD = (
    "no space", " one at both ends ", "two  spaces", "\ttab", "CR LF\r\n\r\nLF\n\n", "NUL\0", "\ufeffBOM", "\ufffd",
    "It's UPPER 1234567", "e\u0301 é ﬁ ﷺ Å", "👩🏽‍💻🇸🇪", END_OF_TEXT, f"a {END_OF_TEXT} b",
    "x" * 5000, " " * 5000 + ".",
)  # fmt: skip


def _probe(added_tokens: Iterable[str]) -> Iterator[str]:
    """Texts that tokenizers are known to change, the shortest first, then every byte that text can hold."""
    yield from _AWKWARD
    yield from (f"a  {token}  b" for token in added_tokens)
    yield _CHARACTERS


def _difference(before: str, after: str) -> str:
    pairs = enumerate(itertools.zip_longest(before, after))
    start = max(0, next(i for i, (old, new) in pairs if old != new) - 8)
    return f"{before[start : start + 24]!a} comes back as {after[start : start + 24]!a}"


def _suspects(settings: dict[str, Any]) -> Iterator[str]:
    """The settings of a tokenizer.json that can change text."""
    model = settings["model"]
    needed = {character for character, byte in _BYTES.items() if byte in _CHARACTERS.encode()}
    if missing := sorted(_BYTES[character] for character in needed - model["vocab"].keys()):
        yield f"{len(missing)} bytes without a token (0x{missing[0]:02X}{', …' if missing[1:] else ''})"
    if unk_token := model.get("unk_token"):
        yield f"model.unk_token={unk_token!r}"
    if normalizer := settings.get("normalizer"):
        yield f"normalizer {normalizer['type']}"
    pre_tokenizer = settings.get("pre_tokenizer") or {"pretokenizers": []}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not any(step["type"] == "ByteLevel" for step in steps):
        yield "no ByteLevel pre_tokenizer"
    for step in steps:
        if step.get("add_prefix_space"):
            yield f"add_prefix_space of its {step['type']}"
        elif step["type"] not in ("ByteLevel", "Digits") and step.get("behavior", "Removed") == "Removed":
            yield f"pre_tokenizer {step['type']}"
    for token in settings.get("added_tokens", ()):
        if token.get("special"):  # none of these is looked for in text
            continue
        if token.get("lstrip") or token.get("rstrip"):
            yield f"lstrip or rstrip of {token['content']!r}"
        if not token["content"].isascii():  # it is matched as it is, and decoded as if its characters were bytes
            yield f"the added token {token['content']!a}, which is not ASCII"


def vocabulary(config: ConfigDict) -> int:
    """The entries that a run of `config` will have: its model's, else those of its tokenizer, given or to be trained.

    Raises:
      UserError: the tokenizer that the config names cannot be used.
    """
    if config.model.vocab_size:
        return config.model.vocab_size
    return load_tokenizer(config.data.tokenizer).vocab_size if config.data.tokenizer else config.data.vocab_size
