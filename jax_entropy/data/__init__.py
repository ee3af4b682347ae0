"""From text to batches: sources, tokenizer, prepared corpus, loader.

`prepare` makes a corpus or finds the one made before; `train_iterator` and `validation_batches` read it.
"""

from jax_entropy.data.corpus import Corpus, prepare
from jax_entropy.data.pipeline import train_iterator, validation_batches
from jax_entropy.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Corpus", "Tokenizer", "load_tokenizer", "prepare", "train_iterator", "validation_batches"]
