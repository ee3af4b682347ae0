"""`jax-entropy bench`: measurements that a person starts, as tables."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from jax_entropy.bench.device import PARTS, bench_device
from jax_entropy.commands.console import console, table, warn, write_json
from jax_entropy.commands.parse import CONFIG, JSON, XLA, Flag, command
from jax_entropy.commands.process import set_compiler
from jax_entropy.errors import UserError


@command(Flag("rounds", 10, "calls of each implementation"), JSON, examples=["bench attention --rounds=20"])
def attention(values: Namespace) -> None:
    """The implementations of the attention operator, side by side."""
    _check_rounds(values.rounds)
    from jax_entropy.bench.attention import bench_attention

    _print_rows(bench_attention(rounds=values.rounds), values)


@command(
    Flag("rounds", 10, "steps of each contender, in turn"),
    Flag("peer_python", "", "a Python with torch and transformers; unset: this one, if it has them"),
    Flag("compiled", False, "the peer once more under torch.compile with fused attention, which has no entropies"),
    XLA,
    JSON,
    examples=["bench step", "bench step --rounds=3 --peer_python=/path/to/torch/bin/python --compiled"],
)
def step(values: Namespace) -> None:
    """A step of training, beside PyTorch's where that is installed: some minutes."""
    _check_rounds(values.rounds)
    set_compiler(values.xla)
    from jax_entropy.bench.step import bench_step

    options = dict(rounds=values.rounds, peer_python=values.peer_python, compiled=values.compiled)
    _print_rows(bench_step(**options, notify=warn), values)


@command(Flag("rounds", 3, "steps of each row"), JSON, examples=["bench growth --json=growth.json"])
def growth(values: Namespace) -> None:
    """How time and memory of a step grow with layers, context, vocabulary and heads: some minutes."""
    _check_rounds(values.rounds)
    from jax_entropy.bench.growth import bench_growth

    _print_rows(list(bench_growth(rounds=values.rounds, notify=warn)), values)


@command(CONFIG, JSON, examples=["bench data --config=quickstart"])
def data(values: Namespace) -> None:
    """The loader, beside a step of training."""
    from jax_entropy.bench.data import bench_feeding

    _print_rows(list(bench_feeding(values.config)), values)


@command(CONFIG, JSON, examples=["bench monitoring --config=quickstart"])
def monitoring(values: Namespace) -> None:
    """What watching costs a step."""
    from jax_entropy.bench.monitoring import bench_monitoring

    _print_rows([bench_monitoring(values.config)], values)


@command(
    Flag("out", Path("device"), "folder for device.json, written as it is measured, and device.md"),
    Flag("parts", ",".join(PARTS), "what to measure, separated by commas"),
    Flag("minutes", 8.0, "that all parts together may take"),
    XLA,
    examples=["bench device --out=device", "bench device --parts=attention,step --minutes=3"],
)
def device(values: Namespace) -> None:
    """What one accelerator reaches: kernels, steps and memory, in minutes; no corpus, no network."""
    set_compiler(values.xla)
    bench_device(values.out, parts=values.parts.split(","), minutes=values.minutes, notify=warn)
    print((values.out / "device.md").read_text("utf-8"))


@command(JSON, examples=["bench kernels --json=kernels.json"])
def kernels(values: Namespace) -> None:
    """The attention kernels compiled for GPUs that are not here: registers, spills, instructions."""
    from jax_entropy.bench.kernels import bench_kernels

    _print_rows(list(bench_kernels(warn)), values)


@command(JSON, examples=["bench blocks --json=blocks.json"])
def blocks(values: Namespace) -> None:
    """The fastest tiles of this GPU's attention kernels, as rows for attention/blocks.json."""
    from jax_entropy.bench.blocks import bench_blocks

    _print_rows(list(bench_blocks(warn)), values)


COMMANDS = {found.name: found for found in (attention, step, growth, data, monitoring, device, kernels, blocks)}


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise UserError(f"--rounds={rounds} must be at least 1")


def _print_rows(rows: list[dict[str, Any]], values: Namespace) -> None:
    cells = [[_spell(value) for value in row.values()] for row in rows]
    console(values.json).print(table(list(rows[0]), cells, left=0))
    write_json(values.json, rows)


def _spell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
