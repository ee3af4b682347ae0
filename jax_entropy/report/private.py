"""The picture of private execution: stacked bars of bytes, rounds and time, one bar for each way to run a model.

It draws what `private profile` and `private compare` write as JSON.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_entropy.census import GROUPS, KINDS
from jax_entropy.report.costs import terms
from jax_entropy.report.drawing import HEAT_MAP, paper_style, titled
from jax_entropy.report.history import History

_GROUP_OF = {kind.name: kind.group for kind in KINDS}


@paper_style
def private_costs(profiles: Sequence[dict[str, Any]]) -> Figure:
    """Bytes, rounds and time of profiles of one context length, the first being what the others are compared with."""
    first = profiles[0]
    network = first["network"]
    fig = titled(
        "Private execution by kind of operation",
        f"{terms(first, export=False)}, {first['setting']['fraction_bits']} fraction bits",
        9.6, 1.7 + 0.42 * len(profiles),
        f"Bytes: of the party that sends most, weights of optimised exports opened before. Time on {network}: "
        "computation of all parties on one machine + rounds × latency + bytes / bandwidth.",
    )  # fmt: skip
    axes = fig.subplots(1, 3, sharey=True)
    names = [f"{profile['architecture']}\n{profile['export']}" for profile in profiles]
    measures = (("bytes", 1e6, "MB sent"), ("rounds", 1, "rounds"), ("seconds", 1, f"seconds ({network})"))
    for ax, (measure, unit, label) in zip(axes, measures, strict=True):
        rows = [{kind: cost[measure] / unit for kind, cost in profile["costs"].items()} for profile in profiles]
        _bars(ax, names, rows)
        ax.set_xlabel(label)
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="upper right", bbox_to_anchor=(0.995, 0.995), ncols=3, fontsize=7, columnspacing=1)
    return fig


def of_history(history: History) -> Figure | None:
    """What was measured of a run; None where nothing was, or by a version that kept no costs."""
    return private_costs([history.private]) if history.private and "costs" in history.private else None


def _bars(ax: Axes, names: list[str], rows: list[dict[str, float]]) -> None:
    """One bar a row, its kinds by group; at its end the sum, and how many times less it is than the first."""
    starts = [0.0] * len(rows)
    for i, group in enumerate(GROUPS):
        widths = [sum(value for kind, value in row.items() if _GROUP_OF.get(kind) == group) for row in rows]
        color = HEAT_MAP(i / (len(GROUPS) - 1))
        ax.barh(names, widths, left=starts, color=color, edgecolor="0.25", linewidth=0.5, height=0.62, label=group)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for row, total in enumerate(starts):
        ratio = f" ({starts[0] / total:.1f}×)" if row else ""
        text = f" {total:,.3g}{ratio}" if total < 1000 else f" {total:,.0f}{ratio}"
        ax.text(total, row, text, va="center", size=7.5)
    ax.set(xlim=(0, 1.35 * max(starts)), ylim=(len(rows) - 0.5, -0.5))
    ax.grid(axis="x")
    ax.grid(False, axis="y")
