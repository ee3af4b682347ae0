"""The state of training and one step of it: pure functions of the state, to be jitted over a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_entropy.loss import LossParts, loss_fn
from jax_entropy.metrics import entropy_metrics, gradient_norms
from jax_entropy.model import Transformer
from jax_entropy.optimizer import learning_rate_schedule, make_optimizer
from jax_entropy.seeds import random_key
from jax_entropy.sharding import BATCH, batch_sharding, constrain, tree_sharding


class TrainState(NamedTuple):
    """All that a step changes, and the data of the key that its randomness is folded from."""

    step: jax.Array  # optimiser steps done
    params: Any
    collections: Any  # Flax collections beside the parameters: {} or {"spectral": …}
    opt_state: Any
    key: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """What `Transformer.apply` takes."""
        return {"params": self.params, **self.collections}


def init_state(config: ConfigDict, model: Transformer) -> TrainState:
    """The state before the first step, a function of config.seed alone."""
    init_key, key = jax.random.split(random_key(config.seed))
    collections = dict(model.init(init_key, jnp.zeros((1, 1), jnp.int32)))
    params = collections.pop("params")
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    return TrainState(jnp.zeros((), jnp.int32), params, collections, optimizer.init(params), jax.random.key_data(key))


def abstract_state(config: ConfigDict, model: Transformer, mesh: Mesh | None = None) -> TrainState:
    """Shapes and types of `init_state`, with their shardings over a mesh; nothing is computed."""
    state = jax.eval_shape(functools.partial(init_state, config, model))
    if mesh is None:
        return state
    shardings = tree_sharding(state, mesh, config.mesh.rules)
    return jax.tree.map(lambda x, split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), state, shardings)


def penalty_schedule(config: ConfigDict) -> optax.Schedule:
    """λ over the steps: constant, or rising linearly from 0 over the share config.penalty.warmup of them."""
    weight, warmup = config.penalty.weight, round(config.penalty.warmup * config.train.num_steps)
    return optax.linear_schedule(0, weight, warmup) if warmup else optax.constant_schedule(weight)


def make_train_step(config: ConfigDict, model: Transformer) -> Callable:
    """Returns `train_step(state, tokens [A·B, T+1], watch) -> (state, metrics)`; A batches accumulate in one update.

    `metrics` holds loss, cross_entropy, penalty, gradient_norm and the non-finite counts [L]; with `watch` (static)
    also everything in metrics.py, and the learning rate.
    """
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    learning_rate = learning_rate_schedule(config.optimizer, config.train.num_steps)
    weight_of, penalty, accumulate = penalty_schedule(config), config.penalty, config.optimizer.accumulate

    def gradients_of(params, collections, tokens_BxT1, key, step) -> tuple[Any, jax.Array, LossParts]:
        (loss, parts), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            params,
            constrain(tokens_BxT1, BATCH, None),
            model=model,
            penalty_weight=weight_of(step),
            tolerance=penalty.tolerance,
            reduction=penalty.reduction,
            shape=penalty.shape,
            collections=collections,
            dropout_key=key if model.config.embedding_dropout else None,
        )
        return gradients, loss, parts

    def accumulated(state: TrainState, tokens, key):
        """Mean gradients over A batches; their statistics are joined along the batch axis."""

        def one(carry, batch):
            index, tokens_BxT1 = batch
            total, collections = carry
            gradients, loss, parts = gradients_of(
                state.params, collections, tokens_BxT1, jax.random.fold_in(key, index), state.step
            )
            total = jax.tree.map(lambda sum_, g: sum_ + g / accumulate, total, gradients)
            return (total, parts.collections), (loss, parts._replace(collections=None))

        batches = rearrange(tokens, "(B A) T -> A B T", A=accumulate)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (gradients, collections), (losses, parts) = jax.lax.scan(
            one, (zeros, state.collections), (jnp.arange(accumulate), batches)
        )
        stats = jax.tree.map(lambda s: rearrange(s, "A L B N T -> L (B A) N T"), parts.aux.stats)
        aux = jax.tree.map(lambda of_batches: of_batches[0], parts.aux)._replace(stats=stats)
        means = jnp.mean(losses), LossParts(jnp.mean(parts.cross_entropy), jnp.mean(parts.penalty), aux, collections)
        return gradients, *means

    def train_step(state: TrainState, tokens, watch: bool) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if accumulate == 1:
            gradients, loss, parts = gradients_of(state.params, state.collections, tokens, key, state.step)
        else:
            gradients, loss, parts = accumulated(state, tokens, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = dict(
            loss=loss,
            cross_entropy=parts.cross_entropy,
            penalty=parts.penalty,
            gradient_norm=optax.global_norm(gradients),
            not_finite=jnp.sum(~jnp.isfinite(parts.aux.stats.logsumexp), axis=(1, 2, 3)),
        )
        if watch:
            metrics |= entropy_metrics(parts.aux)
            metrics["gradient_norms"] = gradient_norms(gradients)
            metrics["learning_rate"] = learning_rate(state.step)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, parts.collections, opt_state, state.key), metrics

    return train_step


def jit_train_step(config: ConfigDict, model: Transformer, mesh: Mesh, state_sharding: Any) -> Callable:
    """`make_train_step` over a mesh: the state is split by `state_sharding` and donated, metrics are everywhere."""
    return jax.jit(
        make_train_step(config, model),
        static_argnums=2,
        donate_argnums=0,
        in_shardings=(state_sharding, batch_sharding(mesh)),
        out_shardings=(state_sharding, NamedSharding(mesh, PartitionSpec())),
    )
