"""How fast a run goes: tokens per second, time left, what a step waits for, and what the machine gives it."""

import collections
import contextlib
import math
import resource
import time
from typing import Any

import jax
import numpy as np

from jax_entropy.chips import peak_flops

_compilations = 0


def _count_compilations(event: str, seconds: float, **_) -> None:
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_compilations)


class Clock:
    """Times the steps of one run, not counting evaluation, saving and going back.

    Args:
      tokens: in a step.
      token_flops: of one token, forward and backward.
      step: the run goes on from.
    """

    def __init__(self, num_steps: int, tokens: int, token_flops: float, step: int):
        self.num_steps, self.tokens = num_steps, tokens
        peak = peak_flops(jax.devices()[0].device_kind)
        self.token_share = peak and token_flops / (peak * jax.device_count())  # of a second of all devices
        self.rate = math.nan
        self.restart(step)

    def restart(self, step: int) -> None:
        """Goes on from another step."""
        self.step, self.time = step, time.perf_counter()
        self.last, self.spent = self.time, collections.Counter()
        self.seconds: list[float] = []

    def tick(self) -> None:
        """Once a step."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    @contextlib.contextmanager
    def spending(self, what: str):
        """On `data_wait`, the next batch, or on `monitoring`: looking at metrics and writing them."""
        begin = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self):
        """For what is not training."""
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.time += spent
        self.last += spent

    def read(self, step: int) -> dict[str, Any]:
        """Since the last reading: tokens/s and, as `performance`, median and 95th percentile of a step in seconds,
        the shares of the time that were spent waiting for data and on monitoring, compilations and peak memory in bytes
        so far, and `mfu`, the share of the devices' published bfloat16 rate that the model's own FLOPs take."""
        now = time.perf_counter()
        elapsed = max(now - self.time, 1e-9)
        self.rate = (step - self.step) * self.tokens / elapsed
        median, slow = np.percentile(self.seconds, (50, 95)) if self.seconds else (math.nan, math.nan)
        performance = dict(
            step_seconds_median=float(median),
            step_seconds_p95=float(slow),
            data_wait=self.spent["data_wait"] / elapsed,
            monitoring=self.spent["monitoring"] / elapsed,
            compilations=_compilations,
            memory_bytes=_peak_memory(),
        )
        if self.token_share:  # an unknown device has no share rather than a wrong one
            performance["mfu"] = self.rate * self.token_share
        self.step, self.time, self.spent, self.seconds = step, now, collections.Counter(), []
        return dict(tokens_per_second=self.rate, performance=performance)

    def line(self, step: int, metrics: dict[str, Any]) -> str:
        """The progress line."""
        left = (self.num_steps - step) * self.tokens / self.rate
        return (
            f"step {step}/{self.num_steps} · loss {_short(metrics['loss'], 3)} · "
            f"perplexity {_short(metrics['perplexity'])} · entropy {np.mean(metrics['head_entropy']):.2f} nats · "
            f"collapse {metrics['collapse']:.0%} · overload {metrics['overload']:.0%} · "
            f"{self.rate:,.0f} tokens/s · {left // 60:.0f}:{left % 60:02.0f} left"
        )


def _short(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.2e}"


def _peak_memory() -> int:
    """Of the fullest local device, or of the process where devices do not say (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(stat.get("peak_bytes_in_use", 0) for stat in stats)
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
