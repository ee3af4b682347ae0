"""SIGTERM, Ctrl-C or a closed terminal as a wish to stop after what is being done, on which all processes agree."""

import signal
import threading
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class Signals:
    """While it is entered, the first signal is noted; a second one, of whatever kind, is obeyed at once.

    A terminal that closes may send SIGHUP twice, from the system and the shell: it is only ever noted.

    Python hands signals to the main thread, so that elsewhere none is noted.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if is_main else ():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self._previous[number] = signal.signal(number, self._want)
        return self

    def _want(self, number: int, frame: Any) -> None:
        self.wanted = True
        for second, handler in self._previous.items():
            if second != signal.SIGHUP:
                signal.signal(second, handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop(self, may_ask: bool = True) -> bool:
        """Whether to stop; several processes ask each other, which all of them `may_ask` for at the same moment."""
        if jax.process_count() == 1:
            return self.wanted
        return may_ask and bool(np.any(multihost_utils.process_allgather(np.array(self.wanted))))
