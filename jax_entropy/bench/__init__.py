"""Measurements that a person starts: attention, whole steps beside PyTorch's, feeding, and monitoring.

Each warms up, waits for its results, takes turns between contenders and reports medians and ratios of one run.
"""

import functools
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from jax_entropy.config import check, model_config
from jax_entropy.data import Corpus, prepare, train_iterator
from jax_entropy.model import Transformer
from jax_entropy.state import TrainState, init_state, make_train_step


def started(config: ConfigDict) -> tuple[Corpus, TrainState, Callable, Iterator]:
    """A config's corpus, initial state, jitted training step and batches, on one device."""
    check(config)
    corpus = prepare(config.data, config.model.context_length)
    model = Transformer(model_config(config, corpus.tokenizer.vocab_size))
    state = jax.jit(functools.partial(init_state, config, model))()
    train_step = jax.jit(make_train_step(config, model), static_argnums=2, donate_argnums=0)
    batch_size = config.train.batch_size * config.optimizer.accumulate
    return corpus, state, train_step, train_iterator(corpus, batch_size=batch_size, seed=0)
