"""`bench blocks`: which tiles this GPU's attention kernels are fastest with, as rows for attention/blocks.json."""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_entropy.attention import available
from jax_entropy.bench.sizes import Clock
from jax_entropy.errors import UserError

SHAPES = ((64, 1024), (64, 8192), (128, 2048), (128, 8192))  # head width, and the longest context that a row is for
_TRIED = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (64, 32, 4), (64, 64, 8))
_TILES = {
    "gpu": [(*tile, stages) for tile in _TRIED for stages in (2, 3)],
    "hopper": list(itertools.product((64,), (64, 128, 256), (2, 3))),
}


def bench_blocks(notify: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A row for each kernel file, head width and context of this device, in the form of blocks.json, with milliseconds.

    Raises:
      UserError: this device has no kernels.
    """
    if not (names := [name for name in available() if name in _TILES]):
        raise UserError(f"there are no kernels with tiles for this {jax.default_backend()}; bench blocks needs a GPU")
    for name, (H, T) in itertools.product(names, SHAPES):
        module = importlib.import_module(f"jax_entropy.attention.{name}")
        kind = jax.devices()[0].device_kind
        q, k, v, dout = jax.random.normal(jax.random.key(0), (4, max(16384 // T, 1), T, 2048 // H, H), jnp.bfloat16)
        scale = jnp.full((2048 // H, T), H**-0.5)
        best = module.tiles(kind, q, T)
        seconds = functools.partial(_seconds, module, q, k, v, scale, dout)
        for kernel in best._fields:
            found = {tile: seconds(best._replace(**{kernel: module.Blocks(*tile)})) for tile in _TILES[name]}
            found[getattr(best, kernel)] = seconds(best)
            fastest = min(found, key=found.get)
            best = best._replace(**{kernel: module.Blocks(*fastest)})
            notify(f"{name}, head width {H}, {T} tokens, {kernel}: {tuple(fastest)} in {1e3 * found[fastest]:.3f} ms")
        tiles = {kernel: list(getattr(best, kernel)) for kernel in best._fields}
        row = dict(implementation=name, device=kind, types=["bfloat16", "float16"], width=H, longest=T)
        yield row | tiles | {"ms": 1e3 * seconds(best)}


def _seconds(module: Any, q, k, v, scale, dout, kernels: Any) -> float:
    """Of forward and backward with these tiles; infinite where they do not fit the device."""

    @jax.jit
    def both(q, k, v):
        (_, entropy), pull = jax.vjp(lambda *inputs: module.attend(*inputs, scale, 0, kernels=kernels)[:2], q, k, v)
        return pull((dout, jnp.ones_like(entropy)))

    try:
        return Clock(60).on_device(lambda: both(q, k, v))
    except Exception:  # shared memory, registers, or a shape that the compiler does not take
        return float("inf")
