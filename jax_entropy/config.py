"""Configurations: the defaults, the model that one describes, and the checks that run before anything expensive.

A file in `configs/` starts from `default_config(architecture)` and changes what its experiment needs.
"""

import dataclasses
import json
import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.errors import UserError, check_choice, check_kind, nearest
from jax_entropy.fields import AXES, FIELDS, Bound
from jax_entropy.paths import local_path

PATHS = ("data.files", "data.directory", "data.tokenizer")  # fields that name places on this machine
# what an imported model, not trained yet, was made with
_IMPORTED = ("architecture", "model.", "data.tokenizer")
_LARGEST_FLOAT = 3.4e38


def default_config(architecture_name: str) -> ConfigDict:
    """All fields of `fields.FIELDS` with their defaults, around an architecture in the paper's notation.

    Args:
      architecture_name: as "EReg(SM(t)+ScFuFFN)"; it is read, and may be refused, where a model is made of the config.
    """
    sections: dict[str, Any] = {}
    for field in FIELDS:
        section, _, name = field.name.rpartition(".")
        values = sections.setdefault(section, {}) if section else sections
        values[name] = config_dict.placeholder(field.kind) if field.kind else field.default
    return ConfigDict(sections | dict(architecture=architecture_name))


def model_config(config: ConfigDict, vocab_size: int) -> ModelConfig:
    """The model that a config describes, on a tokenizer of `vocab_size` entries.

    Raises:
      UserError: notation, fields and tokenizer do not fit together.
    """
    fields = dict(config.model)
    if (fields["vocab_size"] or vocab_size) < vocab_size:
        raise UserError(
            f"config.model.vocab_size={fields['vocab_size']} is less than the tokenizer's {vocab_size} entries; "
            "leave it unset to take the tokenizer's"
        )
    fields["vocab_size"] = fields["vocab_size"] or vocab_size  # a larger table is padded
    has_tanh = fields.pop("tanh_gelu")
    model = architecture(
        config.architecture, **fields, dtype=config.train.dtype, threshold_init=config.penalty.threshold_init
    )
    return dataclasses.replace(model, activation="gelu_tanh") if has_tanh and model.activation == "gelu" else model


def warmup_steps(config: ConfigDict, num_steps: int) -> int:
    """Steps of the warm-up of config.optimizer in a run of so many.

    Raises:
      UserError: it leaves no step after it.
    """
    steps = round(config.warmup * num_steps if config.warmup < 1 else config.warmup)
    if steps >= num_steps:
        raise UserError(f"config.optimizer.warmup={config.warmup} leaves none of the {num_steps} steps for training")
    return steps


def check(config: ConfigDict) -> None:
    """Checks a config before data is prepared or anything is compiled.

    Raises:
      UserError: values that cannot work.
    """
    check_kind("config", config, ConfigDict, "a ConfigDict, as default_config and load_config make one")
    flat, known = flatten(config), {field.name: field.default for field in FIELDS}
    for name in flat:
        if name not in known:
            raise UserError(f"config.{name} is not a field{nearest(name, known)}")
    for name, default in known.items():
        if name not in flat:
            raise UserError(f"config.{name} is missing; start from jax_entropy.config.default_config(…)")
        if flat[name] is None and default is not None:
            raise UserError(f"config.{name}=None must have a value; its default is {default!r}")
    for name, value in flat.items():
        if isinstance(value, float) and not abs(value) <= _LARGEST_FLOAT:
            raise UserError(f"config.{name}={value} must be a finite number of float32, at most {_LARGEST_FLOAT:.3g}")
        if isinstance(value, int) and abs(value) >= 2**31 and name != "seed":
            raise UserError(f"config.{name}={value} must be below 2^31")
    for field in FIELDS:
        value, bound = flat[field.name], field.bound
        if isinstance(bound, tuple):
            check_choice(f"config.{field.name}", value, bound)
        if isinstance(bound, Bound) and not bound.holds(value):
            raise UserError(f"config.{field.name}={value} {bound.words}")
    for name in PATHS:
        if flat[name] != "":
            local_path(flat[name], f"config.{name}")
    if config.data.source == "stdlib" and config.data.files:
        raise UserError(
            f"config.data.source='stdlib' reads no files, and config.data.files={config.data.files!r} names some; take "
            "config.data.source='files', or leave config.data.files empty"
        )
    for rule in config.mesh.rules:
        _check_rule(rule)
    warmup_steps(config.optimizer, config.train.num_steps)
    model = model_config(config, 1 if config.model.vocab_size is None else config.model.vocab_size)
    if config.anneal.activation and model.activation != "identity":
        raise UserError(
            f"config.anneal.activation={config.anneal.activation!r} is to be taken out, and {config.architecture} "
            "keeps an activation; name an architecture without one"
        )
    if 0 < config.anneal.end <= config.anneal.begin:
        raise UserError(
            f"config.anneal.end={config.anneal.end} must come after config.anneal.begin={config.anneal.begin}"
        )
    if config.optimizer.qk_clip and model.reparametrization in ("spectral", "sigma") and "Q" in model.reparametrized:
        raise UserError(
            f"config.optimizer.qk_clip={config.optimizer.qk_clip} scales queries and keys, which the spectral "
            f"normalisation of {model} undoes; leave one of them out"
        )


def _check_rule(rule: Any) -> None:
    """Checks one of config.mesh.rules.

    Raises:
      UserError: it is no pattern with axes, or no mesh has these axes.
    """
    try:
        pattern, axes = rule
        re.compile(pattern)
        names = [name for axis in axes for name in (axis if isinstance(axis, tuple) else (axis,)) if name is not None]
    except (TypeError, ValueError, re.error):
        axes, names = None, []
    if not isinstance(axes, tuple):
        raise UserError(
            f"config.mesh.rules: {rule!r} is no pattern with its axes; one is like ('query/kernel$', ('fsdp', None))"
        )
    for name in names:
        if name not in AXES:
            raise UserError(f"config.mesh.rules: {rule!r} names an axis {name!r}{nearest(name, AXES)}")
        if names.count(name) > 1:
            raise UserError(f"config.mesh.rules: {rule!r} splits over {name!r} twice")


def changes(stored: ConfigDict, config: ConfigDict, *, imported: bool = False, complete: bool = False) -> list[str]:
    """What differs between a run's config and the one it shall go on with, as "field=new (was old)".

    Args:
      imported: the run holds another program's model and no step of ours; it must keep that model, and nothing else.
      complete: its last step was taken; more may follow.
    Raises:
      UserError: a field differs that a run must keep.
    """
    old, new = (flatten(json.loads(to_json(c))) for c in (stored, config))
    differing = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    live = {field.name for field in FIELDS if field.live}
    kept = [name for name in differing if name.startswith(_IMPORTED)] if imported else differing
    longer = {"train.num_steps"} if complete and stored.train.num_steps < config.train.num_steps else set()
    fixed = [name for name in kept if name not in live | longer]
    if fixed:
        name = fixed[0]
        more = f" (and {len(fixed) - 1} more fields differ)" if len(fixed) > 1 else ""
        raise UserError(f"{name} is {old.get(name)!r} there and {new.get(name)!r} here{more}")
    return [f"{name}={new[name]!r} (was {old[name]!r})" for name in differing]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields by their names: {"train.batch_size": 32, …}."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return flat


def to_json(config: ConfigDict) -> str:
    """The text of a workdir's config.json."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Inverse of `to_json`, on top of the defaults, so that types and unset fields are known again.

    Raises:
      UserError: the text is not such a config's.
    """
    try:
        stored = json.loads(text)
        config = default_config(stored["architecture"])
        stored["mesh"]["rules"] = tuple((pattern, _tuples(axes)) for pattern, axes in stored["mesh"]["rules"])
        config.update(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json is damaged ({error!r}); restore it") from None
    return config


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
