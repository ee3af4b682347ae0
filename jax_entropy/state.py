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

from jax_entropy import annealing
from jax_entropy.loss import LossParts, loss_fn
from jax_entropy.metrics import entropy_metrics, gradient_norms
from jax_entropy.model import Transformer
from jax_entropy.optimizer import learning_rate_schedule, make_optimizer, qk_clip
from jax_entropy.seeds import random_key
from jax_entropy.sharding import BATCH, batch_sharding, constrain, tree_sharding


class TrainState(NamedTuple):
    """All that a step changes, and the data of the key that its randomness is folded from."""

    step: jax.Array  # optimiser steps done
    params: Any
    collections: Any  # Flax collections beside the parameters: {} or {"spectral": …, "annealing": …, "teacher": …}
    opt_state: Any
    key: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """What `Transformer.apply` takes."""
        return {"params": self.params} | {name: of for name, of in self.collections.items() if name != "teacher"}


def init_state(config: ConfigDict, model: Transformer) -> TrainState:
    """The state before the first step, a function of config.seed alone."""
    init_key, key = jax.random.split(random_key(config.seed))
    variables = dict(model.init(init_key, jnp.zeros((1, 1), jnp.int32)))
    params, collections = variables["params"], initial_collections(config, model, variables)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    return TrainState(jnp.zeros((), jnp.int32), params, collections, optimizer.init(params), jax.random.key_data(key))


def initial_collections(config: ConfigDict, model: Transformer, variables: dict[str, Any]) -> dict[str, Any]:
    """The collections beside the parameters of a run that begins with a model's variables."""
    collections = {name: tree for name, tree in variables.items() if name != "params"}
    if config.anneal.distillation:  # what it begins with is its teacher
        collections["teacher"] = jax.tree.map(jnp.array, variables)  # a copy: the state's own is donated
    if annealing.is_annealed(config, model.config):
        collections["annealing"] = annealing.beginning(config, model.config)
    return collections


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
    also everything in metrics.py, the learning rate, and with QK-clip the logits it saw and its factors [L, N].
    """
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    learning_rate = learning_rate_schedule(config.optimizer, config.train.num_steps)
    weight_of, penalty, accumulate = penalty_schedule(config), config.penalty, config.optimizer.accumulate
    annealed = annealing.is_annealed(config, model.config)

    def loss_of(params, collections, teacher, tokens_BxT1, key, step) -> tuple[jax.Array, LossParts]:
        return loss_fn(
            params,
            constrain(tokens_BxT1, BATCH, None),
            model=model,
            penalty_weight=weight_of(step),
            tolerance=penalty.tolerance,
            reduction=penalty.reduction,
            shape=penalty.shape,
            collections=collections,
            teacher=teacher,
            distillation=config.anneal.distillation,
            distillation_temperature=config.anneal.distillation_temperature,
            dropout_key=key if model.config.embedding_dropout else None,
        )

    def train_step(state: TrainState, tokens, watch: bool) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        kept, collections, teacher = {}, dict(state.collections), None
        if "teacher" in collections:
            kept["teacher"] = collections.pop("teacher")
            teacher = kept["teacher"] | ({"annealing": annealing.beginning(config, model.config)} if annealed else {})
        if annealed:
            collections["annealing"] = annealing.advanced(collections["annealing"], config, model.config, state.step)
        if accumulate == 1:
            (loss, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(
                state.params, collections, teacher, tokens, key, state.step
            )
        else:

            def loss_of_batch(params, collections, tokens_BxT1, index) -> tuple[jax.Array, LossParts]:
                return loss_of(params, collections, teacher, tokens_BxT1, jax.random.fold_in(key, index), state.step)

            gradients, loss, parts = _accumulated(loss_of_batch, state.params, collections, tokens, accumulate)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = dict(
            loss=loss,
            cross_entropy=parts.cross_entropy,
            penalty=parts.penalty,
            gradient_norm=optax.global_norm(gradients),
            not_finite=jnp.sum(~jnp.isfinite(parts.aux.stats.logsumexp), axis=(1, 2, 3)),
        )
        if parts.divergence is not None:
            metrics["divergence"] = parts.divergence
        if watch:
            metrics |= entropy_metrics(parts.aux)
            metrics["gradient_norms"] = gradient_norms(gradients)
            metrics["learning_rate"] = learning_rate(state.step)
        params = optax.apply_updates(state.params, updates)
        if limit := config.optimizer.qk_clip:
            max_logit_LxN = jnp.max(parts.aux.stats.max_logit, axis=(1, 3))
            params, factor_LxN = qk_clip(params, max_logit_LxN, limit)
            if watch:
                metrics["qk_clip"] = factor_LxN
        return TrainState(state.step + 1, params, parts.collections | kept, opt_state, state.key), metrics

    return train_step


def _accumulated(
    loss_of: Callable, params: Any, collections: Any, tokens: jax.Array, accumulate: int
) -> tuple[Any, jax.Array, LossParts]:
    """Mean gradients and losses of A batches, as if they were one; their statistics are joined along the batch axis.

    Args:
      loss_of: loss and parts of the parameters, the collections, a batch and its index.
      collections: of the first batch; each batch hands its own on to the next.
      tokens: of all batches, [B·A, T+1].
      accumulate: A.
    """
    total = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)

    def one(collections, batch):
        index, tokens_BxT1 = batch
        loss, pull_back, parts = jax.vjp(
            lambda params: loss_of(params, collections, tokens_BxT1, index), params, has_aux=True
        )
        # each layer's gradient is added where the sum is: there is no second tree of them
        pull_back.with_refs(total)(jnp.full_like(loss, 1 / accumulate))
        return parts.collections, (loss, parts._replace(collections=None))

    batches = rearrange(tokens, "(B A) T -> A B T", A=accumulate)
    collections, (losses, parts) = jax.lax.scan(one, collections, (jnp.arange(accumulate), batches))
    stats = jax.tree.map(lambda s: rearrange(s, "A L B N T -> L (B A) N T"), parts.aux.stats)
    aux = jax.tree.map(lambda of_batches: of_batches[0], parts.aux)._replace(stats=stats)
    means = jax.tree.map(jnp.mean, (parts.cross_entropy, parts.penalty, parts.divergence))
    gradients = jax.tree.map(jax.freeze, total)
    return gradients, jnp.mean(losses), LossParts(means[0], means[1], aux, collections, means[2])


def new_state(config: ConfigDict, model: Transformer, mesh: Mesh, state_sharding: Any) -> TrainState:
    """`init_state` over a mesh, split by `state_sharding`."""
    initial = jax.jit(functools.partial(init_state, config, model), out_shardings=state_sharding)
    with jax.set_mesh(mesh):
        return initial()


def jit_train_step(config: ConfigDict, model: Transformer, mesh: Mesh, state_sharding: Any) -> Callable:
    """`make_train_step` over a mesh: the state is split by `state_sharding` and donated, metrics are everywhere."""
    return jax.jit(
        make_train_step(config, model),
        static_argnums=2,
        donate_argnums=0,
        in_shardings=(state_sharding, batch_sharding(mesh)),
        out_shardings=(state_sharding, NamedSharding(mesh, PartitionSpec())),
    )
