"""`bench kernels`: the attention kernels compiled for GPUs that are not here, and what the assembler says of them.

Registers, shared memory, spills (an error), and instructions for each exponential in the loop that takes the time: the
stand-in for a timing until there is a card. Needs JAX's CUDA plugin, ptxas and nvdisasm (docs/benchmarks/kernels.md).
"""

import heapq
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax_entropy.errors import UserError

TARGETS = {"hopper": ("h100",), "gpu": ("h100", "a100")}  # chips that a kernel is compiled for
GRADIENTS = ("out", "out, entropy", "out, entropy, temperature")
WIDTHS = {"hopper": (32, 64, 96, 128), "gpu": (64, 128)}
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"BRA\b.*?`\((\.L_x_\d+)\)")


def bench_kernels(notify: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A row for each kernel, chip and head width, by the gradients that it is asked for.

    Raises:
      UserError: a tool is missing, or a kernel spills registers.
    """
    for tool in ("ptxas", "nvdisasm"):
        if not shutil.which(tool):
            raise UserError(f"{tool} is not on the PATH; docs/benchmarks/kernels.md says where it comes from")
    for name, chips in TARGETS.items():
        for chip in chips:
            for H in WIDTHS[name]:
                for gradients in GRADIENTS:
                    notify(f"{name} for {chip}, head width {H}, gradients of {gradients}")
                    yield from _compiled(name, chip, H, gradients)


def _compiled(name: str, chip: str, H: int, gradients: str) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_TO": folder, "XLA_FLAGS": f"--xla_dump_to={folder} {os.environ.get('XLA_FLAGS', '')}",
        }  # fmt: skip
        request = json.dumps([name, chip, H, gradients])
        done = subprocess.run(
            [sys.executable, "-m", "jax_entropy.bench.kernels", request],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"{name} does not compile for {chip}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        shared = dict(_shared_memory(Path(folder)))
        for ptx in sorted(Path(folder).glob("*.ptx")):
            for kernel, found in _assembled(ptx):
                found["shared_memory_KiB"] = shared[kernel] / 1024
                if found["spilled"]:
                    raise UserError(f"{kernel} of {name} for {chip} at head width {H} spills {found['spilled']} bytes")
                yield dict(implementation=name, chip=chip, H=H, kernel=kernel, gradients=gradients) | found


def _shared_memory(folder: Path) -> Iterator[tuple[str, int]]:
    """Bytes of shared memory that each attention kernel is started with, as Mosaic's passes or XLA's thunks say."""
    for log in folder.glob("attention_*.mlir-passes.log"):
        kernel = re.match(r"attention_(\w+?)_\d", log.name)[1]
        yield kernel, int(re.search(r"dynamic_shared_memory_size %c(\d+)_", log.read_text())[1])
    for thunks in folder.glob("*.thunk_sequence.txt"):
        for kernel, size in re.findall(r" attention_(\w+) grid.*shared_memory: (\d+) bytes", thunks.read_text()):
            yield kernel, int(size)


def _assembled(ptx: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What ptxas says of each attention kernel in a file, and the instructions that nvdisasm shows."""
    target = re.search(r"\.target (\w+)", ptx.read_text())
    if not target or "attention_" not in ptx.read_text():
        return
    cubin = ptx.with_suffix(".cubin")
    said = subprocess.run(["ptxas", "-arch", target[1], "-v", ptx, "-o", cubin], capture_output=True, text=True).stderr
    listing = subprocess.run(["nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    for part in said.split("Compiling entry function")[1:]:
        kernel = re.search(r"'(\w+)'", part)[1]
        if (short := re.match(r"attention_(forward|dq|dkv)", kernel)) is None:
            continue
        code = next(x for x in re.split(r"\.section\s+\.text\.", listing) if x.startswith(kernel))
        count, exponentials = min(_loops(code), key=lambda loop: loop[0] / loop[1])
        yield (
            short[1],
            dict(
                registers=int(re.search(r"Used (\d+) registers", part)[1]),
                spilled=int(re.search(r"(\d+) bytes spill stores", part)[1]),
                instructions_per_exponential=round(count / exponentials, 2),
            ),
        )


def _loops(code: str) -> Iterator[tuple[int, int]]:
    """Of each loop with exponentials: instructions and exponentials on the shortest way round, past any mask."""
    lines = code.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    for i, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and labels.get(branch[1], i) < i:
            count, exponentials = _shortest(lines, labels, labels[branch[1]], i)
            if exponentials > 8:
                yield count, exponentials


def _shortest(lines: list[str], labels: dict[str, int], begin: int, end: int) -> tuple[int, int]:
    """Instructions and exponentials on the way from line `begin` to `end` that has the fewest instructions."""
    waiting, seen = [(0, begin, 0)], set()
    while waiting:
        count, i, exponentials = heapq.heappop(waiting)
        if i in seen or not begin <= i <= end:
            continue
        seen.add(i)
        instruction = found[1] if (found := _LINE.search(lines[i])) else ""
        count, exponentials = count + bool(instruction), exponentials + ("MUFU.EX2" in instruction)
        if i == end:
            return count, exponentials
        if branch := _BRANCH.search(instruction):
            heapq.heappush(waiting, (count, labels.get(branch[1], -1), exponentials))
        if not re.match(r"(BRA|EXIT|RET)\b", instruction):
            heapq.heappush(waiting, (count, i + 1, exponentials))
    return 0, 0


def _compile(name: str, chip: str, H: int, gradients: str) -> None:
    """Compiles the operator, forward and backward, for a chip; what XLA dumps is read by the parent."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from jax_entropy.plan.topology import devices_of

    _, devices = devices_of(f"{chip}:1")
    B, T, N = 2, 1024, 12
    module = importlib.import_module(f"jax_entropy.attention.{name}")

    def shaped(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices[0]))

    def both(q, k, v, scale, dout, dentropy):
        def outputs(*inputs):
            out, h, *_ = module.attend(*inputs, 0, kernels=module.tiles(devices[0].device_kind, inputs[0], T))
            return (out, h) if "entropy" in gradients else (out,)

        if "temperature" in gradients:
            made, pull = jax.vjp(outputs, q, k, v, scale)
        else:
            made, pull = jax.vjp(lambda *inputs: outputs(*inputs, scale), q, k, v)
        return made, pull((dout, dentropy)[: len(made)])

    x, rows = shaped((B, T, N, H), jnp.bfloat16), shaped((B, N, T))
    jax.jit(both).lower(x, x, x, shaped((N, T)), x, rows).compile()


if __name__ == "__main__":
    _compile(*json.loads(sys.argv[1]))
