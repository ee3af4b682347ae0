"""SIGTERM and Ctrl-C as a wish to stop after what is being done, on which the processes of a run agree."""

import signal
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class Signals:
    """While it is entered, the first signal is noted; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._want) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _want(self, number: int, frame: Any) -> None:
        self.wanted = True
        signal.signal(number, self._previous[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stop(self, may_ask: bool = True) -> bool:
        """Whether to stop; several processes ask each other, which all of them `may_ask` for at the same moment."""
        if jax.process_count() == 1:
            return self.wanted
        return may_ask and bool(np.any(multihost_utils.process_allgather(np.array(self.wanted))))
