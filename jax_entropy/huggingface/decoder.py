"""Decoders of other families than ours, as Hugging Face writes them: what one computes, and its weights, read by need.

A family is a record (`decoders.py`). A bias is there where the file has one; a tensor that nobody asks for is refused.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jax_entropy.errors import UserError
from jax_entropy.huggingface.folder import EXACT_TYPES, read_json, weight_files

Params = dict[str, dict[str, np.ndarray]]  # by module, "weight" and perhaps "bias"; matrices are [in, out]


class Decoder(NamedTuple):
    """What a forward pass needs to know beside weights; hashable.

    Attributes:
      num_groups: heads of keys and values, each for num_heads / num_groups heads of queries.
      activation: "gelu", "gelu_tanh", "relu" or "silu".
      gated: the activation is of a gate that multiplies the feed-forward's other branch.
      parallel: attention and feed-forward read the same stream and are added together.
      frequencies: of rotation, radians a token; for the first 2·len of a head's numbers. Empty: learned positions.
      windows: of each layer, how many tokens a query sees, its own and those before it.
      scales: of each layer's logits.
    """

    vocab_size: int
    context_length: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_groups: int
    head_dim: int
    hidden_dim: int
    norm: str
    epsilon: float
    activation: str
    gated: bool
    parallel: bool
    frequencies: tuple[float, ...]
    windows: tuple[int, ...]
    scales: tuple[float, ...]

    def shape(self, module: str) -> tuple[int, ...]:
        """Of a module's weight, [in, out]."""
        D, F, queries, keys = self.model_dim, self.hidden_dim, *(
            count * self.head_dim for count in (self.num_heads, self.num_groups)
        )  # fmt: skip
        shapes = dict(query=(D, queries), key=(D, keys), value=(D, keys), out=(queries, D))
        shapes |= dict(fused=(D, 3 * queries), gate=(D, F), up=(D, F), down=(F, D))
        shapes |= dict(embedding=(self.vocab_size, D), head=(self.vocab_size, D), positions=(self.context_length, D))
        return shapes.get(module, (D,))


class DecoderFamily(NamedTuple):
    """Settings and names of one family.

    Attributes:
      model_type: of config.json.
      settings: the decoder that a config.json describes.
      fixed: keys that change what is computed; only this value, which they have when left out, is read.
      tied: whether the head is the embedding where config.json does not say.
      prefix: of all names but the head's; may be missing.
      modules: of ours outside blocks → of the family.
      block: how a block's names begin.
      block_modules: of ours → of the family; "fused" holds query, key and value.
      transposed: matrices are [out, in].
      split: the last axis of "fused" into query, key and value.
      constants: ends of the names of what older files hold and nobody needs.
    """

    model_type: str
    settings: Callable[["Settings"], Decoder]
    fixed: Mapping[str, Any]
    tied: bool
    prefix: str
    modules: Mapping[str, str]
    block: str
    block_modules: Mapping[str, str]
    transposed: bool = True
    split: Callable[[np.ndarray, Decoder], Sequence[np.ndarray]] | None = None
    constants: tuple[str, ...] = ()


class Settings:
    """A config.json, asked for by key; what is missing or of another kind is a sentence."""

    def __init__(self, path: Path, stored: Mapping[str, Any]) -> None:
        self.path, self.stored = path, stored

    def number(self, *keys: str, default: float | None = None, kind: type = int, least: float | None = None) -> Any:
        """The first of `keys` that is there and not null; above 0, or at least `least`."""
        key = next((key for key in keys if self.stored.get(key) is not None), None)
        if key is None:
            if default is None:
                raise UserError(f"{self.path} lacks {keys[0]}")
            return default
        value = self.stored[key]
        wrong = isinstance(value, bool) or not isinstance(value, (int, kind)) or not value < math.inf
        if wrong or (value <= 0 if least is None else value < least):
            bound = "a positive number" if least is None else f"a number of at least {least:g}"
            raise UserError(f"{self.path} has {key}={value!r}, which must be {bound}")
        return value

    def choice(self, *keys: str, choices: Mapping[str, str], default: str) -> str:
        """What `choices` calls the value of the first of `keys` that is there."""
        key = next((key for key in keys if key in self.stored), keys[0])
        if (value := self.stored.get(key, default)) not in list(choices):
            raise UserError(f"{self.path} has {key}={value!r}; what can be read is {', '.join(choices)}")
        return choices[value]


class Weights:
    """The tensors of a folder, each read when it is asked for, so that memory holds one block.

    Raises:
      UserError: files that are missing or damaged, numbers that float32 cannot hold, or tensors of another model.
    """

    def __init__(self, directory: Path, family: DecoderFamily, decoder: Decoder, *, tied: bool) -> None:
        self.directory, self.family, self.decoder, self.tied = directory, family, decoder, tied
        self._files: dict[str, tuple[Path, str]] = {}  # by name without prefix
        for path in weight_files(directory):
            with _reading(path), safe_open(path, "numpy") as file:
                self._files |= {name.removeprefix(family.prefix): (path, name) for name in file.keys()}  # noqa: SIM118
        self._refuse_others()

    def outer(self, module: str) -> dict[str, np.ndarray]:
        """A module outside the blocks: "embedding", "positions", "final_norm" or "head"."""
        if module == "head" and self.tied and f"{self.family.modules['head']}.weight" not in self._files:
            module = "embedding"  # a head that is in the file is the model's, whatever config.json says of it
        return self._module(self.family.modules[module], module)

    def block(self, layer: int) -> Params:
        """The modules of one block."""
        family, prefix = self.family, self.family.block.format(layer)
        params = {ours: self._module(prefix + theirs, ours) for ours, theirs in family.block_modules.items()}
        if fused := params.pop("fused", None):
            for kind, array in fused.items():
                parts = zip(("query", "key", "value"), family.split(array, self.decoder), strict=True)
                for ours, part in parts:
                    params.setdefault(ours, {})[kind] = part
        return params

    def _module(self, theirs: str, ours: str) -> dict[str, np.ndarray]:
        shape, outside = self.decoder.shape(ours), ours in self.family.modules
        stored = shape[::-1] if self.family.transposed and not outside else shape
        weight = self._tensor(f"{theirs}.weight", stored)
        module = dict(weight=weight if outside or not self.family.transposed else np.ascontiguousarray(weight.T))
        if f"{theirs}.bias" in self._files:
            module["bias"] = self._tensor(f"{theirs}.bias", shape[-1:] if ours != "head" else shape[:1])
        return module

    def _tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self._files:
            raise UserError(f"{self.directory} lacks the tensor {name!r}; save the whole model again")
        path, stored = self._files[name]
        with _reading(path), safe_open(path, "numpy") as file:
            found = file.get_slice(stored)
            if found.get_dtype() not in EXACT_TYPES:
                raise UserError(f"{path} holds {stored!r} as {found.get_dtype()}, which float32 cannot hold exactly")
            if tuple(found.get_shape()) != shape:
                raise UserError(
                    f"{path} has the tensor {stored!r} of shape {found.get_shape()}, but config.json asks for "
                    f"{list(shape)}"
                )
            return file.get_tensor(stored).astype(np.float32)

    def _refuse_others(self) -> None:
        family = self.family
        blocks = [family.block.format(layer) for layer in range(self.decoder.num_layers)]
        known = {*family.modules.values(), *(b + name for b in blocks for name in family.block_modules.values())}
        for name in self._files:
            if name.rpartition(".")[0] not in known and not name.endswith(family.constants or ("\0",)):
                raise UserError(
                    f"{self.directory} has the tensor {name!r}, which is no part of the {family.model_type} that "
                    "config.json describes; such a model cannot be read"
                )


def read_decoder(directory: Path, families: Sequence[DecoderFamily]) -> tuple[Decoder, Weights]:
    """The decoder in a folder of one of `families`.

    Raises:
      UserError: what cannot be read, and why.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no folder; name a local one that holds config.json and safetensors")
    path = directory / "config.json"
    settings = Settings(path, read_json(path))
    kind = settings.stored.get("model_type")
    if "architecture" in settings.stored:
        raise UserError(
            f"{directory} holds a model of ours, not Hugging Face's; what its heads do on a text says `jax-entropy "
            "evaluate RUN --text=…`, and `jax-entropy convert --to=workdir` makes a run of published safetensors"
        )
    family = next((family for family in families if family.model_type == kind), None)
    if family is None:
        known = ", ".join(family.model_type for family in families)
        raise UserError(f"{settings.path} describes model_type={kind!r}; only {known} can be read")
    for key, value in family.fixed.items() | {"quantization_config": None}.items():
        if (stored := settings.stored.get(key, value)) != value:
            raise UserError(
                f"{settings.path} has {key}={json.dumps(stored)[:60]}; only {json.dumps(value)} can be read"
            )
    decoder = family.settings(settings)
    if decoder.num_heads % decoder.num_groups:
        raise UserError(
            f"{settings.path} has {decoder.num_heads} heads, which {decoder.num_groups} heads of keys do not divide"
        )
    tied = settings.stored.get("tie_word_embeddings", family.tied)
    return decoder, Weights(directory, family, decoder, tied=bool(tied))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what safetensors and the system refuse into a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing, though the index names it; copy every shard") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or cannot be read: {error}") from None
