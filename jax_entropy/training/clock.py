"""How fast a run goes: tokens per second, time left, what a step waits for, and what the machine gives it."""

import collections
import contextlib
import functools
import math
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jax_entropy.chips import peak_flops


class StepClock:
    """Times the steps of one run, not counting evaluation, saving, going back, and steps that compiled something.

    Args:
      tokens: in a step.
      token_flops: of one token, forward and backward.
    """

    def __init__(self, num_steps: int, tokens: int, token_flops: float) -> None:
        self.num_steps, self.tokens = num_steps, tokens
        peak = peak_flops(jax.devices()[0].device_kind)
        self.token_share = peak and token_flops / (peak * jax.device_count())  # of a second of all devices
        self.compilations = _compilations()
        self.restart()

    def restart(self) -> None:
        """Forgets what was timed, and goes on from now."""
        self.rate = math.nan
        self.seconds: list[float] = []  # of each step since the last reading
        self.spent: collections.Counter[str] = collections.Counter()  # of them, on what
        self._begin_step()

    def _begin_step(self) -> None:
        self.last, self.spent_in_step, self.compiled = (
            time.perf_counter(),
            collections.Counter(),
            len(self.compilations),
        )

    def tick(self) -> None:
        """Once a step."""
        if self.compiled == len(self.compilations):  # compiling says nothing about the steps to come
            self.seconds.append(time.perf_counter() - self.last)
            self.spent += self.spent_in_step
        self._begin_step()

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """On `data_wait`, the next batch, or on `monitoring`: looking at metrics and writing them."""
        begin = time.perf_counter()
        yield
        self.spent_in_step[what] += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not training."""
        begin, compiled = time.perf_counter(), len(self.compilations)
        yield
        self.last += time.perf_counter() - begin
        self.compiled += len(self.compilations) - compiled

    def read(self) -> dict[str, Any]:
        """What was timed since the last reading, NaN where no step was.

        Returns:
          tokens/s and, as `performance`, median and 95th percentile of a step in seconds, the shares of the time that
          were spent waiting for data and on monitoring, compilations and peak memory in bytes so far, and `mfu`, the
          share of the devices' published bfloat16 rate that the model's own FLOPs take.
        """
        seconds = np.array(self.seconds or [math.nan])
        self.rate = seconds.size * self.tokens / seconds.sum()
        median, slow = np.percentile(seconds, (50, 95))
        performance = dict(
            step_seconds_median=float(median),
            step_seconds_p95=float(slow),
            data_wait=self.spent["data_wait"] / seconds.sum(),
            monitoring=self.spent["monitoring"] / seconds.sum(),
            compilations=len(self.compilations),
            memory_bytes=_peak_memory(),
        )
        if self.token_share:  # an unknown device has no share rather than a wrong one
            performance["mfu"] = self.rate * self.token_share
        self.seconds, self.spent = [], collections.Counter()
        return dict(tokens_per_second=float(self.rate), performance=performance)

    def line(self, step: int, metrics: dict[str, Any]) -> str:
        """The progress line, with speed and time left once a step was timed."""
        line = (
            f"step {step}/{self.num_steps} · loss {_short(metrics['loss'], 3)} · "
            f"perplexity {_short(metrics['perplexity'])} · entropy {np.mean(metrics['head_entropy']):.2f} nats · "
            f"collapse {metrics['collapse']:.0%} · overload {metrics['overload']:.0%}"
        )
        if math.isnan(self.rate):
            return line
        left = (self.num_steps - step) * self.tokens / self.rate
        return f"{line} · {self.rate:,.0f} tokens/s · {duration(left)} left"


def duration(seconds: float) -> str:
    """2:05 or 12:02:05, to the nearest second."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@functools.cache
def _compilations() -> list[float]:
    """The seconds of each compilation of this process from the first call on; JAX forgets no listener."""
    seconds: list[float] = []

    def note(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    return seconds


def _short(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.2e}"


def _peak_memory() -> int:
    """Of the fullest local device, or of the process where devices do not say (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(stat.get("peak_bytes_in_use", 0) for stat in stats)
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
