"""Real parties: `serve` holds the weights, `ask` the prompt, `assist` nothing, and none gets what another has.

All make their programs from the blueprint themselves, so that none runs code of another's.
"""

import contextlib
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Engine, Link, Setting
from jax_entropy.private.program.export import Export
from jax_entropy.private.session.door import GREETING, Door
from jax_entropy.private.session.inference import ASSISTANT, CLIENT, SERVER, PrivateModel, check_request, generate
from jax_entropy.private.session.keys import Keys
from jax_entropy.private.session.line import Line, connect
from jax_entropy.private.session.messages import (
    Agreement,
    Hello,
    Message,
    More,
    Offer,
    Queued,
    Ready,
    Refusal,
    Task,
)

CONNECT_SECONDS = 20


def serve(
    door: socket.socket, exported: Export, tokenizer: str, setting: Setting, keys: Keys | None, *,
    sessions: int, timeout: int, notify: Callable[[str], None],
) -> None:  # fmt: skip
    """Answers clients one after another; what is wrong with one of them is said, and the next is answered.

    Args:
      door: a listening socket; the port after its own is the engine's.
      tokenizer: the JSON of the model's tokenizer, which the client gets.
      sessions: number of clients to answer; 0: until interrupted.
      timeout: seconds for which another party may be silent.
    """
    listen = _engine_address(door)
    link = Link(SERVER, listen, (None,) * setting.num_parties, _files(keys), timeout, CONNECT_SECONDS)

    def answer(line: Line) -> int:
        line.send(Offer(exported.blueprint, setting, tokenizer, listen[1]))
        if not line.receive(Agreement).agreed:
            raise UserError("the client does not agree")
        with Engine(setting, link, lines=[line]) as engine:
            return _follow(PrivateModel.of(engine, exported), line)

    _answer_all(Door(door, keys, timeout=timeout, notify=notify), answer, sessions, notify)


def assist(
    door: socket.socket, server: str, keys: Keys | None, *, sessions: int, timeout: int, notify: Callable[[str], None]
) -> None:
    """Is the third party of sessions between clients and a server, one after another; it brings nothing.

    Args:
      door: a listening socket; the port after its own is the engine's.
      server: host of the server.
      sessions, timeout: as `serve`.
    """
    listen = _engine_address(door)

    def answer(line: Line) -> int:
        task = line.receive(Task)
        line.send(Ready(listen[1]))
        addresses = (None, (server, _port(task.server_port, "server")), None)
        link = Link(ASSISTANT, listen, addresses, _files(keys), timeout, CONNECT_SECONDS)
        with Engine(task.setting, link, lines=[line]) as engine:
            model = PrivateModel(engine, task.blueprint)
            model.share_weights(None)
            return _follow(model, line)

    _answer_all(Door(door, keys, timeout=timeout, notify=notify), answer, sessions, notify)


def _answer_all(door: Door, answer: Callable[[Line], int], sessions: int, notify: Callable[[str], None]) -> None:
    answered = 0
    while not sessions or answered < sessions:
        line, peer = door.next()
        try:
            prompts = answer(line)
            notify(f"answered {prompts} prompts of {peer}")
            answered += 1
        except UserError as error:
            notify(f"the session with {peer} has ended: {error}")
        except Exception:  # nobody foresaw it; the next client is answered even so
            notify(f"the session with {peer} has ended by a fault of this program:\n{traceback.format_exc()}")
        finally:
            line.close()


def _follow(model: PrivateModel, line: Line) -> int:
    """Takes part in what the client asks, and returns the number of its prompts."""
    prompts = 0
    while line.receive(More).more:
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
    server: tuple[str, int], assistant: tuple[str, int] | None, keys: Keys | None, num_tokens: int, *,
    questions: Callable[[str, ModelConfig, Setting], Sequence[Question]], reveal: str, timeout: int, patience: float,
    notify: Callable[[str], None],
) -> PrivateModel:  # fmt: skip
    """Asks the model of `serve` one question after another.

    Args:
      server: host and port of its door.
      assistant: the same of the third party's, for protocols that have one.
      questions: given the server's tokenizer as JSON, its model's config and its setting, what to ask; may raise
        UserError if these will not do. All questions are checked before anything is shared.
      timeout: seconds for which another party may be silent.
      patience: seconds to wait for the others' start.
      notify: called with a line on what is waited for.
    """
    with contextlib.ExitStack() as stack:
        line = stack.enter_context(_greeted(server, keys, "server", patience, timeout))
        offer = _first(line, Offer, "server", notify)
        if (offer.setting.num_parties == 3) != (assistant is not None):
            raise UserError(
                f"the server runs protocol={offer.setting.protocol!r}, which "
                + ("goes without an assistant" if assistant else "needs an assistant: start `private assist`, name it")
            )
        asked = questions(offer.tokenizer, offer.blueprint.config, offer.setting)
        for number, question in enumerate(asked, 1):
            try:
                check_request(offer.blueprint, question.tokens, num_tokens, reveal)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}" if len(asked) > 1 else str(error)) from None
        lines, addresses = [line], [None, (server[0], _port(offer.port, "server"))]
        if assistant:
            lines.append(stack.enter_context(_greeted(assistant, keys, "assistant", patience, timeout)))
            lines[1].send(Task(offer.blueprint, offer.setting, offer.port))
            ready = _first(lines[1], Ready, "assistant", notify)
            addresses.append((assistant[0], _port(ready.port, "assistant")))
        line.send(Agreement(True))
        link = Link(CLIENT, None, tuple(addresses), _files(keys), timeout, CONNECT_SECONDS)
        with Engine(offer.setting, link, lines=lines) as engine:
            model = PrivateModel(engine, offer.blueprint)
            model.share_weights(None)
            for question in asked:
                model.tell(More(True), More)
                generate(
                    model, question.tokens, num_tokens, choose=question.choose, end_of_text=question.end_of_text,
                    reveal=reveal, notify=question.notify,
                )  # fmt: skip
                question.end()
            model.tell(More(False), More)
            return model


@contextlib.contextmanager
def _greeted(address: tuple[str, int], keys: Keys | None, role: str, patience: float, timeout: int) -> Iterator[Line]:
    """A line to a party that has heard the client's first words."""
    line = connect(*address, keys, peer=role, patience=patience, timeout=timeout)
    try:
        line.send(Hello(GREETING, jax.__version__))
        yield line
    finally:
        line.close()


def _first(line: Line, kind: type[Message], role: str, notify: Callable[[str], None]) -> Message:
    """A party's first answer, after as many others as it answers before."""
    heard = line.receive(kind, Queued, Refusal)
    while isinstance(heard, Queued):
        notify(f"the {role} answers {heard.ahead} before this one")
        heard = line.receive(kind, Queued, Refusal, timeout=24 * 3600)
    if isinstance(heard, Refusal):
        raise UserError(f"the {role} refuses: {heard.error[:300]!a}; this is {GREETING!r} on jax {jax.__version__}")
    return heard


def _engine_address(door: socket.socket) -> tuple[str, int]:
    """Where the engine of a party listens: at the port after its door's."""
    host, port = door.getsockname()
    return host, port + 1


def _port(port: int, role: str) -> int:
    if not 0 < port < 65536:
        raise UserError(f"the {role}'s engine cannot be at port {port}")
    return port


def _files(keys: Keys | None) -> dict | None:
    return keys.for_engine() if keys else None
