"""`bench kernels`: the attention kernels compiled for GPUs that are not here, and what the assembler says of them.

Registers, shared memory, spills (an error), and instructions for each exponential in the loop that takes the time: the
stand-in for a timing until there is a card. Needs JAX's CUDA plugin, ptxas and nvdisasm (docs/benchmarks/kernels.md).
"""

import heapq
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jax_entropy.attention.blocks import blocks_for
from jax_entropy.chips import CHIPS
from jax_entropy.errors import UserError

USES = ("out", "out, entropy", "out, entropy, temperature")  # what is computed, and differentiated


class Target(NamedTuple):
    """What a kernel file is compiled for."""

    chips: tuple[str, ...]
    types: tuple[str, ...]
    widths: tuple[int, ...]


TARGETS = {
    "hopper": Target(("h100",), ("bfloat16", "float16"), (32, 64, 96, 128)),
    "gpu": Target(("h100", "a100"), ("bfloat16", "float16", "float32"), (64, 128)),
}
LENGTHS = (1024, 4096)  # of sequences: tiles depend on them
DECODING = (1, 4096)  # queries and keys
NUM_SLOTS = 8  # where there is a window


class Program(NamedTuple):
    """One compilation: what `attend` of an implementation is asked for."""

    implementation: str
    chip: str
    dtype: str
    H: int
    T: int
    S: int
    uses: str
    window: str = ""  # "window, slots"; how wide it is, is known only when it runs


_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"BRA\b.*?`\((\.L_x_\d+)\)")


def bench_kernels(notify: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A row for each kernel of each of `programs`.

    Raises:
      UserError: a tool is missing, or a kernel spills registers.
    """
    for tool in ("ptxas", "nvdisasm"):
        if not shutil.which(tool):
            raise UserError(f"{tool} is not on the PATH; docs/benchmarks/kernels.md says where it comes from")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process
        for program, rows in zip(asked := list(programs()), pool.map(_compiled, asked), strict=True):
            notify(", ".join(map(str, program)))
            yield from rows


def programs() -> Iterator[Program]:
    """Every tile of blocks.json; what a use costs is counted in bfloat16, the other types only must not spill."""
    for name, (chips, types, widths) in TARGETS.items():
        for chip, dtype, H in itertools.product(chips, types, widths):
            tiles = {T: blocks_for(name, CHIPS[chip].kind, dtype, H, T) for T in LENGTHS}
            lengths = [T for T in LENGTHS if T == LENGTHS[0] or tiles[T] != tiles[LENGTHS[0]]]
            for T, uses in itertools.product(lengths, USES if dtype == "bfloat16" else USES[-1:]):
                yield Program(name, chip, dtype, H, T, T, uses)
            for T in lengths if name == "gpu" or H <= 64 else ():  # what "auto" chooses
                yield Program(name, chip, dtype, H, T, T + NUM_SLOTS, USES[-1], "window, slots")
            if name == "gpu" and dtype == "bfloat16":
                yield Program(name, chip, dtype, H, *DECODING, USES[1])


def _compiled(program: Program) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_TO": folder, "XLA_FLAGS": f"--xla_dump_to={folder} {os.environ.get('XLA_FLAGS', '')}",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "jax_entropy.bench.kernels", json.dumps(program)],
            env=environment,
            capture_output=True,
            text=True,
        )
        asked = ", ".join(map(str, program))
        if done.returncode:
            raise UserError(f"{asked} does not compile: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        shared, rows = dict(_shared_memory(Path(folder))), []
        for ptx in sorted(Path(folder).glob("*.ptx")):
            for kernel, found in _assembled(ptx):
                if found["spilled"]:
                    raise UserError(f"{kernel} of {asked} spills {found['spilled']} bytes of registers")
                found["shared_memory_KiB"] = shared[kernel] / 1024
                rows.append(program._asdict() | dict(kernel=kernel) | found)
        return rows


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
        loops = list(_loops(code))
        most = max(exponentials for _, exponentials in loops)  # of a tile; other loops have those of rows only
        count, exponentials = min((x for x in loops if 2 * x[1] > most), key=lambda loop: loop[0] / loop[1])
        said_of_it = dict(
            registers=int(re.search(r"Used (\d+) registers", part)[1]),
            spilled=int(re.search(r"(\d+) bytes spill stores", part)[1]),
            instructions_per_exponential=round(count / exponentials, 2),
        )
        yield short[1], said_of_it


def _loops(code: str) -> Iterator[tuple[int, int]]:
    """Of each loop with exponentials: instructions and exponentials on the shortest way round, past any mask."""
    lines = code.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    for i, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and labels.get(branch[1], i) < i:
            count, exponentials = _shortest(lines, labels, labels[branch[1]], i)
            if exponentials:
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


def _compile(program: Program) -> None:
    """Compiles the operator, forward and backward, for a chip; what XLA dumps is read by the parent."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from jax_entropy.plan.topology import devices_of

    _, devices = devices_of(f"{program.chip}:1")
    B, T, S, N, H = 2, program.T, program.S, 12, program.H
    module = importlib.import_module(f"jax_entropy.attention.{program.implementation}")
    with_entropy, with_temperature = "entropy" in program.uses, "temperature" in program.uses

    def shaped(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices[0]))

    def both(q, k, v, scale, dout, dentropy, *window):
        def outputs(q, k, v, scale):
            options = dict(kernels=module.tiles(devices[0].device_kind, q, S), with_entropy=with_entropy)
            windowed = (*window, NUM_SLOTS) if window else ()
            out, entropy, *_ = module.attend(q, k, v, scale, S - T, *windowed, **options)
            return (out, entropy) if with_entropy else (out,)

        if with_temperature:
            made, pull = jax.vjp(outputs, q, k, v, scale)
        else:
            made, pull = jax.vjp(lambda *inputs: outputs(*inputs, scale), q, k, v)
        return made, pull((dout, dentropy)[: len(made)])

    q, k, rows = shaped((B, T, N, H), program.dtype), shaped((B, S, N, H), program.dtype), shaped((B, N, T))
    window = [shaped((), jnp.int32)] if program.window else []
    jax.jit(both).lower(q, k, k, shaped((N, T)), q, rows, *window).compile()


if __name__ == "__main__":
    _compile(Program(*json.loads(sys.argv[1])))
