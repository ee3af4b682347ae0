"""Two real parties: `serve` holds the weights, `ask` the prompt, and neither gets what the other has.

Both make their programs from the blueprint themselves, so that neither runs code of the other's.
"""

import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Engine, Link, Setting
from jax_entropy.private.program.export import Export
from jax_entropy.private.session.inference import CLIENT, SERVER, PrivateModel, check_request, generate
from jax_entropy.private.session.line import Keys, Line, connect
from jax_entropy.private.session.messages import Agreement, Hello, More, Offer, Refusal

GREETING = "jax_entropy private 3"


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
        finally:
            line.close()


def _answer(
    line: Line, exported: Export, tokenizer: str, setting: Setting, keys: Keys | None, port: int, timeout: int
) -> int:
    """Answers one client's prompts and returns their number."""
    hello = line.receive(Hello, timeout=10)
    if (hello.greeting, hello.jax) != (GREETING, jax.__version__):
        line.send(Refusal(f"this server runs {GREETING!r} on jax {jax.__version__}"))
        raise UserError("its version differs")
    line.send(Offer(exported.blueprint, setting, tokenizer, port))
    if not line.receive(Agreement).agreed:
        raise UserError("the client does not agree")
    with Engine(setting, _link(SERVER, line, port, hello.port, keys, timeout), peer=line) as engine:
        model, prompts = PrivateModel.of(engine, exported), 0
        while line.receive(More, timeout=max(timeout, 600)).more:
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
    questions: Callable[[str, ModelConfig, Setting], Sequence[Question]], reveal: str, timeout: int, patience: float,
) -> PrivateModel:  # fmt: skip
    """Asks the model of `serve` one question after another.

    Args:
      server: host and port of its door.
      port: where the server's engine reaches this one.
      questions: given the server's tokenizer as JSON, its model's config and its setting, what to ask; may raise
        UserError if these will not do. All questions are checked before anything is shared.
      timeout: seconds for which the server may be silent.
      patience: seconds to wait for its start.
    """
    line = connect(*server, keys, patience=patience, timeout=timeout)
    try:
        line.send(Hello(GREETING, jax.__version__, port))
        offer = line.receive(Offer, Refusal)
        if isinstance(offer, Refusal):
            raise UserError(f"the server refuses: {offer.error[:300]!a}; this is {GREETING!r} on jax {jax.__version__}")
        asked = questions(offer.tokenizer, offer.blueprint.config, offer.setting)
        for number, question in enumerate(asked, 1):
            try:
                check_request(offer.blueprint, question.tokens, num_tokens, reveal)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}" if len(asked) > 1 else str(error)) from None
        line.send(Agreement(True))
        with Engine(offer.setting, _link(CLIENT, line, port, offer.port, keys, timeout), peer=line) as engine:
            model = PrivateModel(engine, offer.blueprint)
            model.share_weights(None)
            for question in asked:
                line.send(More(True))
                generate(
                    model, question.tokens, num_tokens, choose=question.choose, end_of_text=question.end_of_text,
                    reveal=reveal, notify=question.notify,
                )  # fmt: skip
                question.end()
            line.send(More(False))
            return model
    finally:
        line.close()


def _link(rank: int, line: Line, port: int, other_port: int, keys: Keys | None, timeout: int) -> Link:
    """The engines reach each other at the addresses that the line goes between, and the ports of both."""
    if not 0 < other_port < 65536:
        raise UserError(f"the other party's engine cannot be at port {other_port}")
    own, other = (f"{host}:{at}" for host, at in zip(line.hosts(), (port, other_port), strict=True))
    return Link(
        rank, (own, other) if rank == CLIENT else (other, own), keys.for_engine() if keys else None,
        timeout_seconds=timeout, connect_seconds=20,
    )  # fmt: skip
