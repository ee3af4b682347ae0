"""Those who connect to a listening socket: each is heard in a thread of its own, and strangers cannot use it up.

Standard library only: the engine's own Python runs it, too.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

AT_ONCE = 64  # callers who are heard at the same time


def hear_all(listening: socket.socket, hear: Callable[[socket.socket, str], None]) -> None:
    """Calls `hear(connection, peer)` for everyone who connects, until the socket is closed.

    Where too many are heard at once, the one who has taken longest is cut off: who means it has said all that is asked
    of him long before.
    """
    heard, lock = [], threading.Lock()  # a handle of each connection, the oldest first

    def hear_one(connection: socket.socket, peer: str, handle: socket.socket) -> None:
        try:
            hear(connection, peer)
        finally:
            with lock:
                heard.remove(handle)
                handle.close()

    while True:
        try:
            connection, (peer, *_) = listening.accept()
            handle = connection.dup()  # TLS takes the connection itself
        except OSError:
            if listening.fileno() < 0:  # closed
                return
            time.sleep(0.1)  # too many open files, or gone before it was accepted; the next one is heard
            continue
        with lock:
            heard.append(handle)
            if len(heard) > AT_ONCE:
                with contextlib.suppress(OSError):
                    heard[-AT_ONCE - 1].shutdown(socket.SHUT_RDWR)
        threading.Thread(target=hear_one, args=(connection, peer, handle), daemon=True).start()
