"""Runs side by side: where their heads' entropies ended and how their losses got there (Fig. 2a and 2b)."""

import textwrap
from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jax_entropy.errors import UserError
from jax_entropy.report.drawing import bottom_legend, named_lines, nats, paper_style, quarter_bars, step_axis, titled
from jax_entropy.report.history import History

_LOSSES = dict(
    validation_loss="validation loss [nats/token]",
    bits_per_byte="validation loss [bits/byte]",
    cross_entropy="training loss [nats/token]",
)


@paper_style
def comparison(histories: list[History]) -> Figure:
    """Quarter shares of each run's heads at its end, and the loss over the steps.

    The loss is that of validation if all runs have it, else that of training; in nats per token where the runs share a
    tokenizer, else in bits per byte. Runs of one architecture are told apart by the name of their workdir.

    Raises:
      UserError: there is none to compare.
    """
    if not histories:
        raise UserError("no workdir was given to compare; name at least one")
    names = _names(histories)
    maxima = [nats(history.maxima()["observed"]) for history in histories]
    labels = [f"{_folded(name)}\n{most}" for name, most in zip(names, maxima, strict=True)]
    key, note = _measure(histories)
    datasets = ", ".join(dict.fromkeys(history.dataset for history in histories))
    fig = titled(
        "Entropy and loss of several runs",
        f"{datasets}  ·  quarters of each run's largest head entropy in a training batch, at its last logged step",
        10.6, max(3.4, 0.19 * sum(label.count("\n") + 1.7 for label in labels) + 1.9), note,
    )  # fmt: skip
    bars_ax, loss_ax = fig.subplots(1, 2, width_ratios=(1, 1.1))
    quarter_bars(bars_ax, np.stack([history.train["bands_observed"][-1] for history in histories]), labelled=True)
    bars_ax.set_yticks(range(len(labels)), labels)
    bars_ax.set_xlabel("share of heads [%]")
    bars_ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    bars_ax.set_title("a  heads by quarter of entropy")
    bottom_legend(fig, bars_ax, ncols=4)

    curves = [history.train if key == "cross_entropy" else history.evaluate for history in histories]
    longest = max((curve["step"] for curve in curves), key=lambda steps_E: steps_E[-1])
    step_axis(loss_ax, longest)
    loss_ax.set_ylabel(_LOSSES[key])
    loss_ax.set_title(f"b  {_LOSSES[key].partition(' [')[0]}")
    lasts = [f", {curve[key][-1]:.3f}" if np.isfinite(curve[key][-1]) else "" for curve in curves]
    ends = [name + last for name, last in zip(names, lasts, strict=True)]
    named_lines(loss_ax, [(end, curve["step"], curve[key]) for end, curve in zip(ends, curves, strict=True)])
    return fig


def _names(histories: list[History]) -> list[str]:
    count = Counter(history.architecture for history in histories)
    return [
        history.architecture + (f" ({history.name})" if count[history.architecture] > 1 else "")
        for history in histories
    ]


def _folded(name: str) -> str:
    """A long name in several lines, so that it leaves room for what it is the name of."""
    return "\n".join(line.replace("+ ", "+") for line in textwrap.wrap(name.replace("+", "+ "), 24))


def _measure(histories: list[History]) -> tuple[str, str]:
    """The metric that compares the runs, and what must be said about it."""
    tokenizers = {history.tokenizer for history in histories if history.tokenizer}
    evaluated = set.intersection(*(set(history.evaluate) for history in histories))
    if len(tokenizers) < 2:
        return ("validation_loss" if "validation_loss" in evaluated else "cross_entropy"), ""
    if "bits_per_byte" in evaluated:
        return "bits_per_byte", "The runs' tokenizers differ: their losses are compared by the byte, not by the token."
    return "cross_entropy", (
        "The runs' tokenizers differ, so that nats per token do not compare; bits per byte come with an evaluation, "
        "and not every run has one yet."
    )
