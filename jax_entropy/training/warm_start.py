"""A run that starts from another model: a workdir's newest checkpoint, or a Hugging Face folder.

What fits is taken over, by name, layer and shape; what was taken over is told and noted in the workdir, which needs the
source no more once its first checkpoint is saved.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jax_entropy.architecture import ModelConfig
from jax_entropy.data import Tokenizer
from jax_entropy.errors import UserError
from jax_entropy.huggingface.convert import folder_config, is_folder, read_folder
from jax_entropy.model import Transformer
from jax_entropy.paths import local_path, writing
from jax_entropy.runs.load import load_run
from jax_entropy.runs.workdir import Workdir
from jax_entropy.seeds import random_key

# Axes along which one model may have more entries than another, of which the first are taken over.
_BY_POSITION = {"position_embedding": 0, "attention/temperature": 1}
_BY_TOKEN = {"token_embedding": 0, "head": 0}

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
        """As origin.json. Raises UserError if the disk is full."""
        with writing(workdir.path, "workdir"):
            workdir.path.mkdir(parents=True, exist_ok=True)
            partial = workdir.path / "partial"
            partial.write_text(json.dumps(self._asdict(), indent=1) + "\n")
            partial.replace(workdir.origin)

    @classmethod
    def read(cls, workdir: Workdir) -> "Origin | None":
        """None where the run began with nothing. Raises UserError for a damaged file."""
        try:
            return cls(**json.loads(workdir.origin.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{workdir.origin} is damaged ({error}); restore it or choose another workdir") from None


def source_config(path: str | os.PathLike) -> ConfigDict:
    """The config of a run from a workdir or folder where nothing else is asked for. Raises UserError for neither."""
    path = local_path(path, "start_from")
    return folder_config(path) if is_folder(path) else Workdir(path).read_config()


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
    name = os.fspath(path) if path else origin and origin.source
    if not name:
        return config, None
    if workdir.has_checkpoint():
        if origin is None or origin.source != name:
            began = f"was started from {origin.source}" if origin else "was not started from another model"
            raise UserError(f"the run in {workdir.path} {began}, not from {name}; choose another workdir")
        source, tokenizer = None, workdir.read_config().data.tokenizer
    else:
        source = _load(name, notify)
        if source.tokenizer is None and not config.data.tokenizer:
            raise UserError(f"{name} has no tokenizer; name its own as config.data.tokenizer")
        tokenizer = workdir.tokenizer.name
    if not config.data.tokenizer:  # the source's tokens are the run's, or its embedding means nothing
        config = config.copy_and_resolve_references()
        config.data.tokenizer = tokenizer
    return config, source


def _load(name: str, notify: Callable[[str], None]) -> Source:
    path = local_path(name, "start_from")
    if is_folder(path):
        model, variables, tokenizer = read_folder(path, notify)
    elif Workdir(path).exists():
        run = load_run(path, notify)
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
    ours = _by_layer(jax.device_get(jax.jit(model.init)(key, tokens)["params"]), model.config)
    axes = _BY_POSITION | (_BY_TOKEN if same_tokens else {})
    kept, whole, in_part, count = {}, [], {}, 0
    for place, new in ours.items():
        old, (_, name) = theirs.get(place), place
        if old is None or (name in _BY_TOKEN and not same_tokens):
            continue
        if old.shape == new.shape:
            kept[place] = old
            whole.append(place)
            count += old.size
        elif (part := _first_entries(old.shape, new.shape, axes.get(name))) is not None:
            kept[place] = np.array(new)
            kept[place][part] = old[part]
            in_part[place] = f"the first {old[part].shape[axes[name]]:,} of {new.shape[axes[name]]:,}"
            count += old[part].size
    if not kept:
        raise UserError(f"nothing of {source.name}, {source.model}, fits into {model.config} of this size")
    params = _stacked(kept, ours, model.config)
    # What is missing is initialised, and after what it is derived from: gains and singular vectors of kept matrices.
    complete = jax.jit(lambda params: model.apply(params, tokens, mutable=["params", "spectral"], rngs={"params": key}))
    _, variables = complete({"params": params})
    origin = Origin(
        source=source.name,
        architecture=str(source.model),
        share=count / sum(leaf.size for leaf in ours.values()),
        taken_over=_told(whole, ours),
        in_part=[f"{name} ({note})" for note in dict.fromkeys(in_part.values())
                 for name in _told([place for place in in_part if in_part[place] == note], ours)],
        anew=_told([place for place in ours if place not in kept], ours),
        left_behind=_told([place for place in theirs if place not in kept], theirs),
    )  # fmt: skip
    return variables, origin


def _first_entries(old: tuple[int, ...], new: tuple[int, ...], axis: int | None) -> tuple[slice, ...] | None:
    """The part of both shapes that is common along an axis; None where they differ elsewhere."""
    if axis is None or old[:axis] + old[axis + 1 :] != new[:axis] + new[axis + 1 :]:
        return None
    return (*(slice(None),) * axis, slice(min(old[axis], new[axis])))


def _stacks(config: ModelConfig) -> dict[str, range]:
    """The layers whose parameters lie stacked under a name."""
    with_ffn = config.num_layers - config.ffn_free_layers
    return {"blocks": range(with_ffn), "blocks_without_ffn": range(with_ffn, config.num_layers)}


def _by_layer(params: dict[str, Any], config: ModelConfig) -> dict[_Key, np.ndarray]:
    stacks, leaves = _stacks(config), {}
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
    for stack, layers in _stacks(config).items():
        for name in dict.fromkeys(name for layer, name in kept if layer in layers):
            params[f"{stack}/{name}"] = np.stack([kept.get((i, name), ours[i, name]) for i in layers])
    return unflatten_dict(params, sep="/")


def _told(places: Iterable[_Key], among: dict[_Key, Any]) -> list[str]:
    """Names, with their layers where not all that have them are meant."""
    layers: dict[str, list[int | None]] = {}
    for layer, name in places:
        layers.setdefault(name, []).append(layer)
    every = {name: sum(other == name for _, other in among) for name in layers}
    return [
        name if len(which) == every[name] else f"{name} of layers {', '.join(map(str, which))}"
        for name, which in layers.items()
    ]
