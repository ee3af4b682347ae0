"""A run that starts from another model: a workdir's newest checkpoint, or a Hugging Face folder.

What fits is taken over, by name, layer and shape; what was taken over is told and noted in the workdir, which needs the
source no more once its first checkpoint is saved.
"""

import collections
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jax_entropy.annealing import is_annealed
from jax_entropy.architecture import ModelConfig
from jax_entropy.config import default_config, model_config
from jax_entropy.data import Tokenizer
from jax_entropy.errors import UserError
from jax_entropy.huggingface.convert import folder_config, is_folder, read_folder
from jax_entropy.layers import temperature
from jax_entropy.model import Transformer
from jax_entropy.paths import local_path, replacing, writing
from jax_entropy.runs.load import load_run
from jax_entropy.runs.workdir import OWN_TOKENIZER, Workdir
from jax_entropy.seeds import random_key

_TEMPERATURE = "attention/temperature"
_SAME = 1e-2  # nats a token by which bfloat16 may change predictions
# Axes along which one model may have more entries than another, of which the first are taken over.
_BY_POSITION = {"position_embedding": 0, _TEMPERATURE: 1}
_BY_TOKEN = {"token_embedding": 0, "value_embedding": 0, "head": 0}

_Key = tuple[int | None, str]  # the layer and the name in its block, or None and the path


class Source(NamedTuple):
    """A model to start from, and the name that it was given by."""

    name: str
    model: ModelConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None


class Origin(NamedTuple):
    """What a run was started from, the share of its parameters that comes from there, and their names."""

    source: str
    architecture: str = ""
    share: float = 0.0
    taken_over: Sequence[str] = ()
    in_part: Sequence[str] = ()
    anew: Sequence[str] = ()
    left_behind: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The same for a person."""
        lists = {"in part": self.in_part, "starting anew": self.anew, "left behind": self.left_behind}
        return [
            f"started from {self.source}, {self.architecture}: {self.share:.1%} of the parameters are taken over",
            *(f"  {what}: {', '.join(names)}" for what, names in lists.items() if names),
        ]

    def write(self, workdir: Workdir) -> None:
        """As origin.json.

        Raises:
          UserError: the disk is full.
        """
        with writing(workdir.path, "workdir"):
            workdir.path.mkdir(parents=True, exist_ok=True)
            with replacing(workdir.origin) as file:
                file.write_text(json.dumps(self._asdict(), indent=1) + "\n")

    @classmethod
    def read(cls, workdir: Workdir) -> "Origin | None":
        """None where the run began with nothing.

        Raises:
          UserError: a damaged file.
        """
        try:
            return cls(**json.loads(workdir.origin.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{workdir.origin} is damaged ({error}); restore it or choose another workdir") from None


def source_config(path: str | os.PathLike) -> ConfigDict:
    """The config of a run from a workdir or folder where nothing else is asked for.

    Raises:
      UserError: it is neither.
    """
    path = local_path(path, "start_from")
    if is_folder(path):
        return folder_config(path)
    config = Workdir(path).read_config()
    config.anneal = default_config(config.architecture).anneal  # what was taken out is gone
    return config


def open_source(
    config: ConfigDict, workdir: Workdir, path: str | os.PathLike | None, notify: Callable[[str], None]
) -> tuple[ConfigDict, Source | None]:
    """What the run in a workdir is to be started from, None if it began already, and its config with that tokenizer.

    Args:
      path: what was asked for; a run that was broken off before its first checkpoint remembers it.
    Raises:
      UserError: the run began with something else, or `path` holds neither a run nor a folder that can be used.
    """
    origin = Origin.read(workdir)
    if path is not None:
        local_path(path, "start_from")
    name = origin and origin.source if path is None else os.fspath(path)
    if not name:
        return config, None
    if workdir.has_checkpoint():
        if origin is None or origin.source != name:
            began = f"was started from {origin.source}" if origin else "was not started from another model"
            raise UserError(f"the run in {workdir.path} {began}, not from {name}; choose another workdir")
        source = None
    else:
        source = _load(name, notify)
        if source.tokenizer is None and not config.data.tokenizer:
            raise UserError(f"{name} has no tokenizer; name its own as config.data.tokenizer")
    config = config.copy_and_resolve_references()
    if source and not config.data.tokenizer:  # the source's tokens are the run's, or its embedding means nothing
        config.data.tokenizer = OWN_TOKENIZER
    if config.anneal.activation is None and config.anneal.end:
        config.anneal.activation = (
            _lost_activation(config, source) if source else workdir.read_config().anneal.activation
        )
    if source and is_annealed(config, model := _model(config, source)):
        for theirs, ours in ((source.model.norm, model.norm), (source.model.final_norm, model.final_norm)):
            if ours == "frozen" and theirs != "layer":
                raise UserError(
                    f"{model} takes the row statistics of a LayerNorm out, and {name}, {source.model}, has {theirs!r} "
                    "in its place; start from it with config.anneal.end=0"
                )
    return config, source


def _model(config: ConfigDict, source: Source) -> ModelConfig:
    return model_config(config, config.model.vocab_size or source.model.vocab_size)


def _lost_activation(config: ConfigDict, source: Source) -> str | None:
    """The activation that the source has and the run's architecture has not, though it has room for it."""
    model = _model(config, source)
    room = model.activation == "identity" and model.ffn == "full"
    if not room or source.model.activation == "identity":
        return None
    if source.model.activation == "leaky_relu":
        raise UserError(
            f"{source.name}, {source.model}, has a leaky ReLU; gelu, gelu_tanh and relu are what is taken out, "
            "and config.anneal.end=0 starts without it"
        )
    return source.model.activation


def _load(name: str, notify: Callable[[str], None]) -> Source:
    path = local_path(name, "start_from")
    if is_folder(path):
        model, variables, tokenizer = read_folder(path, notify)
    elif Workdir(path).exists():
        run = load_run(path, notify)
        if "annealing" in run.variables:
            raise UserError(
                f"{name} is on its way to {run.config.architecture}; let it train to config.anneal.end first"
            )
        model, variables, tokenizer = run.model.config, run.variables, run.tokenizer
    else:
        raise UserError(f"{name} is neither the workdir of a run nor a Hugging Face folder: it has no config.json")
    return Source(name, model, jax.device_get(variables["params"]), tokenizer)


def take_over(source: Source, model: Transformer, seed: int, *, same_tokens: bool) -> tuple[dict[str, Any], Origin]:
    """The model's variables with what fits of the source's, and what became of each parameter.

    Args:
      seed: of what starts anew.
      same_tokens: whether ids mean the same in both; where they do not, embedding and head start anew.
    Raises:
      UserError: nothing fits.
    """
    tokens, key = jnp.zeros((1, 1), jnp.int32), random_key(seed)
    theirs = _by_layer(source.params, source.model)
    if source.model.temperature_parameter != model.config.temperature_parameter:
        theirs = {
            place: _as_parameter(temperature(value, source.model), model.config) if place[1] == _TEMPERATURE else value
            for place, value in theirs.items()
        }
    ours = _by_layer(jax.device_get(jax.jit(model.init)(key, tokens)["params"]), model.config)
    kept = {place: _kept(place[1], theirs.get(place), new, same_tokens) for place, new in ours.items()}
    kept = {place: part for place, part in kept.items() if part is not None}
    if not kept:
        raise UserError(f"nothing of {source.name}, {source.model}, fits into {model.config} of this size")
    params = _stacked({place: part.value for place, part in kept.items()}, ours, model.config)
    # What is missing is initialised, and after what it is derived from: gains and singular vectors of kept matrices.
    complete = jax.jit(lambda params: model.apply(params, tokens, mutable=["params", "spectral"], rngs={"params": key}))
    _, variables = complete({"params": params})
    origin = Origin(
        source=source.name,
        architecture=str(source.model),
        share=sum(part.count for part in kept.values()) / sum(leaf.size for leaf in ours.values()),
        taken_over=_told({place: "" for place, part in kept.items() if not part.note}, ours),
        in_part=_told({place: f" ({part.note})" for place, part in kept.items() if part.note}, ours),
        anew=_told(dict.fromkeys((place for place in ours if place not in kept), ""), ours),
        left_behind=_told(dict.fromkeys((place for place in theirs if place not in kept), ""), theirs),
    )
    return variables, origin


def _as_parameter(temperature: jax.Array, config: ModelConfig) -> np.ndarray:
    return np.asarray(jnp.log(temperature) if config.temperature_parameter == "log" else temperature)


def check_teacher(source: Source, model: Transformer, variables: dict[str, Any], origin: Origin) -> None:
    """Checks that a run begins as its source, in whose place its beginning teaches it.

    Args:
      variables: what the run begins with.
    Raises:
      UserError: it predicts something else, or reads more than the source can.
    """
    T, V = model.config.context_length, min(source.model.vocab_size, model.config.vocab_size)
    if T > source.model.context_length:
        raise UserError(
            f"config.anneal.distillation learns from what {source.name} predicts, and it has read no more than "
            f"{source.model.context_length} tokens: config.model.context_length={T} is longer; set one of them lower"
        )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (1, T)))
    theirs = Transformer(source.model)
    complete = jax.jit(
        lambda params: theirs.apply(params, tokens, mutable=["spectral"], rngs={"params": random_key(0)})
    )
    (expected, _), _ = complete({"params": source.params})
    found, _ = jax.jit(model.apply)(variables, tokens)
    expected, found = (jax.nn.log_softmax(logits[..., :V].astype(jnp.float32)) for logits in (expected, found))
    apart = float(jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)))
    if not apart <= _SAME:
        raise UserError(
            f"config.anneal.distillation learns from what the run begins with, and that predicts otherwise than "
            f"{source.name} ({apart:.2g} nats a token; {'; '.join(line.strip() for line in origin.lines()[1:])}): set "
            "it to 0, or start from a model that fits"
        )


class _Kept(NamedTuple):
    """What a parameter starts from, how many numbers of it are the source's, and which where not all are."""

    value: np.ndarray
    count: int
    note: str = ""


def _kept(name: str, old: np.ndarray | None, new: np.ndarray, same_tokens: bool) -> _Kept | None:
    """None where nothing fits."""
    if old is None or (name in _BY_TOKEN and not same_tokens):
        return None
    if old.shape == new.shape:
        return _Kept(old, old.size)
    axis = (_BY_POSITION | _BY_TOKEN).get(name)
    if axis is None or old.shape[:axis] + old.shape[axis + 1 :] != new.shape[:axis] + new.shape[axis + 1 :]:
        return None
    entries = min(old.shape[axis], new.shape[axis])
    first, value = (*(slice(None),) * axis, slice(entries)), np.array(new)
    value[first] = old[first]
    return _Kept(value, old[first].size, f"the first {entries:,} of {max(old.shape[axis], new.shape[axis]):,}")


def _by_layer(params: dict[str, Any], config: ModelConfig) -> dict[_Key, np.ndarray]:
    stacks, leaves = config.stacks, {}
    for path, value in flatten_dict(params, sep="/").items():
        stack, _, name = path.partition("/")
        if stack in stacks:
            leaves |= {(layer, name): value[i] for i, layer in enumerate(stacks[stack])}
        else:
            leaves[None, path] = value
    return leaves


def _stacked(kept: dict[_Key, np.ndarray], ours: dict[_Key, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """Inverse of `_by_layer` for what was kept; where only some layers of a stack were, the others stay ours."""
    params = {path: value for (layer, path), value in kept.items() if layer is None}
    for stack, layers in config.stacks.items():
        for name in dict.fromkeys(name for layer, name in kept if layer in layers):
            params[f"{stack}/{name}"] = np.stack([kept.get((i, name), ours[i, name]) for i in layers])
    return unflatten_dict(params, sep="/")


def _told(places: Mapping[_Key, str], among: Mapping[_Key, Any]) -> list[str]:
    """Names and what is noted of them, with their layers where not all that have them are meant."""
    layers: dict[tuple[str, str], list[int | None]] = {}
    for (layer, name), note in places.items():
        layers.setdefault((name, note), []).append(layer)
    every = collections.Counter(name for _, name in among)
    return [
        name + ("" if len(which) == every[name] else f" of layers {', '.join(map(str, which))}") + note
        for (name, note), which in layers.items()
    ]
