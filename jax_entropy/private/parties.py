"""Two real parties: `serve` holds the weights, `ask` the prompt, and neither gets what the other has.

Both make their programs from the public shape themselves, so that neither runs code of the other's.
"""

import dataclasses
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jax_entropy.errors import UserError
from jax_entropy.private.engine import Engine, Link, Setting
from jax_entropy.private.export import Export
from jax_entropy.private.inference import CLIENT, SERVER, PrivateModel, generate
from jax_entropy.private.link import Keys, Line, connect
from jax_entropy.private.stage import Shape, Steps

_GREETING = "jax_entropy private 1"


def serve(
    door: socket.socket, exported: Export, tokenizer: str, setting: Setting, keys: Keys | None, *,
    engine_port: int, sessions: int, timeout: int, notify: Callable[[str], None],
) -> None:  # fmt: skip
    """Answers clients one after another; what is wrong with one of them is said, and the next is waited for.

    Args:
      door: a listening socket.
      tokenizer: the JSON of the model's tokenizer, which the client gets.
      engine_port: of the engine's own link, on the same host.
      sessions: number of clients to answer; 0: until interrupted.
      timeout: seconds for which the other party may be silent.
    """
    answered, host = 0, door.getsockname()[0]
    while not sessions or answered < sessions:
        connection, (peer, *_) = door.accept()
        try:
            line = Line(connection, keys, server=True, timeout=timeout)
        except UserError as error:
            notify(f"refused a connection from {peer}: {error}")
            continue
        try:
            prompts = _answer(line, exported, tokenizer, setting, keys, f"{host}:{engine_port}", timeout)
            notify(f"answered {prompts} prompts of {peer}")
            answered += 1
        except UserError as error:
            notify(f"the session with {peer} has ended: {error}")
        finally:
            line.close()


def _answer(
    line: Line, exported: Export, tokenizer: str, setting: Setting, keys: Keys | None, own: str, timeout: int
) -> int:
    """One client's prompts; returns their number."""
    hello = line.receive(10)
    if hello.get("greeting") != _GREETING or hello.get("jax") != jax.__version__:
        line.send(dict(error=f"this server runs {_GREETING!r} on jax {jax.__version__}"))
        raise UserError("its version differs")
    types = {name: value.shape for name, value in exported.weights.items()}
    line.send(dict(
        shape=dataclasses.asdict(exported.shape), types=types, setting=setting._asdict(), tokenizer=tokenizer,
        engine=own,
    ))  # fmt: skip
    with Engine(setting, _link(SERVER, hello["engine"], own, keys, timeout), peer=line, timeout=timeout) as engine:
        model = PrivateModel(engine, exported.shape, types)
        model.share_weights(exported.weights)
        prompts = 0
        while line.receive(max(timeout, 600)).get("more"):
            generate(model, None)
            prompts += 1
        return prompts


def ask(
    server: tuple[str, int], own: str, keys: Keys | None, num_tokens: int, *,
    prompts: Callable[[Any], Iterable[Sequence[int]]], end_of_text: Callable[[], int], reveal: str, timeout: int,
    patience: float, notify: Callable[[int], None],
    new_choose: Callable[[], Callable[[np.ndarray], int]] = lambda: np.argmax,
) -> tuple[list[list[int]], PrivateModel]:  # fmt: skip
    """The tokens after each prompt, from the model of `serve`.

    Args:
      server: host and port of its door.
      own: HOST:PORT where the server's engine reaches this one.
      prompts: given the server's tokenizer as JSON, the prompts as tokens.
      new_choose: gives each prompt's `choose`.
      timeout: seconds for which the server may be silent; patience: seconds to wait for its start.
    """
    line = connect(*server, keys, patience=patience, timeout=timeout)
    try:
        line.send(dict(greeting=_GREETING, jax=jax.__version__, engine=own))
        hello = line.receive(10)
        if "error" in hello:
            raise UserError(f"{hello['error']}, and this is jax {jax.__version__}")
        shape, setting = _shape(hello["shape"]), Setting(**hello["setting"])
        all_ids = list(prompts(hello["tokenizer"]))
        with Engine(setting, _link(CLIENT, own, hello["engine"], keys, timeout), peer=line, timeout=timeout) as engine:
            model = PrivateModel(engine, shape, {name: tuple(dims) for name, dims in hello["types"].items()})
            model.share_weights(None)
            answers = []
            for ids in all_ids:
                line.send(dict(more=True))
                answers.append(
                    generate(
                        model,
                        ids,
                        num_tokens,
                        choose=new_choose(),
                        end_of_text=end_of_text(),
                        reveal=reveal,
                        notify=notify,
                    )
                )
            line.send(dict(more=False))
            return answers, model
    finally:
        line.close()


def _link(rank: int, client: str, server: str, keys: Keys | None, timeout: int) -> Link:
    return Link(
        rank, (client, server), keys.for_engine() if keys else None, timeout_seconds=timeout, connect_seconds=20
    )


def _shape(fields: dict[str, Any]) -> Shape:
    return Shape(**fields | dict(steps=Steps(**fields["steps"]), weights=tuple(fields["weights"])))
