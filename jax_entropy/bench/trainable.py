"""What the benchmarks time: a model, its initial state and its training step, on one device."""

import functools
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from jax_entropy.annealing import trained_model
from jax_entropy.model import Transformer
from jax_entropy.state import TrainState, init_state, make_train_step


def trainable(config: ConfigDict, vocab_size: int) -> tuple[Transformer, TrainState, Callable]:
    """A config's model, its initial state and its jitted training step, which donates the state."""
    model = Transformer(trained_model(config, vocab_size))
    state = jax.jit(functools.partial(init_state, config, model))()
    return model, state, jax.jit(make_train_step(config, model), static_argnums=2, donate_argnums=0)
