"""Whoever connects is heard, however many strangers came before and whatever went wrong with one of them."""

import contextlib
import errno
import socket
import threading

import pytest

from jax_entropy.private.engine import callers


class Crowded(socket.socket):
    """A listening socket that twice has no file descriptor left for those who come."""

    fails = 2

    def accept(self):
        if self.fails:
            self.fails -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def echo(connection, peer):
    with connection, contextlib.suppress(OSError):
        connection.sendall(connection.recv(5))


@pytest.fixture
def address():
    with Crowded() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        threading.Thread(target=callers.hear_all, args=(door, echo), daemon=True).start()
        yield door.getsockname()


def ask(address):
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"hello")
        return connection.recv(5)


def test_an_accept_that_failed_is_not_the_last(address):
    assert ask(address) == b"hello"


def test_silent_strangers_give_way_to_who_comes_after_them(address, monkeypatch):
    monkeypatch.setattr(callers, "AT_ONCE", 3)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(8)]
        assert ask(address) == b"hello"
        assert [stranger.recv(1) for stranger in strangers[:5]] == [b""] * 5  # cut off
