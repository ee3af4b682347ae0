"""What the figures share: one look for print, heat-maps of layers and heads, and labels that never overlap.

Figures are plain objects: pyplot and its state are never touched, and the caller's rcParams stay as they were.
"""

import math
import textwrap
from collections.abc import Sequence

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy.optimize import isotonic_regression

from jax_entropy.report.history import History

# Dark is low and light is high in every one of them, so that nothing is lost in grey print.
HEAT_MAP = matplotlib.colormaps["viridis"].with_extremes(bad="none")
DEPTH = matplotlib.colormaps["plasma"]
QUARTERS = [HEAT_MAP(x) for x in (0.0, 0.36, 0.7, 1.0)]
QUARTER_NAMES = ("bottom quarter (collapse)", "second quarter", "third quarter", "top quarter (overload)")
MAXIMUM_NAMES = dict(observed="observed maximum", context="log T", causal="causal maximum")
BLACK, GREY, BLUE, ORANGE = "0.1", "0.4", "#0072b2", "#d55e00"
DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1)))
MARKERS = "osD^vPX"
MOST_ANNOTATED = 200  # cells of a heat-map

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "0.25",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "legend.fancybox": False,
    "legend.fontsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a $ in a folder's name is a $
    "figure.dpi": 150,
    "savefig.dpi": 150,
}
paper_style = matplotlib.style.context(["default", _STYLE])  # a decorator


def new_figure(history: History, title: str, width: float, height: float, note: str = "") -> Figure:
    """An empty figure of width × height inches, titled with what it shows and of which run, room kept for both."""
    return titled(title, describe(history), width, height, note)


def titled(title: str, subtitle: str, width: float, height: float, note: str = "") -> Figure:
    """As `new_figure`, with any subtitle; the note goes to the foot."""
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.text(0.1 / width, 1 - 0.1 / height, title, size=11, weight="bold", va="top", color=BLACK)
    fig.text(0.1 / width, 1 - 0.32 / height, subtitle, size=8.5, va="top", color=GREY)
    lines = [line for sentence in note.splitlines() for line in textwrap.wrap(sentence, int(width / 0.062))]
    fig.text(0.1 / width, 0.09 / height, "\n".join(lines), size=7.5, va="bottom", color=GREY)
    foot = 0.09 + 0.14 * len(lines)
    fig.get_layout_engine().set(rect=(0, foot / height, 1, 1 - (foot + 0.54) / height), w_pad=0.07, h_pad=0.05)
    return fig


def describe(history: History) -> str:
    """Architecture, dataset and the span of steps, for under a title."""
    first, last = history.steps_E[0], history.steps_E[-1]
    steps = f"step {last:,}" if first == last else f"steps {first:,}–{last:,}"
    return f"{history.architecture}  ·  {history.dataset}  ·  {steps}"


def nats(value: float) -> str:
    """An entropy as it is printed in a figure; what diverged is said in words."""
    return f"{value:.2f} nats" if math.isfinite(value) else "not a number"


def step_axis(ax: Axes, steps_E: np.ndarray, incidents: Sequence[dict] = ()) -> None:
    """Steps from 0 to the last, those marked where the guard sent training back; a single one gets some room."""
    sent_back = [incident["step"] for incident in incidents]
    last = max(steps_E[-1], 1, *sent_back)
    ax.set(xlabel="training step", xlim=(0, last * (1 if len(steps_E) > 1 else 1.1)))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    for step in sent_back:
        ax.axvline(step, color=BLACK, linewidth=0.8, linestyle=(0, (1, 1.5)), gid="incident")
        ax.plot(step, 0.97, "v", transform=ax.get_xaxis_transform(), color=BLACK, markersize=6, zorder=4)


def incident_note(incidents: Sequence[dict]) -> str:
    """The foot of a figure whose step axis marks incidents; nothing where there was none."""
    if not incidents:
        return ""
    steps = ", ".join(f"{incident['step']:,}" for incident in incidents[:8]) + ", …" * (len(incidents) > 8)
    return f"▼ The guard sent training back to an earlier checkpoint (at step {steps})."


def layer_axis(ax: Axes, num_layers: int, most: int = 18) -> None:
    """Layers downwards, the first at the top, as in the heat-maps; at most `most` of them are numbered."""
    ax.set(ylabel="layer", ylim=(num_layers - 0.5, -0.5))
    ax.set_yticks(range(0, num_layers, math.ceil(num_layers / most)))


def log_axis(ax: Axes, which: str, values: np.ndarray) -> None:
    """Makes the axis "x" or "y" logarithmic, with plain numbers, if the values span enough for it to be of use."""
    known = values[np.isfinite(values) & (values > 0)]
    if not known.size or known.max() < 5 * known.min():
        return
    ax.set(**{f"{which}scale": "log"})
    axis = getattr(ax, f"{which}axis")
    wide = known.max() > 100 * known.min()
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def heat_map(
    ax: Axes, values_LxN: np.ndarray, *, limits: tuple[float, float], decimals: int = 2, size: float = 7
) -> AxesImage:
    """Draws [L, N], layer 0 at the top, hatched where not a number, numbers in the cells if they are not too many."""
    L, N = values_LxN.shape
    low, high = limits
    image = ax.imshow(np.ma.masked_invalid(values_LxN), cmap=HEAT_MAP, vmin=low, vmax=high, aspect="auto")
    ax.patch.set(facecolor="white", hatch="////", edgecolor="0.6", linewidth=0)
    ax.grid(False)
    ax.spines[:].set_visible(True)
    layer_axis(ax, L)
    ax.set_xlabel("head")
    ax.set_xticks(range(0, N, math.ceil(N / 18)))
    ax.tick_params(length=2)
    if values_LxN.size <= MOST_ANNOTATED:
        for (layer, head), value in np.ndenumerate(values_LxN):
            if np.isfinite(value):
                color = text_color(image.to_rgba(value))
                ax.text(head, layer, f"{value:.{decimals}f}", color=color, size=size, ha="center", va="center")
    return image


def quarter_bars(ax: Axes, share_Rx4: np.ndarray, *, labelled: bool) -> None:
    """One horizontal bar a row, the bottom quarter first; heads that are not a number are missing from 100 %."""
    share_Rx4 = np.nan_to_num(share_Rx4)
    starts_Rx4 = np.cumsum(share_Rx4, axis=1) - share_Rx4
    edge = dict(edgecolor="0.25", linewidth=0.6, height=0.62)
    for quarter, color in enumerate(QUARTERS):
        rows, widths = range(len(share_Rx4)), share_Rx4[:, quarter]
        bars = ax.barh(rows, widths, left=starts_Rx4[:, quarter], color=color, label=QUARTER_NAMES[quarter], **edge)
        if labelled:
            texts = [f"{100 * width:.0f}" if width >= 0.055 else "" for width in widths]
            ax.bar_label(bars, texts, label_type="center", color=text_color(color), size=7.5)
    ax.set(xlim=(0, 1), ylim=(len(share_Rx4) - 0.5, -0.5))
    ax.grid(False)


def bottom_legend(fig: Figure, ax: Axes, ncols: int) -> None:
    """The legend of `ax` below all axes and above the note, which "outside lower center" would cover."""
    engine = fig.get_layout_engine()
    _, foot, _, height = engine.get()["rect"]
    handles = ax.get_legend_handles_labels()
    legend = fig.legend(*handles, loc="lower center", bbox_to_anchor=(0.5, foot), ncols=ncols, columnspacing=1.4)
    legend.set_in_layout(False)
    taken = legend.get_window_extent().height / fig.bbox.height
    engine.set(rect=(0, foot + taken, 1, height - taken))


def luminance(rgb: Sequence[float]) -> float:
    """Relative luminance (WCAG) of an sRGB colour, 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def text_color(background: Sequence[float]) -> str:
    """Black or white, whichever contrasts more with the background."""
    return "black" if luminance(background) > 0.179 else "white"


def layer_lines(ax: Axes, steps_E: np.ndarray, values_ExL: np.ndarray) -> None:
    """One line a layer, dark for the first, light for the deepest, with its number at its end."""
    L = values_ExL.shape[1]
    lines = []
    for layer in range(L):
        color = DEPTH(0.88 * layer / max(L - 1, 1))
        marker = MARKERS[layer % len(MARKERS)] if len(steps_E) == 1 else ""
        lines += ax.plot(steps_E, values_ExL[:, layer], color=color, linestyle=DASHES[layer % 4], marker=marker)
    labelled = range(0, L, math.ceil(L / 20))
    label_ends(ax, [lines[layer] for layer in labelled], [str(layer) for layer in labelled], kind="layer")


def named_lines(ax: Axes, curves: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """One line for each (name, steps, values), each with its own colour, dash and marker, and its name at its end."""
    lines = []
    for i, (_, steps_E, value_E) in enumerate(curves):
        color = DEPTH(0.85 * i / max(len(curves) - 1, 1))
        gap = max(len(steps_E) // 7, 1)
        look = dict(linestyle=DASHES[i % 4], marker=MARKERS[i % len(MARKERS)], markevery=(i % gap, gap))
        lines += ax.plot(steps_E, value_E, color=color, **look)
    label_ends(ax, lines, [name for name, _, _ in curves])


def label_ends(ax: Axes, lines: list[Line2D], labels: list[str], kind: str = "") -> None:
    """Writes each line's label right of the axes, at the height of its last finite value or as near as is legible.

    The uppermost label also says what `kind` of thing they number; a line that ends in no finite value is marked NaN.
    """
    fig = ax.get_figure()
    fig.get_layout_engine().execute(fig)  # the height of the axes is known only then
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = []
    for line in lines:
        known = line.get_xydata()[np.isfinite(line.get_ydata())]
        ends.append(to_axes.transform(known[-1]) if len(known) else None)
    order = sorted(range(len(lines)), key=lambda i: -1 if ends[i] is None else ends[i][1])
    rise = np.arange(len(lines)) * (9 / 72 * fig.dpi / ax.bbox.height)
    wanted = np.array([0 if ends[i] is None else ends[i][1] for i in order])
    heights = np.clip(isotonic_regression(wanted - rise).x, 0, max(1 - rise[-1], 0)) + rise
    for i, height in zip(order, heights, strict=True):
        text = f"{kind} {labels[i]}" if kind and i == order[-1] else labels[i]
        leader = dict(arrowstyle="-", color="0.6", linewidth=0.5, shrinkA=1, shrinkB=1, relpos=(0, 0.5))
        ax.annotate(
            text if np.isfinite(lines[i].get_ydata()[-1]) else f"{text} (NaN)",
            xy=(1, height) if ends[i] is None else ends[i],
            xytext=(1.035, height),
            xycoords="axes fraction",
            size=7.5,
            va="center",
            color=BLACK,
            annotation_clip=False,
            arrowprops=leader,
        )
