"""Attention implementations side by side: time forward and forward + backward, and temporaries of the backward pass.

All outputs and statistics are asked for and all get a cotangent, as a training step with the penalty does.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_entropy.attention import attention, available

SHAPES = ((32, 128, 4, 64), (8, 512, 4, 64), (4, 1024, 4, 64), (4, 1024, 12, 64))  # B, T, N, H


def bench_attention(
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    *,
    rounds: int = 10,
) -> list[dict[str, Any]]:
    """Calls all implementations of this device in turn, `rounds` times after a warm-up, for each shape and type.

    Returns:
      A row each: median milliseconds, the median of the ratios to the first implementation's calls of the same rounds
      (above 1: faster than it), and temporaries of forward + backward in MiB.
    """
    rows, implementations = [], available()
    for dtype in dtypes:
        for shape in shapes:
            arguments = _arguments(shape, dtype)
            compiled = {name: _compile(name, arguments) for name in implementations}
            forward = _alternate({name: call for name, (call, _) in compiled.items()}, arguments, rounds)
            both = _alternate({name: call for name, (_, call) in compiled.items()}, arguments, rounds)
            for name in implementations:
                rows.append(
                    dict(zip(("batch", "context", "heads", "width"), shape, strict=True))
                    | {"dtype": dtype, "implementation": name}
                    | {"forward ms": 1e3 * statistics.median(forward[name])}
                    | {"forward + backward ms": 1e3 * statistics.median(both[name])}
                    | {"ratio": _ratio(both[implementations[0]], both[name])}
                    | {"temporaries MiB": compiled[name][1].memory_analysis().temp_size_in_bytes / 2**20}
                )
    return rows


def _arguments(shape: tuple[int, int, int, int], dtype: str) -> tuple[jax.Array, ...]:
    """q, k, v, temperature, and cotangents of out and of the entropy."""
    B, T, N, _ = shape
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, dout = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys[:4])
    return q, k, v, jnp.ones((N, T)), dout, jax.random.normal(keys[4], (B, N, T))


def _compile(implementation: str, arguments: tuple[jax.Array, ...]) -> tuple[Callable, Callable]:
    def forward(q, k, v, temperature, dout, dentropy):
        return attention(q, k, v, temperature, implementation=implementation)

    def forward_backward(q, k, v, temperature, dout, dentropy):
        def outputs(*inputs):
            out, stats = attention(*inputs, implementation=implementation)
            return out, stats.entropy

        outputs, backward = jax.vjp(outputs, q, k, v, temperature)
        return outputs, backward((dout, dentropy))

    return tuple(jax.jit(call, keep_unused=True).lower(*arguments).compile() for call in (forward, forward_backward))


def _alternate(calls: dict[str, Callable], arguments: tuple[jax.Array, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns, after one that is not counted."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


def _ratio(baseline: list[float], taken: list[float]) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(baseline, taken, strict=True))
