"""What a sweep is: points (fields that differ from a config's), seeds, and the rule that chooses a learning rate.

A file in `configs/sweeps/` returns one for each scale; everything in it is checked before anything is trained.
"""

import dataclasses
import hashlib
import inspect
import itertools
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jax_entropy.config import check
from jax_entropy.config_file import bundled, change, explained, find, function_of, load_config
from jax_entropy.errors import UserError, check_choice, check_kind, nearest
from jax_entropy.fields import SEED

_RATE = "optimizer.learning_rate"
_LISTS: dict[str, tuple[type, str]] = {  # of a sweep, and what is in them
    "points": (Mapping, "mappings of fields to values"),
    "seeds": (int, "whole numbers"),
    "baselines": (str, "labels of points"),
    "pictures": (str, "names of figures"),
}
_LONGEST = 100  # characters of a folder's name that say what is in it


def product(fields: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values: {"architecture": ["SM", "SM+G"], "model.num_heads": [2, 4]} is four points."""
    _check_lists(fields)
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def zipped(fields: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The first value of every field, then the second of every field, and so on.

    Raises:
      UserError: the fields have different numbers of values, or no list of them.
    """
    _check_lists(fields)
    counts = {name: len(values) for name, values in fields.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"fields that are zipped need as many values each: {told}")
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def _check_lists(fields: Mapping[str, Sequence[Any]]) -> None:
    check_kind("fields", fields, Mapping, "a mapping of fields to lists of values")
    for name, values in fields.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UserError(f"{name}={values!r} must be a list of values")


class Tuning(NamedTuple):
    """The rule for the learning rate of a point: of `rates`, the one whose run ends with the lowest held-out loss.

    Where others end within 1 % of its perplexity, which is noise, the lowest of these rates is taken; where all runs
    diverged, the lowest of all. seed: of these runs, none of the reported ones. share: of the steps that they take.
    """

    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seed: int = 0
    share: float = 1.0


class Published(NamedTuple):
    """What the paper prints of a point: perplexity, gigabytes and minutes of its private execution."""

    perplexity: float | None = None
    gigabytes: float | None = None
    minutes: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Runs to compare.

    Attributes:
      points: fields of the configuration that differ from `config`'s, one mapping a point; `product` and `zipped` make
        lists of them, which add up.
      config: a config, or the name or path of its file; the point's architecture goes behind the colon.
      fields: of all points, where they differ from `config`'s; labels do not show them.
      seeds: of the reported runs.
      tuning: chooses the learning rate of each point that does not set it; None: the config's is taken.
      baselines: points by label that perplexities are divided by.
      published: the paper's figures by label.
      pictures: figures of a run by name ("head_entropy"), drawn for the first seed of each point; "comparison" draws
        these runs side by side.
      title: what the sweep shows, in a line.
    """

    points: Sequence[Mapping[str, Any]]
    config: str | ConfigDict = "quickstart"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (1, 2, 3)
    tuning: Tuning | None = None
    baselines: Sequence[str] = ()
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)
    pictures: Sequence[str] = ()
    title: str = ""


# The paper's experiments on Python code at four scales: what of a `Sweep` belongs to each.
SCALES: dict[str, dict[str, Any]] = {
    "short": dict(config="short", seeds=(1, 2, 3), tuning=Tuning((1e-3, 3e-3, 1e-2), share=0.5)),
    "small": dict(config="small", seeds=(1, 2, 3), tuning=Tuning((1e-3, 3e-3, 1e-2), share=0.25)),
    "gpu": dict(config="gpu", seeds=(1, 2, 3), tuning=Tuning((3e-4, 1e-3, 3e-3))),
    "full": dict(config="codeparrot", seeds=(1337,), tuning=None),
}


class PlannedRun(NamedTuple):
    """One training run of a sweep."""

    label: str
    seed: int
    config: ConfigDict
    path: Path

    @property
    def rate(self) -> float:
        return self.config.optimizer.learning_rate

    def __str__(self) -> str:
        return f"{self.label}, rate {self.rate:g}, seed {self.seed}"


class Point(NamedTuple):
    """A point of a sweep: its label, its config, whether its learning rate is to be chosen, and what folders say."""

    label: str
    config: ConfigDict
    tuned: bool
    name: str

    def run(self, folder: Path, seed: int, rate: float | None = None, share: float = 1.0) -> PlannedRun:
        """Its run of a seed, in a folder of its own in `folder`; at its config's learning rate where none is given."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        config.optimizer.learning_rate = config.optimizer.learning_rate if rate is None else rate
        config.train.num_steps = max(1, round(share * config.train.num_steps))
        of_rate = repr(float(config.optimizer.learning_rate)).removesuffix(".0")
        return PlannedRun(self.label, seed, config, folder / f"{self.name}-rate{of_rate}-seed{seed}")


def load_sweep(name: str, scale: str) -> Sweep:
    """The sweep of a file, named by its path or, of those that come along, by its name.

    Raises:
      UserError: there is no such file or scale, or the file raises or returns something else.
    """
    check_choice("scale", scale, SCALES)
    path = find(name, bundled("sweeps"), "sweep")
    with explained(path, "sweep"):
        get_sweep = function_of(path, "get_sweep")
        try:
            inspect.signature(get_sweep).bind(scale)
        except TypeError:
            raise UserError(f"get_sweep of {path} must take a scale: def get_sweep(scale): …") from None
        found = get_sweep(scale)
    if not isinstance(found, Sweep):
        raise UserError(f"get_sweep of {path} returns {type(found).__name__}, not a Sweep; see docs/sweeps.md")
    return found


def points_of(sweep: Sweep, fields: Mapping[str, Any]) -> list[Point]:
    """The points of a sweep with their configs, all of them checked.

    Args:
      fields: of every run: {"train.num_steps": 500}; a point's own win.
    Raises:
      UserError: something in it cannot work.
    """
    check_kind("fields", fields, Mapping, "a mapping of fields to values")
    _check(sweep, fields)
    points = [_point(sweep, point, fields) for point in sweep.points]
    labels = [point.label for point in points]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two points of the sweep are the same: {label}")
    for kind, named in (("baselines", sweep.baselines), ("published", sweep.published)):
        for label in named:
            if label not in labels:
                raise UserError(f"the sweep's {kind} names {label!r}, which is no point of it{nearest(label, labels)}")
    for point in points:
        if point.tuned:
            trial = point.run(Path(), sweep.tuning.seed, share=sweep.tuning.share).config
            try:
                check(trial)
            except UserError as error:
                raise UserError(
                    f"{point.label}: a trial of its rate has {trial.train.num_steps} steps, a share of "
                    f"{sweep.tuning.share:g}, and {error}"
                ) from None
    names = [point.name for point in points]  # of which two may be the same, though the labels are not
    return [
        point._replace(name=_with_digest(point.name, point.label)) if point.name in names[:i] else point
        for i, point in enumerate(points)
    ]


def _folder_name(label: str) -> str:
    """A label as far as it can be the name of a folder."""
    name = re.sub(r"[^\w.+=^-]+", "_", label).strip("_")
    return name if len(name) <= _LONGEST else _with_digest(name, label)


def _with_digest(name: str, label: str) -> str:
    return f"{name[:_LONGEST]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _check(sweep: Sweep, fields: Mapping[str, Any]) -> None:
    """Checks what is not a field of the configuration; `fields` are those of every run.

    Raises:
      UserError: it cannot work.
    """
    for name, (kind, what) in _LISTS.items():
        values = getattr(sweep, name)
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UserError(f"the sweep's {name}={values!r} must be a list of {what}")
        if wrong := [value for value in values if not isinstance(value, kind)]:
            raise UserError(f"the sweep's {name} must be {what}, not {wrong[0]!r}")
    for name in ("fields", "published"):
        if not isinstance(value := getattr(sweep, name), Mapping):
            raise UserError(f"the sweep's {name}={value!r} must be a mapping")
    if wrong := [value for value in sweep.published.values() if not isinstance(value, Published)]:
        raise UserError(f"the sweep's published must be Published(…), not {wrong[0]!r}")
    if not isinstance(sweep.config, str | os.PathLike | ConfigDict):
        raise UserError(f"the sweep's config={sweep.config!r} must be a file, by path or name, or a ConfigDict")
    if not sweep.points:
        raise UserError("the sweep has no points; product and zipped make lists of them")
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds) or not all(map(SEED.holds, sweep.seeds)):
        raise UserError(f"the sweep's seeds={tuple(sweep.seeds)} must be different, at least one, from 0 to 2^64 − 1")
    if any("seed" in fields for fields in (*sweep.points, sweep.fields, fields)):
        raise UserError(f"the sweep's seeds={tuple(sweep.seeds)} are those of its runs; seed is no field of a point")
    tuning = sweep.tuning
    if tuning is None:
        return
    if not isinstance(tuning, Tuning):
        raise UserError(f"the sweep's tuning={tuning!r} must be Tuning(rates, seed, share), or None")
    if tuning.seed in sweep.seeds:
        raise UserError(f"the sweep's tuning.seed={tuning.seed} is one of the reported seeds={tuple(sweep.seeds)}")
    rates = tuning.rates if isinstance(tuning.rates, Sequence) else ()
    if (
        not rates
        or not all(isinstance(rate, numbers.Real) and rate > 0 for rate in rates)
        or len({*rates}) < len(rates)
    ):
        raise UserError(
            f"the sweep's tuning.rates={tuning.rates!r} must be different numbers above 0, at least one of them"
        )
    if not isinstance(tuning.seed, int) or not SEED.holds(tuning.seed):
        raise UserError(f"the sweep's tuning.seed={tuning.seed!r} must be a whole number from 0 to 2^64 − 1")
    if not isinstance(tuning.share, numbers.Real) or not 0 < tuning.share <= 1:
        raise UserError(f"the sweep's tuning.share={tuning.share} must be above 0 and at most 1")


def _point(sweep: Sweep, point: Mapping[str, Any], fields: Mapping[str, Any]) -> Point:
    own = {name: str(value) for name, value in point.items()}
    values = {name: str(value) for name, value in sweep.fields.items()} | dict(fields) | own
    architecture = values.pop("architecture", None)
    if isinstance(sweep.config, ConfigDict):
        config = sweep.config.copy_and_resolve_references()
        config.architecture = architecture or config.architecture
    else:
        config = load_config(f"{sweep.config}:{architecture}" if architecture else str(sweep.config))
    check(change(config, values))
    differing = [f"{name.rpartition('.')[2]}={text}" for name, text in own.items() if name != "architecture"]
    label = ", ".join([config.architecture, *differing])
    return Point(label, config, sweep.tuning is not None and _RATE not in values, _folder_name(label))
