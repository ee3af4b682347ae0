"""The figures of a run (Fig. 2 to 8 of the paper), each a function of a `History` that returns a matplotlib `Figure`.

What they draw is what the run logged, number for number; where the run has no such data they return None.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from jax_entropy.report import private
from jax_entropy.report.drawing import (
    BLACK,
    BLUE,
    GREY,
    HEAT_MAP,
    MAXIMUM_NAMES,
    ORANGE,
    QUARTERS,
    bottom_legend,
    heat_map,
    incident_note,
    layer_axis,
    layer_lines,
    log_axis,
    named_lines,
    nats,
    new_figure,
    paper_style,
    quarter_bars,
    step_axis,
)
from jax_entropy.report.history import History


@paper_style
def head_entropy(history: History) -> Figure:
    """Heat-maps of head entropies [L, N] in nats at the first, middle and last step, with quarter shares (Fig. 3)."""
    entropy_ExLxN = history.train["head_entropy"]
    E, L, N = entropy_ExLxN.shape
    shown = sorted({0, E // 2, E - 1})
    maxima = history.maxima()
    end = max(maxima["causal"], entropy_ExLxN[np.isfinite(entropy_ExLxN)].max(initial=0)) or 1
    named = ", ".join(f"{MAXIMUM_NAMES[name]} {nats(value)}" for name, value in maxima.items())
    note = (
        f"{named[0].upper() + named[1:]} (where the colours end). The mark on the colour scale: observed maximum.\n"
        "Each panel is one training batch. Bars: share of heads in each quarter of the panel's largest entropy, bottom "
        "(dark) to top quarter (light)."
    )
    if not np.isfinite(entropy_ExLxN[shown]).all():
        note += "\nHatched: not a number (NaN)."
    height = max(L * np.clip(3.6 / L, 0.17, 0.5), 0.9)
    width = 5.8 if len(shown) == 1 else 2.8 * len(shown) + 1.1
    fig = new_figure(history, "Entropy of every attention head", width, height + 2.2, note)
    axes = fig.subplots(2, len(shown), squeeze=False, height_ratios=(height, 0.15))
    crowded = dict(decimals=1, size=6.5) if N > 8 and len(shown) > 1 else {}
    for e, ax, bar_ax in zip(shown, *axes, strict=True):
        image = heat_map(ax, entropy_ExLxN[e], limits=(0, end), **crowded)
        ax.set_title(f"step {history.steps_E[e]:,}" + (" (last)" if e == E - 1 else ""))
        quarter_bars(bar_ax, history.train["bands_observed"][[e]], labelled=False)
        bar_ax.set(xticks=[], yticks=[])
        bar_ax.spines[:].set_visible(False)
        shares = " · ".join(f"{100 * share:z.1f}" for share in history.train["bands_observed"][e])
        bar_ax.set_xlabel(f"{shares} %", labelpad=2)
        if e:
            ax.set_ylabel("")
    scale = fig.colorbar(image, ax=list(axes[0]), pad=0.02, aspect=25, label="head entropy [nats]")
    for color, linewidth in (("white", 3), ("black", 1.2)):
        scale.ax.axhline(maxima["observed"], color=color, linewidth=linewidth)
    return fig


@paper_style
def layer_entropy(history: History) -> Figure:
    """Mean entropy of each layer's heads in nats over the steps, with the reference maxima (Fig. 5, 8)."""
    fig = new_figure(history, "Mean attention entropy of each layer", 6.4, 4.2, incident_note(history.incidents))
    ax = fig.subplots()
    step_axis(ax, history.steps_E, history.incidents)
    entropy_ExL, maxima = history.train["layer_entropy"], history.maxima()
    top = max(maxima["context"], entropy_ExL[np.isfinite(entropy_ExL)].max(initial=0)) or 1
    ax.set(ylabel="mean head entropy [nats]", ylim=(0, 1.08 * top))
    for name in ("context", "causal"):
        ax.axhline(maxima[name], color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
        text = f"{MAXIMUM_NAMES[name]} = {nats(maxima[name])}"
        ax.annotate(text, (0.01, maxima[name]), (0, 2), ("axes fraction", "data"), "offset points", size=7.5)
    layer_lines(ax, history.steps_E, entropy_ExL)
    return fig


@paper_style
def entropy_bands(history: History) -> Figure:
    """Shares of heads in the quarters of the entropy range: over the steps, and at the end (Fig. 2a, 7)."""
    maxima = history.maxima()
    several = len(history.steps_E) > 1
    share_3x4 = np.stack([history.train[f"bands_{name}"][-1] for name in maxima])
    share_Ex4 = np.nan_to_num(history.train["bands_observed"])
    rest = "; the rest: not a number" if min(share_Ex4.sum(axis=1)) < 0.999 else ""
    note = "Heads in a training batch.\n" + incident_note(history.incidents)
    fig = new_figure(history, "Share of heads in each quarter of the entropy range", 9.2 if several else 6.2, 3.5, note)
    *left, ax = fig.subplots(1, 1 + several, squeeze=False, width_ratios=(1.2, 1)[-1 - several :])[0]
    for over_steps in left:
        over_steps.stackplot(history.steps_E, share_Ex4.T, colors=QUARTERS, edgecolor="0.25", linewidth=0.6)
        step_axis(over_steps, history.steps_E, history.incidents)
        over_steps.set(ylim=(0, 1), ylabel="share of heads [%]", xlim=(history.steps_E[0], None))
        over_steps.set_title("over training, of the observed maximum")
        over_steps.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    quarter_bars(ax, share_3x4, labelled=True)
    ax.set_title(f"at step {history.steps_E[-1]:,}, of each maximum")
    ax.set_yticks(range(3), [f"{MAXIMUM_NAMES[name]}\n{nats(value)}" for name, value in maxima.items()])
    ax.set_xlabel(f"share of heads [%]{rest}")
    ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    bottom_legend(fig, ax, ncols=4 if several else 2)
    return fig


@paper_style
def loss(history: History) -> Figure:
    """Training and validation loss in nats per token and as perplexity, and the penalty if any (Fig. 2b)."""
    penalty_E = np.nan_to_num(history.train.get("penalty", np.zeros(1)))
    penalized = bool(penalty_E.any())
    fig = new_figure(history, "Loss and perplexity", 6.4, 4.9 if penalized else 3.8, incident_note(history.incidents))
    axes = fig.subplots(1 + penalized, 1, squeeze=False, sharex=True, height_ratios=(3.2, 1)[: 1 + penalized])[:, 0]
    ax = axes[0]
    dot = "o" if len(history.steps_E) == 1 else ""
    cross_entropy_E = history.train["cross_entropy"]
    ax.plot(history.steps_E, cross_entropy_E, color=BLUE, marker=dot, label=f"training, {_last(cross_entropy_E)}")
    if "validation_loss" in history.evaluate:
        validation_E = history.evaluate["validation_loss"]
        look = dict(
            linestyle=(0, (4, 1.5)), marker="o", markerfacecolor="white", markersize=4.5, clip_on=False, zorder=3
        )
        ax.plot(
            history.evaluate["step"], validation_E, color=ORANGE, label=f"validation, {_last(validation_E)}", **look
        )
    ax.set_ylabel("cross-entropy [nats/token]")
    ax.margins(y=0.08 if len(history.steps_E) > 1 else 0.6)
    ax.legend(loc="best" if len(history.steps_E) > 1 else "upper left")
    _mark_divergence(ax, history.steps_E, cross_entropy_E)
    _perplexity_axis(ax)
    if penalized:
        axes[1].plot(history.steps_E, history.train["penalty"], color=BLACK, marker=dot)
        axes[1].set(ylabel="penalty [nats²]", ylim=(0, None))
        axes[1].set_title("entropy penalty, before its weight λ")
        axes[1].yaxis.set_major_formatter("{x:,g}")
    for each in axes:
        step_axis(each, history.steps_E, history.incidents)
        each.label_outer()
    return fig


def _last(loss_E: np.ndarray) -> str:
    if not math.isfinite(loss_E[-1]):
        return "NaN at the end"
    return f"at the end {loss_E[-1]:.3f} (perplexity {math.exp(min(loss_E[-1], 700)):.4g})"


def _mark_divergence(ax: Axes, steps_E: np.ndarray, loss_E: np.ndarray) -> None:
    lost = np.flatnonzero(~np.isfinite(loss_E))
    if lost.size:
        step = steps_E[lost[0]]
        ax.axvline(step, color=BLACK, linewidth=0.9, linestyle=(0, (1, 1)))
        side = "left" if step < steps_E[-1] / 2 else "right"
        ax.annotate(f" NaN at step {step:,} ", (step, 0.5), xycoords=("data", "axes fraction"), size=7.5, ha=side)


def _perplexity_axis(ax: Axes) -> None:
    """The same heights read as perplexities: round ones p stand at log p."""
    low, high = ax.get_ylim()
    if high > 30:  # diverged; nobody reads a perplexity of e³⁰
        return
    if high - low > 1.2:
        ticks = np.array([m * 10.0**k for k in range(-1, 14) for m in (1, 2, 5)])
    else:
        ticks = MaxNLocator(6).tick_values(math.exp(low), math.exp(high))
    ticks = [p for p in ticks if p > 0 and low <= math.log(p) <= high]
    right = ax.twinx()
    right.set(ylim=(low, high), ylabel="perplexity")
    right.set_yticks(np.log(ticks), [f"{p:,.6g}" for p in ticks])
    right.spines["right"].set_visible(True)
    right.grid(False)


@paper_style
def thresholds(history: History) -> Figure | None:
    """Learned thresholds θ [L, N] at the end, with mean and variance of each layer (Fig. 6); None without EReg."""
    threshold_ExLxN = history.train.get("threshold")
    if threshold_ExLxN is None or threshold_ExLxN.ndim != 3:
        return None
    threshold_LxN = threshold_ExLxN[-1]
    known = threshold_LxN[np.isfinite(threshold_LxN)]
    limits = (known.min(), known.max()) if known.size and np.ptp(known) > 0 else (0, 1)
    L = len(threshold_LxN)
    fig = new_figure(history, "Learned entropy thresholds θ", 8.6, max(L * np.clip(3.6 / L, 0.17, 0.5), 0.9) + 1.4)
    ax, mean_ax, variance_ax = fig.subplots(1, 3, width_ratios=(3.1, 1, 1))
    image = heat_map(ax, threshold_LxN, limits=limits)
    ax.set_title(f"step {history.steps_E[-1]:,}")
    fig.colorbar(image, ax=ax, pad=0.02, aspect=25, label="θ [fraction of log T]")
    for side, value_L, name, marker in (
        (mean_ax, threshold_LxN.mean(axis=1), "mean", "o"),
        (variance_ax, threshold_LxN.var(axis=1), "variance", "s"),
    ):
        side.plot(value_L, range(L), color=BLACK, marker=marker, linewidth=0.9)
        side.set_title(f"{name} over heads")
        side.set(xlabel=f"{name} of θ", xlim=(0, 1.2 * value_L[np.isfinite(value_L)].max(initial=1e-6)))
        side.xaxis.set_major_locator(MaxNLocator(3, steps=(1, 2, 5, 10)))
        side.xaxis.set_major_formatter("{x:g}")
        layer_axis(side, L)
        side.set_ylabel("")
    return fig


@paper_style
def temperature(history: History) -> Figure | None:
    """Learned temperatures: mean of each layer over the steps, and their range at the end; None without SM(t)."""
    if "temperature/mean" not in history.train:
        return None
    mean_ExL, least_ExL, largest_ExL = (history.train[f"temperature/{name}"] for name in ("mean", "min", "max"))
    L = mean_ExL.shape[1]
    fig = new_figure(
        history, "Learned temperatures t, divisors of the attention logits", 8.6, 3.9, incident_note(history.incidents)
    )
    ax, range_ax = fig.subplots(1, 2, width_ratios=(1.5, 1))
    ax.set_title("mean over heads and positions")
    ax.set_ylabel("mean temperature [no unit]")
    step_axis(ax, history.steps_E, history.incidents)
    log_axis(ax, "y", mean_ExL)
    range_ax.hlines(range(L), least_ExL[-1], largest_ExL[-1], color="0.55", linewidth=2.2)
    range_ax.plot(mean_ExL[-1], range(L), "o", color=BLACK, markersize=4.5)
    range_ax.set_title(f"least, mean and largest at step {history.steps_E[-1]:,}")
    range_ax.set_xlabel("temperature [no unit]")
    log_axis(range_ax, "x", np.concatenate([least_ExL[-1], largest_ExL[-1]]))
    layer_axis(range_ax, L)
    layer_lines(ax, history.steps_E, mean_ExL)
    return fig


@paper_style
def stability(history: History) -> Figure:
    """What precedes a divergence: gradient norms by group; largest logit, NaN and Inf counts by layer."""
    counts = {name: np.nan_to_num(history.train[f"{name.lower()}_count"]) for name in ("NaN", "Inf")}
    found = [name for name, count_ExL in counts.items() if count_ExL.any()]
    clean = " and ".join(name for name in counts if name not in found)
    note = f"{clean}: none in any layer (logged steps: {len(history.steps_E):,}).\n" if clean else ""
    heights = [2.2, 2.2] + [1.5] * len(found)
    fig = new_figure(history, "Signs of instability", 6.8, sum(heights) + 1.3, note + incident_note(history.incidents))
    axes = fig.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for ax in axes:
        step_axis(ax, history.steps_E, history.incidents)
        ax.label_outer()
    axes[0].set_ylabel("gradient norm")
    axes[0].set_title("gradient norm, all and by parameter group")
    axes[1].set(ylabel="largest logit [no unit]")
    axes[1].set_title("largest scaled attention logit of each layer")
    for ax, name in zip(axes[2:], found, strict=True):
        _count_map(fig, ax, history.steps_E, counts[name])
        ax.set_title(f"{name} in the attention of each layer (white: none)")
    prefix = "gradient_norms/"
    groups = {name.removeprefix(prefix): v_E for name, v_E in history.train.items() if name.startswith(prefix)}
    norms = {"all": history.train["gradient_norm"]} | {name.replace("_", " "): v_E for name, v_E in groups.items()}
    log_axis(axes[0], "y", np.concatenate(list(norms.values())))
    named_lines(axes[0], [(name, history.steps_E, norm_E) for name, norm_E in norms.items()])
    if np.nanmax(history.train["max_logit"], initial=0) > 1000:  # one layer that runs away must not flatten the others
        axes[1].set_yscale("symlog", linthresh=1)
        axes[1].yaxis.set_major_formatter("{x:,g}")
    layer_lines(axes[1], history.steps_E, history.train["max_logit"])
    return fig


def _count_map(fig: Figure, ax: Axes, steps_E: np.ndarray, count_ExL: np.ndarray) -> None:
    L = count_ExL.shape[1]
    edges = np.concatenate([[0], steps_E])
    colors = ListedColormap(HEAT_MAP.reversed()(np.linspace(0.2, 1, 256)))
    norm = LogNorm(1, max(count_ExL.max(), 10))
    mesh = ax.pcolormesh(edges, np.arange(L + 1) - 0.5, np.ma.masked_equal(count_ExL.T, 0), cmap=colors, norm=norm)
    layer_axis(ax, L, most=9)
    ax.grid(False)
    fig.colorbar(mesh, ax=ax, pad=0.01, label="count", format="{x:g}").ax.yaxis.set_minor_formatter(NullFormatter())


class Item(NamedTuple):
    """One picture of the report: its file is named `name`, what it tells is said below it, None is not shown."""

    name: str
    caption: str
    draw: Callable[[History], Figure | None]


ITEMS = (
    Item("loss", "Training and validation cross-entropy. The right axis reads the same curves as perplexities.", loss),
    Item(
        "head_entropy",
        "Near zero a head looks at one token (collapse); near the maximum it looks at all alike (overload).",
        head_entropy,
    ),
    Item(
        "layer_entropy",
        "Deep layers that sink to zero foretell an unstable run; layers that stay at the causal maximum have heads "
        "that did not specialise.",
        layer_entropy,
    ),
    Item(
        "entropy_bands",
        "A well-behaved model has about 90 % of its heads in the middle quarters of the observed maximum.",
        entropy_bands,
    ),
    Item(
        "thresholds",
        "The entropy that each head is held to, learned with the weights, as a fraction of log T.",
        thresholds,
    ),
    Item(
        "temperature",
        "Above 1 attention is spread out, below 1 it is sharpened, and the gradients of queries and keys grow.",
        temperature,
    ),
    Item("stability", "A gradient norm or a largest logit that keeps growing precedes NaN.", stability),
    Item(
        "private",
        "A forward pass under secure computation: what the busiest party sends, how often messages wait for others, "
        "and the time of both on a network.",
        private.of_history,
    ),
)
