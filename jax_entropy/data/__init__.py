"""From text to batches: sources, tokenizer, prepared corpus, loader.

`prepare` makes a corpus or finds the one made before; `train_iterator` and `validation_batches` read it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_entropy.data.corpus import Corpus, prepare
    from jax_entropy.data.pipeline import train_iterator, validation_batches
    from jax_entropy.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Corpus", "Tokenizer", "load_tokenizer", "prepare", "train_iterator", "validation_batches"]

_MODULES = dict(
    Corpus="corpus",
    Tokenizer="tokenizer",
    load_tokenizer="tokenizer",
    prepare="corpus",
    train_iterator="pipeline",
    validation_batches="pipeline",
)


def __getattr__(name: str) -> Any:
    # TFDS and Grain take seconds to import; who asks for the names of sources, or for a tokenizer, need not wait.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
