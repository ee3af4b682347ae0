"""Runs side by side: where their heads' entropies ended and how their losses got there (Fig. 2a and 2b)."""

from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jax_entropy.errors import UserError
from jax_entropy.report.drawing import named_lines, nats, paper_style, quarter_bars, step_axis, titled
from jax_entropy.report.history import Run


@paper_style
def comparison(runs: list[Run]) -> Figure:
    """Quarter shares of each run's heads at its end, and the loss in nats per token over the steps.

    The loss is that of validation if all runs have it, else that of training. Runs of one architecture are told apart
    by the name of their workdir.
    """
    if not runs:
        raise UserError("no workdir was given to compare; name at least one")
    names = _names(runs)
    datasets = ", ".join(dict.fromkeys(run.dataset for run in runs))
    fig = titled(
        "Entropy and loss of several runs",
        f"{datasets}  ·  quarters of each run's largest head entropy, at its last logged step",
        *(10.6, max(3.4, 0.5 * len(runs) + 1.9)),
    )
    bars_ax, loss_ax = fig.subplots(1, 2, width_ratios=(1, 1.1))
    quarter_bars(bars_ax, np.stack([run.train["bands_observed"][-1] for run in runs]), labelled=True)
    rows = [f"{name}\n{nats(run.maxima()['observed'])}" for name, run in zip(names, runs, strict=True)]
    bars_ax.set_yticks(range(len(runs)), rows)
    bars_ax.set_xlabel("share of heads [%]")
    bars_ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    bars_ax.set_title("a  heads in each quarter of the entropy range")
    fig.legend(*bars_ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, columnspacing=1.4)

    validated = all("validation_loss" in run.evaluate for run in runs)
    key, kind = ("validation_loss", "validation") if validated else ("cross_entropy", "training")
    curves = [run.evaluate if validated else run.train for run in runs]
    longest = max((curve["step"] for curve in curves), key=lambda steps_E: steps_E[-1])
    step_axis(loss_ax, longest)
    loss_ax.set_ylabel(f"{kind} loss [nats/token]")
    loss_ax.set_title(f"b  {kind} loss")
    lasts = [f", {curve[key][-1]:.3f}" if np.isfinite(curve[key][-1]) else "" for curve in curves]
    ends = [name + last for name, last in zip(names, lasts, strict=True)]
    named_lines(loss_ax, [(end, curve["step"], curve[key]) for end, curve in zip(ends, curves, strict=True)])
    return fig


def _names(runs: list[Run]) -> list[str]:
    count = Counter(run.architecture for run in runs)
    return [run.architecture + (f" ({run.workdir.name})" if count[run.architecture] > 1 else "") for run in runs]
