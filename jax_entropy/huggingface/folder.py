"""Models in Hugging Face's folders, in and out: a config.json and safetensors, never pickle.

Every value is exact to the bit; what a family or this package cannot express is refused by name.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_entropy.architecture import ModelConfig, check_model
from jax_entropy.errors import UserError, check_number, nearest, spelled
from jax_entropy.huggingface.family import Family
from jax_entropy.huggingface.gpt2 import GPT2
from jax_entropy.model import Transformer
from jax_entropy.paths import local_path, replacing

_FAMILIES = (GPT2,)
EXACT_TYPES = ("F32", "F16", "BF16")  # what float32 holds without rounding
WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def from_huggingface(directory: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a GPT-2 folder: config.json and model.safetensors, whole or in shards with their index.

    Args:
      directory: local folder; names of tensors may start with "transformer." or not.
    Returns:
      (config, {"params": float32 arrays}) for `Transformer(config).apply`; dropout inside blocks is left behind.
    Raises:
      UserError: another architecture, a variant of GPT-2 that computes something else, pickled weights only, or a
        missing, damaged or superfluous part.
    """
    directory = local_path(directory, "directory")
    if not directory.is_dir():
        raise UserError(f"{directory} is no folder; name a local one that holds config.json and {WEIGHTS}")
    family, config = read_config(directory)
    tensors = _read_tensors(family, weight_files(directory))
    _check_tensors(directory, tensors, family.shapes(config))
    params = {leaf: tensors.pop(name) for name, leaf in family.tensors.items()}
    for name, leaves in family.block_tensors.items():
        blocks = (family.block_prefix.format(layer) for layer in range(config.num_layers))
        stacked = np.stack([tensors.pop(f"{block}{name}") for block in blocks])
        params |= zip(leaves, np.split(stacked, len(leaves), axis=-1), strict=True)
    shapes = _leaf_shapes(config)
    params = {leaf: jnp.asarray(value.reshape(shapes[leaf])) for leaf, value in params.items()}
    return config, {"params": unflatten_dict(params, sep="/")}


def to_huggingface(
    config: ModelConfig, variables: dict[str, Any], directory: str | os.PathLike, end_of_text: int | None = None
) -> None:
    """Writes a folder that `transformers.GPT2LMHeadModel.from_pretrained` and `from_huggingface` read.

    Biases that the model does not have are written as zeros.

    Args:
      variables: {"params": …} of `Transformer(config)`.
      directory: made if it is not there; a GPT-2 that lies in it is replaced.
      end_of_text: id of the token at which transformers' `generate` ends.
    Raises:
      UserError: GPT-2 cannot express a field of the config, the variables are another config's, or the folder is
        something else's or cannot be written.
    """
    check_variables(config, variables)
    directory = local_path(directory, "directory")
    if end_of_text is not None:
        check_number("end_of_text", end_of_text, 0)
        if end_of_text >= config.vocab_size:
            raise UserError(
                f"end_of_text={end_of_text} is beyond the vocabulary, which ends at {config.vocab_size - 1}"
            )
    check_expressible(config)
    params = _read_variables(config, variables)
    for leaf, shape in _leaf_shapes(dataclasses.replace(config, bias=GPT2.fields["bias"])).items():
        params.setdefault(leaf, np.zeros(shape, np.float32))
    tensors = {name: params[leaf] for name, leaf in GPT2.tensors.items()}
    shapes = GPT2.shapes(config)
    for layer in range(config.num_layers):
        for name, leaves in GPT2.block_tensors.items():
            name = GPT2.block_prefix.format(layer) + name
            parts = [params[leaf][layer].reshape(*shapes[name][:-1], -1) for leaf in leaves]
            tensors[name] = np.concatenate(parts, axis=-1)
    tensors = {GPT2.tensor_prefix + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_folder(directory, _config_json(config, end_of_text), tensors)


def check_variables(config: ModelConfig, variables: dict[str, Any]) -> None:
    """Checks that these are a model's config and variables, whatever their shapes.

    Raises:
      UserError: they are something else.
    """
    check_model(config)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise UserError(
            f'variables={spelled(variables)} must be a mapping with "params", as Transformer(config) has them'
        )


def check_expressible(config: ModelConfig) -> None:
    """Checks that GPT-2 can express a config.

    Raises:
      UserError: names the first field that has no place in GPT-2.
    """
    for name, value in GPT2.fixed_fields.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{name}={getattr(config, name)!r} of {config} has no place in GPT-2, only {value!r} has; safetensors "
                "have a place for every model"
            )
    if config.activation not in GPT2.activations.values():
        choices = nearest(config.activation, dict.fromkeys(GPT2.activations.values()))
        raise UserError(f"activation={config.activation!r} of {config} has no place in GPT-2{choices}")


def read_config(directory: Path) -> tuple[Family, ModelConfig]:
    """The family and the config of the model in a folder.

    Raises:
      UserError: what is not computed here.
    """
    path = directory / "config.json"
    stored = read_json(path)
    family = next((family for family in _FAMILIES if family.model_type == stored.get("model_type")), None)
    if family is None:
        known = ", ".join(repr(family.model_type) for family in _FAMILIES)
        raise UserError(f"{path} describes model_type={stored.get('model_type')!r}; only {known} can be read")
    for key, value in family.fixed_keys.items():
        if stored.get(key, value) is not value:
            raise UserError(f"{path} has {key}={stored[key]!r}; only {value!r} can be read")
    activation = stored.get("activation_function", next(iter(family.activations)))
    if activation not in list(family.activations):
        raise UserError(
            f"{path} has activation_function={activation!r}, which is another function than those that are computed "
            f"here: {', '.join(family.activations)}"
        )
    fields = {}
    for key, (field, default) in family.sizes.items():
        value = fields[field] = stored.get(key, default)
        kind = (int, float) if isinstance(default, float) else int
        if isinstance(value, bool) or not (isinstance(value, kind) or value is default):
            raise UserError(f"{path} has {key}={value!r}, which is not a number of the kind it must be")
    try:
        return family, ModelConfig(**fields, **family.fields, activation=family.activations[activation])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
      UserError: there is none.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return stored


def weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if (directory / _INDEX).exists():
        shards = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{directory / _INDEX} is damaged: its weight_map does not name files")
        # Names only: an index must not reach outside its folder.
        return [directory / Path(name).name for name in sorted(set(shards.values()))]
    if pickled := sorted(directory.glob("*.bin")):
        raise UserError(
            f"{directory} has its weights only as {pickled[0].name}, a pickle, which is never read because it can run "
            "programs; save the model again with transformers' save_pretrained, which writes safetensors"
        )
    raise UserError(f"{directory} has no {WEIGHTS} and no {_INDEX}")


def _read_tensors(family: Family, paths: Iterable[Path]) -> dict[str, np.ndarray]:
    tensors = {}
    for path in paths:
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    if name.endswith(family.constants):
                        continue
                    if (kind := file.get_slice(name).get_dtype()) not in EXACT_TYPES:
                        raise UserError(f"{path} holds {name!r} as {kind}, which float32 cannot hold exactly")
                    tensors[name.removeprefix(family.tensor_prefix)] = file.get_tensor(name).astype(np.float32)
        except FileNotFoundError:
            raise UserError(f"{path} is missing, though {_INDEX} names it; copy every shard") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged or cannot be read: {error}") from None
    return tensors


def _check_tensors(directory: Path, tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> None:
    """Names, shapes and a tied head; what is left in `tensors` is exactly GPT-2's."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{directory} lacks the tensor {name!r}; save the whole model again")
        if tensors[name].shape != shape:
            raise UserError(
                f"{directory} has the tensor {name!r} of shape {list(tensors[name].shape)}, but its config.json asks "
                f"for {list(shape)}"
            )
    head = tensors.pop("lm_head.weight", tensors["wte.weight"])
    if not np.array_equal(head, tensors["wte.weight"], equal_nan=True):
        raise UserError(f"{directory} has a tensor 'lm_head.weight' of its own; only a tied head can be read")
    for name in tensors:
        if name not in shapes:
            raise UserError(f"{directory} has the tensor {name!r}, which is no part of a GPT-2 language model")


def _leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    return {leaf: value.shape for leaf, value in flatten_dict(params, sep="/").items()}


def _read_variables(config: ModelConfig, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters by path.

    Raises:
      UserError: they are not the config's.
    """
    params = {leaf: np.asarray(value) for leaf, value in flatten_dict(variables["params"], sep="/").items()}
    shapes = _leaf_shapes(config)
    for leaf in [*shapes, *params]:
        has = f"{params[leaf].dtype} {list(params[leaf].shape)}" if leaf in params else "nothing"
        needs = f"float32 {list(shapes[leaf])}" if leaf in shapes else "nothing"
        if has != needs:
            raise UserError(f"the variables have {has} for {leaf}, but {config} of this size has {needs}")
    return params


def _config_json(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    return {
        "architectures": [GPT2.language_model],
        "model_type": GPT2.model_type,
        **{key: getattr(config, field) for key, (field, _) in GPT2.sizes.items()},
        **GPT2.fixed_keys,
        **GPT2.free_keys,
        "activation_function": next(name for name, ours in GPT2.activations.items() if ours == config.activation),
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def write_folder(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Writes config.json and model.safetensors; the folder is made if it is not there.

    A config.json of the same `model_type` is replaced; any other, as a run's, belongs to something else.

    Raises:
      UserError: the folder is something else's or cannot be written.
    """
    path, kind = directory / "config.json", config.get("model_type")
    if path.exists() and (kind is None or read_json(path).get("model_type") != kind):
        raise UserError(f"{path} is not that of such a model and would be overwritten; choose another folder")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS) as file:
            save_file(tensors, file, metadata={"format": "pt"})
            file.chmod(0o666 & directory.stat().st_mode)  # safetensors leaves it to its owner alone
        with replacing(path) as file:
            file.write_text(json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory} cannot be written: {error}") from None
