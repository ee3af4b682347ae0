"""Devices of accelerators that are not here, to compile for."""

import contextlib
import importlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.experimental import topologies

from jax_entropy.chips import CHIPS, Chip
from jax_entropy.errors import UserError, nearest

# What XLA asks of a GPU that it compiles for; of Hopper also the instructions that only sm_90a has.
_GPU = """
gpu_device_info {{
  cuda_compute_capability {{ {capability} }}
  core_count: {cores}  fpus_per_core: {lanes}  clock_rate_ghz: {clock}  threads_per_warp: 32
  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared}  shared_memory_per_core: {shared_core}
  l2_cache_size: {cache}  device_memory_size: {memory}  memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_HOPPER = dict(
    capability="major: 9 feature_extension: ACCELERATED_FEATURES", cores=132, lanes=128, clock=1.98, shared=232448,
    shared_core=233472, cache=52428800,
)  # fmt: skip
_GPUS = {
    "h100": _HOPPER | dict(memory=84942979072, bandwidth=3350000000000, name="NVIDIA H100 80GB HBM3"),
    "h200": _HOPPER | dict(memory=150109880320, bandwidth=4800000000000, name="NVIDIA H200"),
    "a100": dict(
        capability="major: 8", cores=108, lanes=64, clock=1.41, shared=166912, shared_core=167936, cache=41943040,
        memory=85094301696, bandwidth=2039000000000, name="NVIDIA A100-SXM4-80GB",
    ),
}  # fmt: skip


def devices_of(topology: str) -> tuple[Chip, Sequence[jax.Device]]:
    """The chip and the devices of a topology, "v5e:16x16" or "h100:8", to compile for.

    Raises:
      UserError: a topology that does not exist, or what compiles for it is not installed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise UserError(f"topology={topology!r}: the chip {name!r} is not known{nearest(name, CHIPS)}")
    chip = CHIPS[name]
    axes = 1 if chip.platform == "gpu" else {"v5e": 2, "v6e": 2, "v5p": 3}[name]
    example = {1: "8", 2: "4x4", 3: "2x2x2"}[axes]
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape) or len(shape.split("x")) != axes:
        raise UserError(f"topology={topology!r}: chips of {name} are arranged like {name}:{example}")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")  # what accelerators this machine has is left alone
    with kept_stderr():  # they complain that there is no hardware
        return chip, _gpu_devices(topology, name, shape) if chip.platform == "gpu" else _tpu_devices(topology)


@contextlib.contextmanager
def kept_stderr() -> Iterator[Callable[[], str]]:
    """Keeps what C++ writes to file descriptor 2, and gives a function that returns it."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        text = []
        try:
            yield lambda: "".join(text)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def _tpu_devices(topology: str) -> Sequence[jax.Device]:
    if not _installed("libtpu"):
        raise UserError(f"topology={topology}: libtpu compiles for it; run pip install -e '.[plan]' in the checkout")
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(":")[2].strip() or str(error)
        raise UserError(f"topology={topology}: there is no such slice ({reason})") from None


def _gpu_devices(topology: str, name: str, count: str) -> Sequence[jax.Device]:
    if not any(_installed(f"jax_plugins.{plugin}") for plugin in ("xla_cuda12", "xla_cuda13")):
        raise UserError(
            f"topology={topology}: JAX's CUDA plugin compiles for it; "
            f"pip install --no-deps jax-cuda12-pjrt=={jax.__version__} jax-cuda12-plugin=={jax.__version__}"
        )
    hosts = math.ceil(int(count) / 8)
    if int(count) > 8 and int(count) % 8:
        raise UserError(f"topology={topology}: hosts have up to 8 GPUs; beyond, the number is a multiple of 8")
    shape = f"1x{hosts}x{int(count) // hosts}"
    config = _GPU.format(**_GPUS[name])
    return topologies.get_topology_desc("", platform="cuda", target_config=config, topology=shape).devices


def _installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
