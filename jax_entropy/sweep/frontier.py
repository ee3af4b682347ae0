"""The frontier of a sweep: perplexity against what private execution sends, waits and takes, and what is on its front.

Where the size is the paper's, its own points are drawn beside ours, in its own system.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from jax_entropy.report.drawing import BLACK, BLUE, GREY, ORANGE, log_axis, paper_style, titled
from jax_entropy.sweep.table import NETWORK, Row

_MEASURES = (("bytes", 1e6, "MB sent"), ("rounds", 1, "rounds"), ("seconds", 1, f"seconds of waiting ({NETWORK})"))


class Mark(NamedTuple):
    """A point of the picture: its number in the legend, cost, perplexity and spread."""

    number: int
    cost: float
    perplexity: float
    spread: float


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, perplexity) that no other is at least as good as in both and better in one, by cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


@paper_style
def frontier(rows: Sequence[Row], protocol: str, title: str = "") -> Figure | None:
    """Perplexity against bytes, rounds and seconds under a protocol; None where no row has both.

    A fourth panel has gigabytes in the paper's system, with the paper's own points, where its tables cover the size.
    """
    shown = [row for row in rows if row.perplexity is not None and protocol in row.private]
    if not shown:
        return None
    papers = [(i, row) for i, row in enumerate(shown, 1) if row.paper_system]
    panels = len(_MEASURES) + bool(papers)
    height = max(3.6, 1.5 + 0.17 * len(shown))
    fig = titled(
        "Perplexity and the cost of private execution",
        f"{title or 'held-out text'}  ·  {protocol}, predicted for one forward pass",
        3.0 * panels + 2.6, height,
        "Bars: one standard deviation over seeds. The line joins what nothing else beats in both (orange; bold: by "
        "bytes). What diverged, or holds an operation that the cost model has not measured, is not here.",
    )  # fmt: skip
    axes = fig.subplots(1, panels + 1, width_ratios=(*(1,) * panels, 0.72), squeeze=False)[0]
    drawn: list[list[Mark]] = []
    for ax, (measure, unit, label) in zip(axes, _MEASURES, strict=False):
        costs = [getattr(row.private[protocol], measure) / unit for row in shown]
        pairs = enumerate(zip(costs, shown, strict=True), 1)
        marks = [Mark(i, cost, row.perplexity, row.spread or 0) for i, (cost, row) in pairs]
        _draw(ax, marks, label)
        drawn.append(marks)
    if papers:
        marks = [Mark(i, row.paper_system.gigabytes, row.perplexity, row.spread or 0) for i, row in papers]
        printed = [
            Mark(i, row.published.gigabytes, row.published.perplexity, 0)
            for i, row in papers
            if row.published and row.published.gigabytes and row.published.perplexity
        ]
        _draw(axes[-2], marks, "GB in the paper's system (hollow: the paper's own)", printed)
        drawn.append([*marks, *printed])
    axes[0].set_ylabel("held-out perplexity")
    axes[-1].set_axis_off()
    best = {i + 1 for i in pareto([(row.private[protocol].bytes, row.perplexity) for row in shown])}
    for i, row in enumerate(shown, 1):
        weight = "bold" if i in best else "normal"
        y = 1 - (i - 0.5) / max(len(shown), 8)
        axes[-1].text(0, y, f"{i}  {row.label}", transform=axes[-1].transAxes, va="center", size=7.5, weight=weight)
    fig.get_layout_engine().execute(fig)  # where marks are is known only then
    for ax, marks in zip(axes, drawn, strict=False):
        _number(ax, marks)
    return fig


def _draw(ax: Axes, marks: Sequence[Mark], label: str, printed: Sequence[Mark] = ()) -> None:
    """One panel: every mark with its number, and the front as steps."""
    points = [(mark.cost, mark.perplexity) for mark in marks]
    front = pareto(points)
    ax.step(*zip(*(points[i] for i in front), strict=True), where="post", color=GREY, linewidth=1, zorder=1)
    for i, mark in enumerate(marks):
        color = ORANGE if i in front else BLUE
        ax.errorbar(mark.cost, mark.perplexity, mark.spread, fmt="o", color=color, capsize=2, linewidth=0.8)
    for mark in printed:
        ax.plot(mark.cost, mark.perplexity, "o", markerfacecolor="none", markeredgecolor=BLACK)
    log_axis(ax, "x", np.array([mark.cost for mark in (*marks, *printed)]))
    log_axis(ax, "y", np.array([mark.perplexity for mark in (*marks, *printed)]))
    ax.set_xlabel(label)
    ax.margins(0.12)


def _number(ax: Axes, marks: Sequence[Mark]) -> None:
    """Writes beside each mark its number, in the first place that no other mark or number has."""
    unit = ax.figure.dpi / 72
    at = [ax.transData.transform((mark.cost, mark.perplexity)) for mark in marks]
    taken = [Bbox.from_extents(x, y, x, y).padded(2 * unit) for x, y in at]
    for mark, (x, y) in zip(marks, at, strict=True):
        width = 5 * len(str(mark.number))
        places = [(dx, dy) for far in range(6) for dx in (4 + 8 * far, -4 - 8 * far - width) for dy in (1, -8)]
        boxes = [Bbox.from_bounds(x + dx * unit, y + dy * unit, width * unit, 7 * unit) for dx, dy in places]
        i = next((i for i, box in enumerate(boxes) if not box.count_overlaps(taken)), 0)
        taken.append(boxes[i])
        ax.annotate(f"{mark.number}", (mark.cost, mark.perplexity), places[i], textcoords="offset points", size=7.5)
