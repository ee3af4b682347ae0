"""JSON messages between processes that trust each other's certificates and nothing else, over mutual TLS.

Shapes, settings and lengths go over this line; shares go over the engine's own links, under the same certificates.
"""

import select
import socket
import ssl
import time
from typing import NamedTuple

from jax_entropy.errors import UserError
from jax_entropy.private.engine import tls
from jax_entropy.private.session import messages
from jax_entropy.private.session.keys import Keys

HANDSHAKE_SECONDS = 8
_WELCOME = b"jax_entropy\n"
_LONGEST_MESSAGE = 1 << 26  # bytes; a tokenizer is the largest


class BusyError(UserError):
    """The other party has accepted a connection and not finished its handshake."""


class Line:
    """Messages between two processes.

    Raises:
      UserError: in a sentence: the other is gone or silent.
    """

    def __init__(
        self, connection: socket.socket, keys: Keys | None, peer: str, *, server: bool, timeout: float
    ) -> None:
        self.timeout, self._buffer = timeout, bytearray()
        connection.settimeout(HANDSHAKE_SECONDS)
        try:
            if keys:
                context = keys.context(peer, server=server)
                connection, _ = tls.shake_hands(connection, context, keys.accepted(peer), server=server)
            # only what the server says first tells a client that its own certificate was accepted
            if server:
                connection.sendall(_WELCOME)
            elif (heard := connection.recv(len(_WELCOME))) != _WELCOME:
                raise UserError(f"the {peer} {'does not speak this protocol' if heard else 'is gone'}")
        except BaseException as error:
            connection.close()
            raise _refused(error, peer) from None
        connection.settimeout(timeout)
        self.connection, self.peer = connection, peer

    def fileno(self) -> int:
        return self.connection.fileno()

    def is_open(self) -> bool:
        """Whether the other end is still there, as far as it has said."""
        try:
            while select.select([self.connection], [], [], 0)[0]:
                self.read_available()
        except UserError:
            return False
        return True

    def send(self, message: NamedTuple) -> None:
        """Sends one of `messages`."""
        try:
            self.connection.sendall(messages.write(message))
        except OSError:
            raise UserError(f"the {self.peer} is gone") from None

    def receive(self, *kinds: type[messages.Message], timeout: float | None = None) -> messages.Message:
        """The next message, of one of these kinds, waited for `timeout` s."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            pending = isinstance(self.connection, ssl.SSLSocket) and self.connection.pending()
            if not pending and (left <= 0 or not select.select([self.connection], [], [], left)[0]):
                raise UserError(f"the other party said nothing for {limit:.0f} s")
            self.read_available()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return messages.read(bytes(line), *kinds)

    def read_available(self) -> None:
        """Takes in what has arrived.

        Raises:
          UserError: the other party has ended the connection.
        """
        try:
            data = self.connection.recv(1 << 16)
        except ssl.SSLError as error:
            raise _refused(error, self.peer) from None
        except (TimeoutError, OSError):
            data = b""
        self._buffer += data
        if not data:
            raise UserError(f"the {self.peer} is gone")
        if len(self._buffer) > _LONGEST_MESSAGE:
            raise UserError("the other party does not speak this protocol")

    def close(self) -> None:
        self.connection.close()


def _refused(error: BaseException, peer: str) -> BaseException:
    """What went wrong in a handshake with a party of this role, as a sentence."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return UserError(f"the {peer}'s certificate is refused: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        if "alert" in reason or "unknown ca" in reason:
            return UserError(f"the {peer} refuses this one's certificate ({reason})")
        return UserError(f"the {peer} does not speak TLS as expected ({reason})")
    if isinstance(error, TimeoutError):
        return BusyError(
            f"the {peer} did not finish its handshake within {HANDSHAKE_SECONDS} s; perhaps only one of the two "
            "uses TLS"
        )
    return UserError(f"the {peer} is gone") if isinstance(error, OSError) else error


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections.

    Raises:
      UserError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason, _, _ = str(error.strerror or error).partition(" (while attempting")  # and the address again
        raise UserError(f"{host}:{port} cannot be had: {reason}") from None


def check_free(host: str, port: int) -> None:
    """Checks that a party's two ports can be had: the one that it is spoken to on, and the engine's after it.

    Raises:
      UserError: one cannot.
    """
    listen(host, port).close()
    try:
        listen(host, port + 1).close()
    except UserError as error:
        raise UserError(f"{error}; the engine needs the port after {port}") from None


def connect(host: str, port: int, keys: Keys | None, *, peer: str = "server", patience: float, timeout: float) -> Line:
    """A line to the server, or another `peer`, tried for `patience` s.

    Raises:
      UserError: there is none, or certificates are refused.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return Line(socket.create_connection((host, port), timeout=5), keys, peer, server=False, timeout=timeout)
        except BusyError:
            if time.monotonic() > deadline:
                raise
        except UserError:
            raise
        except OSError as error:
            if time.monotonic() > deadline:
                command = "assist" if peer == "assistant" else "serve"
                raise UserError(
                    f"no {peer} at {host}:{port} ({error.strerror or error}); start `jax-entropy private {command}` "
                    "there"
                ) from None
            time.sleep(0.3)
