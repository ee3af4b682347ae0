"""Two real parties: `serve` holds the weights, `ask` the prompt, and neither gets what the other has.

Both make their programs from the public shape themselves, so that neither runs code of the other's.
"""

import dataclasses
import socket
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Engine, Link, Setting
from jax_entropy.private.program.export import Export
from jax_entropy.private.program.stage import Shape, Steps
from jax_entropy.private.session.inference import CLIENT, SERVER, PrivateModel, check_request, generate
from jax_entropy.private.session.line import Keys, Line, connect

_GREETING = "jax_entropy private 2"


def serve(
    door: socket.socket, exported: Export, tokenizer: str, setting: Setting, keys: Keys | None, *,
    sessions: int, timeout: int, notify: Callable[[str], None],
) -> None:  # fmt: skip
    """Answers clients one after another; what is wrong with one of them is said, and the next is waited for.

    Args:
      door: a listening socket; the port after its own is the engine's.
      tokenizer: the JSON of the model's tokenizer, which the client gets.
      sessions: number of clients to answer; 0: until interrupted.
      timeout: seconds for which the other party may be silent.
    """
    answered, engine_port = 0, door.getsockname()[1] + 1
    while not sessions or answered < sessions:
        connection, (peer, *_) = door.accept()
        try:
            line = Line(connection, keys, server=True, timeout=timeout)
        except UserError as error:
            notify(f"refused a connection from {peer}: {error}")
            continue
        try:
            prompts = _answer(line, exported, tokenizer, setting, keys, engine_port, timeout)
            notify(f"answered {prompts} prompts of {peer}")
            answered += 1
        except UserError as error:
            notify(f"the session with {peer} has ended: {error}")
        except (KeyError, TypeError, ValueError) as error:  # what the client sent is not what it should be
            notify(f"the session with {peer} has ended: the other party does not speak this protocol ({error!r})")
        finally:
            line.close()


def _answer(
    line: Line, exported: Export, tokenizer: str, setting: Setting, keys: Keys | None, port: int, timeout: int
) -> int:
    """One client's prompts; returns their number."""
    hello = line.receive(10)
    if hello.get("greeting") != _GREETING or hello.get("jax") != jax.__version__:
        line.send(dict(error=f"this server runs {_GREETING!r} on jax {jax.__version__}"))
        raise UserError("its version differs")
    types = {name: value.shape for name, value in exported.weights.items()}
    line.send(dict(
        shape=dataclasses.asdict(exported.shape), types=types, setting=setting._asdict(), tokenizer=tokenizer,
        port=port,
    ))  # fmt: skip
    if not line.receive(timeout).get("agreed"):
        raise UserError("the client does not agree")
    link = _link(SERVER, line, hello, port, keys, timeout)
    with Engine(setting, link, peer=line) as engine:
        model = PrivateModel(engine, exported.shape, types)
        model.share_weights(exported.weights)
        prompts = 0
        while line.receive(max(timeout, 600)).get("more"):
            generate(model, None)
            prompts += 1
        return prompts


class Question(NamedTuple):
    """A prompt as tokens, how to go on from it, and whom to tell: each token as it comes, and the end."""

    tokens: Sequence[int]
    choose: Callable[[np.ndarray], int]
    end_of_text: int
    notify: Callable[[int], None]
    end: Callable[[], None]


def ask(
    server: tuple[str, int], port: int, keys: Keys | None, num_tokens: int, *,
    questions: Callable[[str, Shape, Setting], Sequence[Question]], reveal: str, timeout: int, patience: float,
) -> PrivateModel:  # fmt: skip
    """Asks the model of `serve` one question after another.

    Args:
      server: host and port of its door.
      port: where the server's engine reaches this one.
      questions: given the server's tokenizer as JSON, its model's shape and its setting, what to ask; may raise
        UserError if these will not do. All questions are checked before anything is shared.
      timeout: seconds for which the server may be silent; patience: seconds to wait for its start.
    """
    line = connect(*server, keys, patience=patience, timeout=timeout)
    try:
        line.send(dict(greeting=_GREETING, jax=jax.__version__, port=port))
        hello = line.receive()
        if "error" in hello:
            raise UserError(f"{hello['error']}, and this is jax {jax.__version__}")
        try:
            shape, setting = _shape(hello["shape"]), Setting(**hello["setting"]).check()
        except (KeyError, TypeError) as error:
            raise UserError(f"the other party does not speak this protocol ({error!r})") from None
        asked = questions(hello["tokenizer"], shape, setting)
        for number, question in enumerate(asked, 1):
            try:
                check_request(shape, question.tokens, num_tokens, reveal)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}" if len(asked) > 1 else str(error)) from None
        line.send(dict(agreed=True))
        link = _link(CLIENT, line, hello, port, keys, timeout)
        with Engine(setting, link, peer=line) as engine:
            model = PrivateModel(engine, shape, {name: tuple(dims) for name, dims in hello["types"].items()})
            model.share_weights(None)
            for question in asked:
                line.send(dict(more=True))
                generate(
                    model, question.tokens, num_tokens, choose=question.choose, end_of_text=question.end_of_text,
                    reveal=reveal, notify=question.notify,
                )  # fmt: skip
                question.end()
            line.send(dict(more=False))
            return model
    finally:
        line.close()


def _link(rank: int, line: Line, hello: dict[str, Any], port: int, keys: Keys | None, timeout: int) -> Link:
    """The engines reach each other at the addresses that the line goes between, and the ports of both."""
    if type(hello.get("port")) is not int:
        raise UserError("the other party does not speak this protocol")
    own, other = (f"{host}:{at}" for host, at in zip(line.hosts(), (port, hello["port"]), strict=True))
    return Link(
        rank, (own, other) if rank == CLIENT else (other, own), keys.for_engine() if keys else None,
        timeout_seconds=timeout, connect_seconds=20,
    )  # fmt: skip


def _shape(fields: dict[str, Any]) -> Shape:
    return Shape(**fields | dict(steps=Steps(**fields["steps"]), weights=tuple(fields["weights"])))
