"""The tokenizer of a Hugging Face folder: its tokenizer.json, or the vocab.json and merges.txt of older ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jax_entropy.data import Tokenizer
from jax_entropy.data.tokenizer import END_OF_TEXT, parse_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.huggingface.folder import read_json


def read_tokenizer(directory: Path, vocab_size: int, notify: Callable[[str], None]) -> Tokenizer | None:
    """The tokenizer in a folder whose model has `vocab_size` tokens; None if there is none.

    The token that ends a text is called `<|endoftext|>` here, whatever the folder calls it. A model may have more
    tokens than its tokenizer: tables are padded.

    Raises:
      UserError: it is damaged, changes text, has more tokens than the model, or no end of text.
    """
    text = tokenizer_text(directory)
    if text is None:
        notify(
            f"{directory} has neither tokenizer.json nor vocab.json and merges.txt: the run can be exported, but "
            "neither evaluated nor asked for text"
        )
        return None
    tokenizer = parse_tokenizer(_with_end_of_text(text, directory, notify), f"the tokenizer of {directory}")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer of {directory} has {tokenizer.vocab_size} entries, but the model has "
            f"vocab_size={vocab_size}; put the model's own tokenizer there"
        )
    if tokenizer.vocab_size < vocab_size:
        notify(
            f"the tokenizer of {directory} has {tokenizer.vocab_size:,} entries and the model {vocab_size:,}: the rest "
            "is taken for padding"
        )
    return tokenizer


def tokenizer_text(directory: Path) -> str | None:
    """What a tokenizer.json holds."""
    path, vocabulary, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if path.exists():
            return path.read_text(encoding="utf-8")
        if not (vocabulary.exists() and merges.exists()):
            return None
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"the tokenizer of {directory} cannot be read: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend.to_str()


def _with_end_of_text(text: str, directory: Path, notify: Callable[[str], None]) -> str:
    """The same tokenizer, its end of text renamed where it has another name."""
    try:
        settings = json.loads(text)
        vocabulary, added = settings["model"]["vocab"], settings["added_tokens"]
        names = {token["id"]: token["content"] for token in added} | {i: name for name, i in vocabulary.items()}
        pieces = {
            "".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in settings["model"]["merges"]
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return text  # not a byte-level BPE, which parsing it says
    if END_OF_TEXT in names.values():
        return text
    identifier = _end_identifier(directory, {name: i for i, name in names.items()})
    name = names.get(identifier) if isinstance(identifier, int) else None
    if name is None or name in pieces or len(name) == 1:  # of text, which must stay what it is
        raise UserError(
            f"the tokenizer of {directory} has no {END_OF_TEXT}, and eos_token_id={identifier!r} of its config.json is "
            "no token that can end a text; give there the id of the one that does"
        )
    notify(f"in {directory} {name!r} (id {identifier}) ends a text; here it is called {END_OF_TEXT}")
    vocabulary = {END_OF_TEXT if token == name else token: i for token, i in vocabulary.items()}
    added = [token | {"content": END_OF_TEXT} if token["content"] == name else token for token in added]
    return json.dumps(settings | {"model": settings["model"] | {"vocab": vocabulary}, "added_tokens": added})


def _end_identifier(directory: Path, identifiers: dict[str, int]) -> Any:
    """The id of the token that ends a text, as the model's settings give it, or else the tokenizer's."""
    end = read_json(directory / "config.json").get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if end is None and (directory / name).exists():
            token = read_json(directory / name).get("eos_token")
            end = identifiers.get(str(token.get("content") if isinstance(token, dict) else token))
    return end
