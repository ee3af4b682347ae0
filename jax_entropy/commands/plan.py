"""`jax-entropy plan`: what a run needs on a pod, as lines and tables."""

import re
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax_entropy.commands.console import console, table, warn, write_json
from jax_entropy.commands.parse import CONFIG, JSON, XLA, Flag, command
from jax_entropy.commands.process import set_compiler
from jax_entropy.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from jax_entropy.plan import Plan


@command(
    CONFIG,
    Flag("topology", None, "v5e:16x16, v5p:4x4x4, v6e:16x16, h100:8, …", required=True),
    Flag("mesh", "", "DATA,FSDP,TENSOR instead of the config's; one may be -1, the rest"),
    Flag(
        "search", False, "try the meshes that batch and heads allow, with remat where needed, and rank those that fit"
    ),
    XLA,
    Flag("efficiency", 0.5, "share of the chips' published rates that a run is taken to reach"),
    JSON,
    examples=[
        "plan --config=codeparrot:SM+LN+G --topology=v5e:4x4",
        "plan --config=codeparrot --topology=v5e:16x16 --search --config.train.batch_size=512",
    ],
)
def plan(values: Namespace) -> None:
    """What a config's run needs on a TPU slice or on GPUs, without having any: memory, time, chip-hours."""
    if not 0 < values.efficiency <= 1:
        raise UserError(f"--efficiency={values.efficiency} must lie above 0 and be at most 1")
    if values.mesh:
        if values.search:
            raise UserError("--search tries meshes, and goes without --mesh")
        if not re.fullmatch(r"-?\d{1,6},-?\d{1,6},-?\d{1,6}", values.mesh):
            raise UserError(f"--mesh={values.mesh!r} must be three whole numbers, DATA,FSDP,TENSOR")
        sizes = map(int, values.mesh.split(","))
        values.config.mesh.update(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    set_compiler(values.xla)
    from jax_entropy.plan import plan as compile_for
    from jax_entropy.plan import search

    out = console(values.json)
    if values.search:
        plans = search(values.config, values.topology, notify=warn)
        print_search(plans, values.efficiency, out)
    else:
        plans = [compile_for(values.config, values.topology)]
        print_plan(plans[0], values.efficiency, out)
    write_json(values.json, dict(efficiency=values.efficiency, plans=[_numbers(p, values.efficiency) for p in plans]))


def _numbers(plan: "Plan", efficiency: float) -> dict:
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    return fields | dict(fits=plan.fits, terms=plan.terms, seconds=plan.seconds(efficiency))


def print_plan(plan: "Plan", efficiency: float, console: "Console") -> None:
    """Prints whether a plan fits, where its time goes, and what the run costs in hours."""
    chip, mesh = plan.chip, "×".join(map(str, plan.mesh))
    remat = "" if plan.remat == "none" else f", remat {plan.remat}"
    say = console.print
    say(f"{plan.topology}: {plan.num_devices} chips, mesh {mesh} (data×fsdp×tensor){remat}")
    left = chip.memory - plan.peak
    parts = f"arguments {_gib(plan.arguments)}"
    if plan.temporaries is not None:
        parts += f", temporaries {_gib(plan.temporaries)}"
    verdict = f"fits, {_gib(left)} are left" if plan.fits else f"does not fit, {_gib(-left)} too much"
    say(f"memory of a chip: {verdict}: peak {_gib(plan.peak)} of {_gib(chip.memory)} ({parts})")
    if plan.temporaries is None:
        return
    say(
        f"a step: {plan.tokens:,} tokens, {_flops(plan.flops * plan.num_devices)} (forward and backward), "
        f"{_flops(plan.executed_flops)} on each chip; compiled in {plan.compile_seconds:.0f} s"
    )
    if plan.xla_flags:
        say(f"XLA_FLAGS={plan.xla_flags}")
    if plan.launches:
        say(f"kernels that a GPU starts: {plan.launches:,} a step")
    if plan.warnings:
        say(f"XLA gathers {plan.warnings} arrays whole to lay them out anew; see config.mesh.rules")
    rows = [(kind, f"{c.calls:,.0f}", f"{c.sent / 2**20:,.1f} MiB") for kind, c in sorted(plan.collectives.items())]
    if rows:
        console.print(table(["collective", "calls a step", "sent by a chip"], rows))
    rates = dict(
        compute=f"{chip.flops / 1e12:.0f} TFLOP/s of bfloat16",
        memory=f"{plan.traffic / 2**30:,.1f} GiB at {chip.bandwidth / 1e9:,.0f} GB/s",
        network=f"{chip.link / 1e9:.0f} GB/s each way",
    )
    for name, seconds in plan.terms.items():
        say(f"  {name:8}{seconds / efficiency * 1e3:9.1f} ms  at {efficiency:.0%} of the published {rates[name]}")
    seconds = plan.seconds(efficiency)
    hours = seconds * plan.num_steps / 3600
    say(
        f"a step takes the largest, {seconds * 1e3:.1f} ms: {plan.tokens / seconds:,.0f} tokens/s, "
        f"{plan.flops / seconds / chip.flops:.0%} MFU; {plan.tokens * plan.num_steps / 1e9:.2f} B tokens in "
        f"{plan.num_steps:,} steps: {hours:.3g} hours, {hours * plan.num_devices:,.1f} chip-hours"
    )


def print_search(plans: Sequence["Plan"], efficiency: float, console: "Console") -> None:
    """Prints the plans of a search, the fastest first; terms and step in milliseconds."""
    columns = ("mesh", "remat", "peak", "compute", "memory", "network", "step", "tokens/s", "chip-hours")
    rows = []
    for plan in plans:
        seconds = plan.seconds(efficiency)
        terms = (f"{term / efficiency * 1e3:.1f}" for term in (*plan.terms.values(), max(plan.terms.values())))
        rows.append((
            "×".join(map(str, plan.mesh)), plan.remat, _gib(plan.peak), *terms,
            f"{plan.tokens / seconds:,.0f}", f"{seconds * plan.num_steps / 3600 * plan.num_devices:,.1f}",
        ))  # fmt: skip
    console.print(table(columns, rows, left=2), crop=False)
    console.print(f"times in ms, at {efficiency:.0%} of the published rates")
    if plans[0].xla_flags:
        console.print(f"XLA_FLAGS={plans[0].xla_flags}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _flops(count: float) -> str:
    unit, size = next((pair for pair in (("T", 1e12), ("G", 1e9)) if count >= pair[1]), ("M", 1e6))
    return f"{count / size:,.{1 if count >= 100 * size else 2}f} {unit}FLOPs"
