"""GPT-2 in Hugging Face's folders, in and out: a config.json and safetensors, never pickle.

Every value is exact to the bit; what GPT-2 or this package cannot express is refused by name.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError, nearest
from jax_entropy.model import Transformer

# Keys of GPT-2's config.json that are fields of ours, with the values that they have when left out.
_FIELDS = {
    "vocab_size": ("vocab_size", 50257),
    "n_positions": ("context_length", 1024),
    "n_embd": ("model_dim", 768),
    "n_layer": ("num_layers", 12),
    "n_head": ("num_heads", 12),
    "n_inner": ("ffn_dim", None),
    "layer_norm_epsilon": ("norm_epsilon", 1e-5),
    "initializer_range": ("init_std", 0.02),
    "embd_pdrop": ("embedding_dropout", 0.1),
}
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# Keys that change what is computed; we compute only this.
_FIXED_KEYS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Fields that GPT-2 has no other value of.
_FIXED_FIELDS = dict(
    norm="layer", final_norm="layer", ffn="full", ffn_free_layers=0, reparametrization="none",
    learnable_temperature=False, entropy_regularizer=False, tied_head=True, embedding_scale=1.0,
)  # fmt: skip

# GPT-2's tensors and our parameters; several side by side where GPT-2 has them in one matrix.
_OUTSIDE_BLOCKS = {
    "wte.weight": "token_embedding",
    "wpe.weight": "position_embedding",
    "ln_f.weight": "final_norm/scale",
    "ln_f.bias": "final_norm/bias",
}
_IN_BLOCK = {
    "ln_1.weight": ("blocks/norm1/scale",),
    "ln_1.bias": ("blocks/norm1/bias",),
    "attn.c_attn.weight": tuple(f"blocks/attention/{name}/kernel" for name in ("query", "key", "value")),
    "attn.c_attn.bias": tuple(f"blocks/attention/{name}/bias" for name in ("query", "key", "value")),
    "attn.c_proj.weight": ("blocks/attention/out/kernel",),
    "attn.c_proj.bias": ("blocks/attention/out/bias",),
    "ln_2.weight": ("blocks/norm2/scale",),
    "ln_2.bias": ("blocks/norm2/bias",),
    "mlp.c_fc.weight": ("blocks/ffn/up/kernel",),
    "mlp.c_fc.bias": ("blocks/ffn/up/bias",),
    "mlp.c_proj.weight": ("blocks/ffn/down/kernel",),
    "mlp.c_proj.bias": ("blocks/ffn/down/bias",),
}
_MASKS = (".attn.bias", ".attn.masked_bias")  # constants that older files hold
_EXACT_TYPES = ("F32", "F16", "BF16")  # what float32 holds without rounding
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def from_huggingface(directory: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a GPT-2 folder: config.json and model.safetensors, whole or in shards with their index.

    Args:
      directory: local folder; names of tensors may start with "transformer." or not.
    Returns:
      (config, {"params": float32 arrays}) for `Transformer(config).apply`; dropout inside blocks is left behind.
    Raises:
      UserError: another architecture, a variant of GPT-2 that computes something else, pickled weights only, or a
        missing, damaged or superfluous part.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is no folder; name a local one that holds config.json and {_WEIGHTS}")
    config = _read_config(directory)
    tensors = _read_tensors(_weight_files(directory))
    _check_tensors(directory, tensors, _tensor_shapes(config))
    params = {leaf: tensors.pop(name) for name, leaf in _OUTSIDE_BLOCKS.items()}
    for name, leaves in _IN_BLOCK.items():
        stacked = np.stack([tensors.pop(f"h.{layer}.{name}") for layer in range(config.num_layers)])
        params |= zip(leaves, np.split(stacked, len(leaves), axis=-1), strict=True)
    shapes = _leaf_shapes(config)
    params = {leaf: jnp.asarray(value.reshape(shapes[leaf])) for leaf, value in params.items()}
    return config, {"params": unflatten_dict(params, sep="/")}


def to_huggingface(
    config: ModelConfig, variables: dict[str, Any], directory: str | Path, end_of_text: int | None = None
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
    check_expressible(config)
    params = _read_variables(config, variables)
    for leaf, shape in _leaf_shapes(dataclasses.replace(config, bias="all")).items():
        params.setdefault(leaf, np.zeros(shape, np.float32))
    tensors = {name: params[leaf] for name, leaf in _OUTSIDE_BLOCKS.items()}
    shapes = _tensor_shapes(config)
    for layer in range(config.num_layers):
        for name, leaves in _IN_BLOCK.items():
            rows = shapes[f"h.{layer}.{name}"][:-1]
            parts = [params[leaf][layer].reshape(*rows, -1) for leaf in leaves]
            tensors[f"h.{layer}.{name}"] = np.concatenate(parts, axis=-1)
    _write(Path(directory), _config_json(config, end_of_text), tensors)


def check_expressible(config: ModelConfig) -> None:
    """Raises UserError naming the first field that has no place in GPT-2."""
    for name, value in _FIXED_FIELDS.items():
        if getattr(config, name) != value:
            raise UserError(f"{name}={getattr(config, name)!r} of {config} has no place in GPT-2, only {value!r} has")
    if config.activation not in _ACTIVATIONS.values():
        choices = nearest(config.activation, _ACTIVATIONS.values())
        raise UserError(f"activation={config.activation!r} of {config} has no place in GPT-2{choices}")


def _read_config(directory: Path) -> ModelConfig:
    path = directory / "config.json"
    stored = _read_json(path)
    if stored.get("model_type") != "gpt2":
        raise UserError(f"{path} describes model_type={stored.get('model_type')!r}; only 'gpt2' can be read")
    for key, value in _FIXED_KEYS.items():
        if stored.get(key, value) is not value:
            raise UserError(f"{path} has {key}={stored[key]!r}; only {value!r} can be read")
    activation = stored.get("activation_function", "gelu_new")
    if activation not in list(_ACTIVATIONS):
        choices = nearest(activation, _ACTIVATIONS)
        raise UserError(f"{path} has activation_function={activation!r}, which cannot be read{choices}")
    fields = {}
    for key, (field, default) in _FIELDS.items():
        value = fields[field] = stored.get(key, default)
        kind = (int, float) if isinstance(default, float) else int
        if isinstance(value, bool) or not (isinstance(value, kind) or value is default):
            raise UserError(f"{path} has {key}={value!r}, which is not a number of the kind it must be")
    try:
        return ModelConfig(**fields, norm="layer", final_norm="layer", activation=_ACTIVATIONS[activation], bias="all")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return stored


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _WEIGHTS).exists():
        return [directory / _WEIGHTS]
    if (directory / _INDEX).exists():
        shards = _read_json(directory / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{directory / _INDEX} is damaged: its weight_map does not name files")
        # Names only: an index must not reach outside its folder.
        return [directory / Path(name).name for name in sorted(set(shards.values()))]
    if pickled := sorted(directory.glob("*.bin")):
        raise UserError(
            f"{directory} has its weights only as {pickled[0].name}, a pickle, which is never read because it can run "
            "programs; save the model again with transformers' save_pretrained, which writes safetensors"
        )
    raise UserError(f"{directory} has no {_WEIGHTS} and no {_INDEX}")


def _read_tensors(paths: Iterable[Path]) -> dict[str, np.ndarray]:
    tensors = {}
    for path in paths:
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():
                    if name.endswith(_MASKS):
                        continue
                    if (kind := file.get_slice(name).get_dtype()) not in _EXACT_TYPES:
                        raise UserError(f"{path} holds {name!r} as {kind}, which float32 cannot hold exactly")
                    tensors[name.removeprefix("transformer.")] = file.get_tensor(name).astype(np.float32)
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


def _tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of GPT-2's tensors by name; weights are [in, out]."""
    D, F = config.model_dim, config.hidden_dim
    block = {"ln_1": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D)}
    block |= {"ln_2": (D,), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
    modules = {f"h.{layer}.{name}": shape for layer in range(config.num_layers) for name, shape in block.items()}
    shapes = {"wte.weight": (config.vocab_size, D), "wpe.weight": (config.context_length, D)}
    for name, shape in (modules | {"ln_f": (D,)}).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    return shapes


def _leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    return {leaf: value.shape for leaf, value in flatten_dict(params, sep="/").items()}


def _read_variables(config: ModelConfig, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters by path. Raises UserError if they are not the config's."""
    params = {leaf: np.asarray(value) for leaf, value in flatten_dict(variables["params"], sep="/").items()}
    shapes = _leaf_shapes(config)
    for leaf in [*shapes, *params]:
        has = f"{params[leaf].dtype} {list(params[leaf].shape)}" if leaf in params else "nothing"
        needs = f"float32 {list(shapes[leaf])}" if leaf in shapes else "nothing"
        if has != needs:
            raise UserError(f"the variables have {has} for {leaf}, but {config} of this size has {needs}")
    return params


def _config_json(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    (activation,) = [name for name, ours in _ACTIVATIONS.items() if ours == config.activation]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{key: getattr(config, field) for key, (field, _) in _FIELDS.items()},
        **_FIXED_KEYS,
        "activation_function": activation,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    path = directory / "config.json"
    if path.exists() and _read_json(path).get("model_type") != "gpt2":
        raise UserError(f"{path} is not a GPT-2's and would be overwritten; choose another folder")
    tensors = {f"transformer.{name}": np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    partial = directory / f"{_WEIGHTS}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(directory / _WEIGHTS)
        path.write_text(json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{directory} cannot be written: {error}") from None
