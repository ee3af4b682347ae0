"""Starts a command, and again all of it when it dies: `python -m jax_entropy.supervise --restart=5 -- COMMAND …`.

A killed process takes its peers down without a Python exception, so nothing inside a run can do this. On a pod each
host has a supervisor; `launch/local.sh --restart` has one above all of its processes. Needs the standard library only.
"""

import argparse
import collections
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

LONGEST = 300.0  # seconds of pause at most
_SIGNALS = {number.value: number.name for number in signal.Signals}
HEALTHY = 600.0  # seconds after which an attempt counts as a good one, and the count starts anew


class Supervisor:
    """Restarts a command until it ends with 0 or 2, a signal to the supervisor, or `restart` failures in a row."""

    def __init__(self, command: Sequence[str], restart: int = 10, backoff: float = 1.0) -> None:
        self.command, self.restart, self.backoff = list(command), restart, backoff
        self.process, self.wanted, self.signals = None, False, collections.deque()

    def run(self) -> int:
        """Starts and restarts to the end; returns the command's exit code, or 128 + the signal that ended it."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._receive) for number in numbers}
        failures = 0
        try:
            while True:
                begin = time.monotonic()
                code = self._attempt()
                if self.wanted or code in (0, 2):
                    return code
                failures = 1 if time.monotonic() - begin > HEALTHY else failures + 1
                how = f"was killed by {_SIGNALS[code - 128]}" if code - 128 in _SIGNALS else f"ended with code {code}"
                if failures > self.restart:
                    _say(f"the command {how}, {failures} times in a row; no more restarts")
                    return code
                pause = min(self.backoff * 2 ** min(failures - 1, 20), LONGEST)
                _say(f"the command {how}; restart {failures} of {self.restart} in {pause:g} s")
                if self._wait(pause):
                    return code
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _attempt(self) -> int:
        # a group of its own: a signal reaches it once, from here, and what is left of it can be removed
        self.process = subprocess.Popen(self.command, start_new_session=True)
        self._pass_on()
        code = self.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return code if code >= 0 else 128 - code

    def _wait(self, seconds: float) -> bool:
        """Pauses; whether a signal came meanwhile."""
        end = time.monotonic() + seconds
        while not self.wanted and time.monotonic() < end:
            time.sleep(min(0.1, max(0.0, end - time.monotonic())))
        return bool(self.wanted)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self.signals.append(number)
        self._pass_on()

    def _pass_on(self) -> None:
        """Each signal once: a run obeys a second one at once, without saving."""
        while self.process and self.process.poll() is None and self.signals:
            self.process.send_signal(self.signals.popleft())


def _say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on a mistake, where argparse writes several."""
        self.exit(2, f"supervise: {message}; usage: {self.usage}\n")


def _number(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Reads a finite number of this kind that is not negative."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf"):
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} of at least 0")
        return value

    return read


def main(argv: Sequence[str]) -> int:
    """Parses the options and supervises; 2 for a mistake in them."""
    parser = _Parser(
        usage="python -m jax_entropy.supervise [--restart=N] [--backoff=SECONDS] -- COMMAND [ARGUMENT ...]",
        description="Starts a command, and again all of it when it dies.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--restart", type=_number(int), default=10, metavar="N", help="failures in a row that are forgiven"
    )
    parser.add_argument(
        "--backoff", type=_number(float), default=1.0, metavar="SECONDS", help="seconds of pause, doubled each time"
    )
    dashes = argv.index("--") if "--" in argv else len(argv)
    options, command = parser.parse_args(argv[:dashes]), argv[dashes + 1 :]
    if not command:
        parser.error("the command is missing")
    try:
        return Supervisor(command, options.restart, options.backoff).run()
    except OSError as error:
        _say(f"{command[0]} cannot be started: {error.strerror or error}")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
