"""What a family of models is called in Hugging Face's folders: one record says all that reading and writing needs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax_entropy.architecture import ModelConfig


class Family(NamedTuple):
    """Settings, names and shapes of one family, beside ours.

    Attributes:
      model_type: of config.json.
      language_model: class of `transformers` that reads what we write.
      sizes: key of config.json → field of ours, and the value that it has when left out.
      activations: name in config.json → the activation of ours that is equal to it up to rounding in float32; of
        several names for one, the first is written.
      fixed_keys: keys that change what is computed; we compute only this.
      free_keys: keys that change how it is computed and not what; this is written.
      fields: what every model of the family has.
      fixed_fields: what ours must have to be one of the family; a bias that it has not is written as zeros.
      tensors: tensor → parameter of ours.
      block_tensors: tensor of a block → parameters of ours, side by side where there are several.
      tensor_prefix, block_prefix: of the written names; the first may be missing in what is read.
      constants: ends of the names of tensors that older files hold and nobody needs.
      shapes: of all tensors by name, without `tensor_prefix`.
    """

    model_type: str
    language_model: str
    sizes: Mapping[str, tuple[str, Any]]
    activations: Mapping[str, str]
    fixed_keys: Mapping[str, Any]
    free_keys: Mapping[str, Any]
    fields: Mapping[str, Any]
    fixed_fields: Mapping[str, Any]
    tensors: Mapping[str, str]
    block_tensors: Mapping[str, tuple[str, ...]]
    tensor_prefix: str
    block_prefix: str
    constants: tuple[str, ...]
    shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
