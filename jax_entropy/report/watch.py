"""The page of a run, served to this machine while the run trains; the page asks again and shows what is new."""

import contextlib
import errno
import hashlib
import http.server
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_entropy.errors import UserError, check_number
from jax_entropy.report.history import has_died, read_history
from jax_entropy.report.page import page, waiting
from jax_entropy.runs.workdir import Workdir

HOST = "127.0.0.1"
_FILES = ("config", "metrics", "incidents", "status", "private", "samples")  # what a page is made of


def watch(workdir: str | Path, notify: Callable[[str], None] = print, *, port: int = 8008) -> None:
    """Serves the page until it is interrupted (Ctrl-C).

    Args:
      workdir: of a run, also of one that has logged nothing yet.
      notify: is told the address.
      port: on 127.0.0.1; 0: any that is free.
    Raises:
      UserError: there is no run, or the port cannot be used.
    """
    with contextlib.suppress(KeyboardInterrupt), serve(workdir, port) as server:
        notify(f"http://{HOST}:{server.server_port}/ follows {Workdir(workdir).path}; Ctrl-C ends it")
        server.serve_forever(poll_interval=0.2)


def serve(workdir: str | Path, port: int) -> http.server.ThreadingHTTPServer:
    """The server, not yet started; arguments and errors as for `watch`."""
    workdir = Workdir(workdir)
    check_number("port", port, -math.inf)
    if not workdir.exists() and workdir.read_status() is None:
        raise UserError(f"workdir {str(workdir.path)!r} holds no run yet; start one there with `jax-entropy train`")
    if not 0 <= port < 65536:
        raise UserError(f"port={port} must be between 1 and 65535, or 0 for any that is free")
    try:
        return _Server((HOST, port), _handler(_Pages(workdir)))
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise UserError(f"port={port} {reason}; take another, or 0 for any that is free") from None


class _Server(http.server.ThreadingHTTPServer):
    """Says nothing of a browser that has gone before it was answered."""

    def handle_error(self, *request: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*request)


class _Pages:
    """The newest page of a run, made again only where its files have changed."""

    def __init__(self, workdir: Workdir) -> None:
        self.workdir, self.seen, self.died, self.tag, self.content = workdir, None, False, "", b""
        self.lock = threading.Lock()  # each request has a thread

    def newest(self) -> tuple[str, bytes]:
        """The page, and a name for what it says; made once, however many ask at the same time."""
        with self.lock:
            return self._newest()

    def _newest(self) -> tuple[str, bytes]:
        seen = [_changed(getattr(self.workdir, name)) for name in _FILES]
        # one that has died writes nothing more; it is asked once, so that one that starts again is not in its way
        died = (self.died and seen == self.seen) or has_died(self.workdir, self.workdir.read_status())
        if (seen, died) != (self.seen, self.died):
            try:
                text = page([read_history(self.workdir.path)], follow=True)
            except UserError as error:  # nothing is logged yet, or a file is just being written
                text = waiting(self.workdir.path.resolve().name, str(error))
            self.content = text.encode("utf-8", "backslashreplace")
            self.tag = f'"{hashlib.sha256(self.content).hexdigest()[:16]}"'
            self.seen, self.died = seen, died
        return self.tag, self.content


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_size
    except OSError:
        return None


def _handler(pages: _Pages) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers `GET /` with the page, for browsers of this machine."""

        server_version, sys_version = "jax_entropy", ""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").partition(":")[0]  # without a port where it is that of HTTP
            if host not in (HOST, "localhost"):  # a name of another site that was made to point here
                self.send_error(403, "only for this machine")
            elif self.path.partition("?")[0] != "/":
                self.send_error(404, "the page is at /")
            else:
                tag, content = pages.newest()
                same = self.headers.get("If-None-Match") == tag
                self.send_response(304 if same else 200)
                self.send_header("ETag", tag)
                self.send_header("Cache-Control", "no-store")
                if not same:
                    self.send_header("Content-Type", "text/html; charset=utf-8")
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not same:
                    self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Says nothing: a line every two seconds is no news."""

    return Handler
