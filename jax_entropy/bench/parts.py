"""What `bench device` measures, part by part: `python -m jax_entropy.bench.parts PART SECONDS` prints a row a line.

Needs jax, flax, optax, einops, ml_collections and numpy, no corpus. On a CPU the same parts run on small sizes.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp

from jax_entropy.bench.attention_parts import attention_table, correctness, memory
from jax_entropy.bench.sizes import Clock, Row, sizes
from jax_entropy.bench.step_parts import peers, step, training
from jax_entropy.chips import peak_flops


def versions(clock: Clock) -> Iterator[Row]:
    """The device, its memory and driver, and the versions of what runs on it."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    row = dict(
        device=device.device_kind, platform=device.platform, memory_GiB=stats.get("bytes_limit", 0) / 2**30,
        python=platform.python_version(), jax=jax.__version__, jaxlib=jax.lib.__version__,
    )  # fmt: skip
    if flags := os.environ.get("XLA_FLAGS"):
        row["XLA_FLAGS"] = flags
    for package in ("flax", "optax", "numpy", "torch", "transformers"):
        row[package] = _version(package)
    if device.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        row["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    yield row


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def ceilings(clock: Clock) -> Iterator[Row]:
    """What the device reaches where nothing else is to be done: a copy, and a product of bfloat16 matrices."""
    size, peak = sizes(), peak_flops(jax.devices()[0].device_kind)
    x = jnp.zeros(size.copied // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = clock.seconds(lambda: copy(x))
    yield dict(what="copy", size=f"{size.copied / 2**20:.0f} MiB", reached=2 * size.copied / seconds / 1e9, unit="GB/s")
    a = jax.random.normal(jax.random.key(0), (size.product, size.product), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    reached = 2 * size.product**3 / clock.seconds(lambda: product(a))
    share = {"share of published": reached / peak} if peak else {}
    yield dict(what="bfloat16 product", size=f"{size.product}³", reached=reached / 1e12, unit="TFLOP/s") | share


PARTS = dict(
    versions=versions, ceilings=ceilings, correctness=correctness, attention=attention_table, step=step, memory=memory,
    training=training, peers=peers,
)  # fmt: skip


def main(part: str, seconds: float) -> None:
    """Prints the rows of a part as they are measured."""
    for row in PARTS[part](Clock(seconds)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
