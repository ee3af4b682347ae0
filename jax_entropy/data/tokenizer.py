"""Byte-level BPE: any text goes in and comes out unchanged, and only the program itself can write the end of text.

Trained on the spot by Hugging Face `tokenizers`, or read from an existing `tokenizer.json` of GPT-2's kind.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Said once, here: the library otherwise warns at every fork of the process.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jax_entropy.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_BATCH_CHARACTERS, _BATCH_TEXTS = 1 << 21, 1 << 14
_LONG_RUN = re.compile(r"\w{256,}|[^\w\s]{256,}|\s{256,}")


class Tokenizer:
    """A byte-level BPE tokenizer.

    Attributes:
      vocab_size: V, one more than the largest id.
      end_of_text: id of `<|endoftext|>`; text that contains these characters does not encode to it.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        # None of these may come from the file: the first is never saved, the others would cut or pad documents.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.end_of_text = backend.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; raises UserError if it is not valid Unicode (lone surrogates)."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise UserError(f"text is not valid Unicode: {ascii(text[:40])}") from None

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
        return ((label, encoding.ids) for (label, _), encoding in zip(items, encodings))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        """Returns int32 [V], the bytes of UTF-8 that each token stands for; special tokens and unused ids have none."""
        added = self._backend.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i not in added:
                lengths[i] = len(token)  # the byte-level alphabet has one character a byte
            elif not added[i].special:
                lengths[i] = len(token.encode())
        return lengths

    def digest(self) -> str:
        """Returns the SHA-256 of what `save` writes."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def save(self, path: str | os.PathLike):
        """Writes a `tokenizer.json` that `load_tokenizer` and Hugging Face read."""
        self._backend.save(str(path))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE whose id 0 is the end of text.

    Args:
      texts: training text, read once.
      vocab_size: largest V; a small corpus gives fewer tokens.

    Raises:
      UserError: `vocab_size` is below 257, the 256 bytes and the end of text.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(
            f"config.data.vocab_size={vocab_size} is too small: byte-level BPE needs {len(alphabet) + 1} or more, "
            "256 bytes and the end of text"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # An unbroken run of a million letters is one "word" and would be trained on for minutes.
    backend.train_from_iterator((_LONG_RUN.sub(lambda run: run[0][:256], text) for text in texts), trainer)
    return Tokenizer(backend)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
      UserError: the file is missing, damaged, not byte-level BPE, or lacks `<|endoftext|>`.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"tokenizer {str(path)!r} is a folder; name the tokenizer.json in it")
    if not path.is_file():
        raise UserError(f"tokenizer {str(path)!r} does not exist; name a tokenizer.json, or nothing to train one")
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text)
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {str(path)!r} is damaged or not a tokenizer.json ({error})") from error
    if settings["model"].get("type", "BPE") != "BPE" or '"ByteLevel"' not in json.dumps(settings.get("decoder")):
        raise UserError(f"tokenizer {str(path)!r} is not byte-level BPE; use one of GPT-2's kind")
    if backend.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"tokenizer {str(path)!r} has no {END_OF_TEXT}; add it to the file's added_tokens as special")
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)
