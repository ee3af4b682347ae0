"""Our own models as safetensors: every architecture, every value to the bit, and a loader that gives both back.

Names are the paths in the tree of variables, joined by "/", as "params/blocks/attention/query/kernel".
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError, nearest
from jax_entropy.huggingface.folder import WEIGHTS, check_variables, read_json, write_folder
from jax_entropy.model import Transformer
from jax_entropy.paths import local_path, reading

MODEL_TYPE = "jax_entropy"
_ON_ITS_WAY = "annealing/"  # what a run has that still takes nonlinearities out


def to_safetensors(config: ModelConfig, variables: dict[str, Any], directory: str | os.PathLike) -> None:
    """Writes config.json, the fields of `ModelConfig`, and model.safetensors, which `from_safetensors` reads.

    Args:
      variables: of `Transformer(config)`, all collections.
      directory: made if it is not there; a model that `to_safetensors` wrote there is replaced.
    Raises:
      UserError: the variables are another config's, or the folder is something else's or cannot be written.
    """
    check_variables(config, variables)
    directory = local_path(directory, "directory")
    tensors = {name: np.asarray(value) for name, value in _by_name(variables)}
    _check_tensors(tensors, config, "the variables have")
    fields = dict(architecture=str(config), **dataclasses.asdict(config))
    write_folder(directory, dict(model_type=MODEL_TYPE, **fields), tensors)


def from_safetensors(directory: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads what `to_safetensors` wrote.

    Returns:
      (config, variables) for `Transformer(config).apply`.
    Raises:
      UserError: the folder is not of this kind, or a part is missing or damaged.
    """
    directory = local_path(directory, "directory")
    config = read_model_config(directory)
    try:
        with reading(directory / WEIGHTS):
            tensors = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{directory / WEIGHTS} is damaged: {error}") from None
    shapes = _check_tensors(tensors, config, f"{directory / WEIGHTS} has")
    leaves = [jnp.asarray(tensors.pop(name)) for name, _ in _by_name(shapes)]
    variables = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return config, variables | jax.tree.map(jnp.asarray, unflatten_dict(tensors, sep="/"))


def _check_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig, have: str) -> Any:
    """The shapes of a model's variables, which the tensors are checked to have.

    Args:
      have: the beginning of a sentence on what they have.
    Raises:
      UserError: one is missing, of another shape, or of no such model.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    expected = {name: list(leaf.shape) for name, leaf in _by_name(shapes)}
    for name, shape in expected.items():
        found = list(tensors[name].shape) if name in tensors else "nothing"
        if found != shape:
            raise UserError(f"{have} {found} for {name}, but {config} of this size has {shape}")
    for name in tensors:
        if name not in expected and not name.startswith(_ON_ITS_WAY):
            raise UserError(f"{have} the tensor {name!r}, which is no part of {config}")
    return shapes


def _by_name(tree: Any) -> list[tuple[str, Any]]:
    # flatten_dict stops at the pairs of singular vectors, which are tuples
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def read_model_config(directory: Path) -> ModelConfig:
    """The model that a folder's config.json describes.

    Raises:
      UserError: it is not of this kind, or has what no model has here.
    """
    path = directory / "config.json"
    stored = read_json(path)
    if (kind := stored.pop("model_type", None)) != MODEL_TYPE:
        raise UserError(f"{path} describes model_type={kind!r}, which is not a folder of to_safetensors")
    stored.pop("architecture", None)  # for people
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in stored:
        if name not in known:
            raise UserError(f"{path} has the field {name!r}, which no model has here{nearest(name, known)}")
    try:
        return ModelConfig(**stored)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None
