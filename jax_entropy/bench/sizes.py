"""What the parts of `bench device` share: sizes for each kind of device, and a clock that knows what time is left."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kind of device is measured on."""

    copied: int  # bytes
    product: int  # rows and columns of a square one
    tokens: int  # of a call of attention, and of a step
    contexts: tuple[int, ...]  # T of the attention table
    heads: tuple[tuple[int, int], ...]  # (H, N)
    step_contexts: tuple[int, ...]
    model: dict[str, int]  # of the step
    longest: int  # T of the memory table


_GPT2 = dict(num_layers=12, num_heads=12, model_dim=768, vocab_size=50304)
_CARD = Sizes(
    1 << 30, 8192, 16384, (512, 1024, 2048, 4096, 8192, 16384), ((64, 32), (128, 16)), (1024, 128), _GPT2, 32768
)
_TINY = dict(num_layers=2, num_heads=2, model_dim=64, vocab_size=512)
_CPU = Sizes(1 << 26, 1024, 512, (128, 256), ((64, 2),), (64,), _TINY, 1024)


def sizes() -> Sizes:
    """Of this device."""
    return _CPU if jax.default_backend() == "cpu" else _CARD


class Clock:
    """Time that is left for a part, and medians of calls."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def seconds(self, call: Callable[[], Any], *, rounds: int = 5, least: float = 0.02) -> float:
        """Median seconds of a call, each round long enough to be timed; the first call is not counted."""
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        count = max(1, int(least / max(time.perf_counter() - start, 1e-6)))
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            results = [call() for _ in range(count)]
            jax.block_until_ready(results[-1])
            taken.append((time.perf_counter() - start) / count)
            del results
        return statistics.median(taken)
