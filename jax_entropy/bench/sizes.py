"""What the parts of `bench device` share: sizes for each kind of device, and a clock that knows what time is left."""

import dataclasses
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kind of device is measured on."""

    copied: int  # bytes
    product: int  # rows and columns of a square one
    tokens: int  # of a call of attention, and of a step beside its peers
    contexts: tuple[int, ...]  # T of the attention table
    heads: tuple[tuple[int, int], ...]  # (H, N)
    priced: tuple[int, ...]  # those of them for which the entropy is also left out
    steps: tuple[tuple[int, int], ...]  # T and tokens of a step
    model: dict[str, int]  # of the step
    longest: int  # T of the memory table


_GPT2 = dict(num_layers=12, num_heads=12, model_dim=768, vocab_size=50304)
_CARD = Sizes(
    1 << 30, 8192, 16384, (512, 1024, 2048, 4096, 8192, 16384), ((64, 32), (128, 16)), (1024, 8192),
    ((1024, 1 << 14), (1024, 1 << 16), (128, 1 << 14)), _GPT2, 32768,
)  # fmt: skip
_TINY = dict(num_layers=2, num_heads=2, model_dim=64, vocab_size=512)
_CPU = Sizes(1 << 26, 1024, 512, (128, 256), ((64, 2),), (128, 256), ((64, 512),), _TINY, 1024)


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

    def on_device(self, call: Callable[[], Any], *, rounds: int = 8) -> float:
        """Seconds of a call's kernels alone, by the profiler: to start a short one takes longer than it runs.

        Where nothing is profiled, as on a CPU, median seconds of the call.
        """
        jax.block_until_ready(call())
        found = kernels(call, rounds)
        return sum(found.values()) if found else self.seconds(call)


def kernels(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Seconds of a call by kernel of a GPU that it starts, by the profiler; the mean of some calls."""
    taken = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                result = call()
            jax.block_until_ready(result)
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines if "GPU" in plane.name else ():
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            taken[event.name] += event.duration_ns / 1e9 / rounds
    return dict(taken)
