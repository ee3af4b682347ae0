"""What parties say to each other: records as JSON, none of which is used before every value in it fits its type.

A peer may send anything; whatever it is ends in a UserError or in a record that is sound by itself.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.program.blueprint import Blueprint
from jax_entropy.private.program.forward import forward
from jax_entropy.private.program.stage import TOKENS, external_inputs

_LARGEST_INTEGER = 1 << 24  # of a size, a port or a length


class Hello(NamedTuple):
    """The client's first words."""

    greeting: str
    jax: str


class Queued(NamedTuple):
    """How many clients are answered before this one."""

    ahead: int


class Refusal(NamedTuple):
    """Why the server goes no further."""

    error: str


class Offer(NamedTuple):
    """What the server runs: all that the client needs to make the same programs; `port` is its engine's."""

    blueprint: Blueprint
    setting: Setting
    tokenizer: str  # JSON
    port: int


class Task(NamedTuple):
    """What the client brings to the assistant: the server's program, and the port of the server's engine."""

    blueprint: Blueprint
    setting: Setting
    server_port: int


class Ready(NamedTuple):
    """The assistant's answer: the port of its engine."""

    port: int


class Agreement(NamedTuple):
    """The client's answer to an offer."""

    agreed: bool


class More(NamedTuple):
    """Whether the client has another prompt."""

    more: bool


class Prompt(NamedTuple):
    """What all know of a prompt: its tokens are so many, and what the client learns of each new one."""

    length: int
    reveal: str


class Progress(NamedTuple):
    """Whether the text has ended."""

    done: bool


Message = TypeVar("Message", bound=NamedTuple)


def write(message: NamedTuple) -> bytes:
    """A message as one line."""
    return json.dumps(_exactly(message)).encode() + b"\n"


def read(line: bytes, *kinds: type[Message]) -> Message:
    """The message of one of these kinds that a peer has sent.

    Raises:
      UserError: it is anything else.
    """
    try:
        fields = json.loads(line, parse_constant=_refuse)
        kind = next((kind for kind in kinds if isinstance(fields, dict) and {*fields} == {*kind._fields}), None)
        if kind is None:
            raise ValueError(f"no {' or '.join(kind.__name__ for kind in kinds)}")
        message = _convert(fields, kind)
        if isinstance(message, Offer | Task):
            _check_program(message.blueprint, message.setting)
        if isinstance(message, Task) and message.setting.num_parties != 3:
            raise UserError(f"protocol={message.setting.protocol!r} has nothing to assist in")
        return message
    except UserError as error:
        raise UserError(f"what the other party sends cannot be: {error}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"the other party does not speak this protocol ({str(error)[:200]})") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _convert(value: Any, kind: Any) -> Any:
    """The value as `kind`, a type of the annotations above.

    Raises:
      ValueError: it is not one.
    """
    if isinstance(kind, types.UnionType):
        return None if value is None and type(None) in kind.__args__ else _convert(value, kind.__args__[0])
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or {*value} != {*hints}:
            raise ValueError(f"no {kind.__name__}")
        return kind(**{name: _convert(value[name], hint) for name, hint in hints.items()})
    if typing.get_origin(kind) is Mapping and isinstance(value, dict):
        return {name: _convert(item, kind.__args__[1]) for name, item in value.items()}
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_convert(item, kind.__args__[0]) for item in value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and type(value) is int and abs(value) <= _LARGEST_INTEGER:
        return value
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is str and isinstance(value, str):
        value.encode()  # lone surrogates have no bytes
        return value
    raise ValueError(f"{repr(value)[:60]} where {getattr(kind, '__name__', kind)} belongs")


def _check_program(blueprint: Blueprint, setting: Setting) -> None:
    """Checks that the weights are those that the program reads, and that the setting has a meaning.

    Raises:
      UserError: a weight is missing or superfluous, or what `Setting.check` says.
    """
    config = blueprint.config
    if config.num_layers > len(blueprint.weights):
        raise UserError(f"{config} of {config.num_layers} layers with so few weights")
    _check_sizes(config)
    needed = {*external_inputs(forward(blueprint, 1)), *blueprint.given_away} - {TOKENS}
    if differing := sorted(needed ^ {*blueprint.weights}):
        raise UserError(f"the weight {differing[0]} of {config} is missing, or nothing reads it")
    setting.check()


def _check_sizes(config: ModelConfig) -> None:
    """Checks that a program of such a model can be made, by what its sizes multiply to there.

    Raises:
      UserError: it would take all memory, or for ever.
    """
    T, L = config.context_length, config.num_layers
    for what, count, most in (
        ("scores of a head in all layers", L * T * (T + config.num_slots), 1 << 28),
        ("heads in all layers", L * config.num_heads, 1 << 16),
        ("letters of Win(…) in all layers", L * len(config.window_pattern), 1 << 20),
    ):
        if count > most:
            raise UserError(f"a model with {count:,} {what}; a private program has at most {most:,}")


def _exactly(value: Any) -> Any:
    """Records as objects of their fields, all the way down; no digit of a number is lost."""
    if hasattr(value, "_asdict"):
        return {name: _exactly(item) for name, item in value._asdict().items()}
    if dataclasses.is_dataclass(value):
        return {field.name: _exactly(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {name: _exactly(item) for name, item in value.items()} if isinstance(value, Mapping) else value
