"""Flags that the commands of private execution share, and how they are read."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

from jax_entropy.errors import UserError, nearest
from jax_entropy.private import engine
from jax_entropy.private.stage import Steps

SETTING = dict(
    protocol=("semi2k", "semi2k (two parties and a dealer) | aby3 (three parties) | cheetah (two parties)"),
    fraction_bits=(engine.Setting().fraction_bits, "of the 64 bits of a number"),
    exponent=(engine.Setting().exponent, "taylor | pade: how the exponential is computed"),
    exponent_iterations=(engine.Setting().exponent_iterations, "squarings of taylor"),
    without=("", "steps to switch off, separated by commas; 'all' exports the model plainly"),
)

SAMPLING = dict(
    temperature=(0.0, "of the sampling among revealed logits; 0 is greedy"),
    top_k=(0, "sample among the k likeliest tokens; 0: among all"),
    seed=(0, "of the sampling"),
)


def read_setting(values: Any) -> engine.Setting:
    """The engine's setting of a command's flags."""
    fields = ("protocol", "fraction_bits", "exponent", "exponent_iterations")
    return engine.Setting(**{name: getattr(values, name) for name in fields}).check()


def read_steps(without: str) -> Steps:
    """All steps but those named. Raises UserError for a name that is none."""
    names = [field.name for field in dataclasses.fields(Steps)]
    off = names if without == "all" else [name for name in without.split(",") if name]
    for name in off:
        if name not in names:
            raise UserError(f"--without={name!r} is not a step{nearest(name, [*names, 'all'])}")
    return Steps(**{name: name not in off for name in names})


def warn(line: str) -> None:
    print(line, file=sys.stderr)


def read_sampling(values: Any) -> Callable[[], Callable]:
    """Gives each text's `choose`, logits [V] → token. Raises UserError for options out of range."""
    from jax_entropy.private.inference import sampler

    if values.reveal == "token" and values.temperature:
        raise UserError(f"--temperature={values.temperature} needs --reveal=logits; inside, the likeliest is taken")
    new_choose = functools.partial(sampler, values.tokens, values.temperature, values.top_k, values.seed)
    new_choose()
    return new_choose
