"""From a trained model to one with fewer nonlinearities: what a run takes out little by little while it trains.

On the way, the collection `annealing` says how far each layer has come: its activation gets a slope on the negative
side that rises from 0 to 1, and its LayerNorm, as a frozen norm, a constant in place of each row's deviation. At the
end both are linear, and `settled` leaves a plain model of the config's architecture.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_entropy.architecture import ModelConfig
from jax_entropy.config import model_config


def is_annealed(config: ConfigDict, model: ModelConfig) -> bool:
    """Whether a run takes anything out of its model: statistics of frozen norms, or an activation."""
    return config.anneal.end > 0 and ("frozen" in (model.norm, model.final_norm) or bool(config.anneal.activation))


def trained_model(config: ConfigDict, vocab_size: int) -> ModelConfig:
    """The model that a run trains: the one that its config describes, with the activation that it shall lose.

    Raises:
      UserError: as `model_config` does.
    """
    model = model_config(config, vocab_size)
    takes_out = is_annealed(config, model) and config.anneal.activation
    return dataclasses.replace(model, activation=config.anneal.activation) if takes_out else model


def beginning(config: ConfigDict, model: ModelConfig) -> dict[str, Any]:
    """The collection `annealing` of a model before anything is taken out; amounts and rates are 0.

    Args:
      model: as `trained_model` returns it.
    """

    def norm(kind: str, *layers: int) -> dict[str, jax.Array] | None:
        return {"amount": jnp.zeros(layers), "rate": jnp.zeros(layers)} if kind == "frozen" else None

    tree = {}
    for stack, layers in model.stacks.items():
        with_ffn = stack == "blocks"
        parts = dict(norm1=norm(model.norm, len(layers)), norm2=norm(model.norm, len(layers)) if with_ffn else None)
        if with_ffn and config.anneal.activation:
            parts["ffn"] = {"amount": jnp.zeros(len(layers))}
        tree[stack] = {name: part for name, part in parts.items() if part}
    tree["final_norm"] = norm(model.final_norm)
    return {name: part for name, part in tree.items() if part}


def advanced(tree: dict[str, Any], config: ConfigDict, model: ModelConfig, step: jax.Array) -> dict[str, Any]:
    """The collection with its amounts as they are in the step after `step` steps; the final norm is deepest."""
    options, count = config.anneal, model.num_layers + 1
    begin, end = (share * config.train.num_steps for share in (options.begin, options.end))
    # not the quotient at the end, which need not be 1 once it is rounded
    done = jnp.where(step + 1 >= end, 1.0, jnp.clip((step + 1 - begin) / max(end - begin, 1), 0, 1))
    place = jnp.arange(count) if options.order != "deepest_first" else jnp.arange(count)[::-1]
    amount = jnp.full(count, done) if options.order == "together" else jnp.clip(done * count - place, 0, 1)
    of_stack = {stack: amount[layers.start : layers.stop] for stack, layers in model.stacks.items()}
    of_stack["final_norm"] = amount[model.num_layers]

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        # what is gone stays gone where a run gets a longer schedule
        return jnp.maximum(leaf, of_stack[path[0].key]) if path[-1].key == "amount" else leaf

    return jax.tree_util.tree_map_with_path(one, tree)


def settled(end: ModelConfig, model: ModelConfig, variables: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """A model and its variables without what only the way needed; what is still on the way stays as it is.

    Args:
      end: the model that the config describes.
      model: the one that trains.
    """
    tree = variables.get("annealing")
    if tree is None:
        return model, variables
    amounts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == "amount"]
    if not all(bool(jnp.all(amount == 1)) for amount in amounts):
        return model, variables
    params = _with_rates(variables["params"], tree)
    return end, {name: of for name, of in variables.items() if name != "annealing"} | {"params": params}


def _with_rates(params: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Parameters whose frozen norms' scales hold the rates."""
    changed = dict(params)
    for name, of_part in tree.items():
        if "rate" in of_part:
            scale = params[name]["scale"]
            changed[name] = params[name] | {"scale": scale * of_part["rate"][..., None]}
        elif name != "ffn":
            changed[name] = _with_rates(params[name], of_part)
    return changed
