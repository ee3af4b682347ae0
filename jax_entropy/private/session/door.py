"""Where clients come in: all of them are heard at once and answered one after another, and each knows how many wait.

A stranger, or a client that says nothing, keeps nobody waiting.
"""

import contextlib
import socket
import threading
from collections.abc import Callable

import jax

from jax_entropy.errors import UserError
from jax_entropy.private.engine.callers import hear_all
from jax_entropy.private.session.keys import Keys
from jax_entropy.private.session.line import Line
from jax_entropy.private.session.messages import Hello, Queued, Refusal

GREETING = "jax_entropy private 5"
_HELLO_SECONDS = 10


class Door:
    """A listening socket and those who have come in through it."""

    def __init__(
        self, listening: socket.socket, keys: Keys | None, *, timeout: int, notify: Callable[[str], None]
    ) -> None:
        self.keys, self.timeout, self.notify = keys, timeout, notify
        self.waiting: list[tuple[Line, str]] = []
        self.changed, self.is_busy = threading.Condition(), False
        threading.Thread(target=hear_all, args=(listening, self._hear), daemon=True).start()

    def next(self) -> tuple[Line, str]:
        """The client that has waited longest, and its address; waits until there is one."""
        with self.changed:
            self.is_busy = False
            while True:
                self._clean()
                if self.waiting:
                    break
                self.changed.wait()
            self.is_busy, found = True, self.waiting.pop(0)
            for ahead, (line, _) in enumerate(self.waiting, 1):
                with contextlib.suppress(UserError):  # gone since; the next look finds it
                    line.send(Queued(ahead))
        return found

    def _clean(self) -> None:
        """Forgets those who are gone."""
        for entry in [entry for entry in self.waiting if not entry[0].is_open()]:
            self.waiting.remove(entry)
            entry[0].close()
            self.notify(f"{entry[1]} waits no longer")

    def _hear(self, connection: socket.socket, peer: str) -> None:
        """Shakes hands with one who has come, and lets it wait."""
        try:
            line = Line(connection, self.keys, "client", server=True, timeout=self.timeout)
        except UserError as error:
            return self.notify(f"refused a connection from {peer}: {error}")
        try:
            hello = line.receive(Hello, timeout=_HELLO_SECONDS)
            if hello != Hello(GREETING, jax.__version__):
                line.send(Refusal(f"this party runs {GREETING!r} on jax {jax.__version__}"))
                raise UserError("its version differs")
            with self.changed:
                self._clean()
                if ahead := len(self.waiting) + self.is_busy:
                    line.send(Queued(ahead))
                    self.notify(f"{peer} waits; {ahead} before it")
                self.waiting.append((line, peer))
                self.changed.notify_all()
        except UserError as error:
            line.close()
            self.notify(f"refused {peer}: {error}")
