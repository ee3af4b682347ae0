"""The picture of private execution: stacked bars of bytes, rounds and time, one bar for each way to run a model."""

from pathlib import Path

import matplotlib

from jax_entropy.census import GROUPS, KINDS
from jax_entropy.errors import UserError
from jax_entropy.private.cost.account import Network, on_network
from jax_entropy.private.cost.profile import Profile
from jax_entropy.report.drawing import paper_style, titled

_MAP = matplotlib.colormaps["viridis"]


@paper_style
def draw_profiles(profiles: list[Profile], network: Network, network_name: str, file: str | Path) -> None:
    """Writes a picture of bytes, rounds and time of profiles of one context length, the first being the reference."""
    first = profiles[0]
    fig = titled(
        "Private execution by kind of operation",
        f"{first.setting.protocol}, {first.num_tokens} tokens, {first.setting.fraction_bits} fraction bits",
        9.6, 1.7 + 0.42 * len(profiles),
        f"Bytes: of the party that sends most, weights of optimised exports opened before. Time on {network_name}: "
        "computation of all parties on one machine + rounds × latency + bytes / bandwidth.",
    )  # fmt: skip
    axes = fig.subplots(1, 3, sharey=True)
    measures = (
        ("MB sent", lambda account: max(account.bytes) / 1e6),
        ("rounds", lambda account: account.rounds),
        (f"seconds ({network_name})", lambda account: on_network(account, network)),
    )
    names = [f"{profile.architecture}\n{profile.export}" for profile in profiles]
    for ax, (label, measure) in zip(axes, measures, strict=True):
        starts = [0.0] * len(profiles)
        for i, group in enumerate(GROUPS):
            color = _MAP(i / (len(GROUPS) - 1))
            kinds = {kind.name for kind in KINDS if kind.group == group}
            widths = [sum(measure(a) for kind, a in profile.by_kind().items() if kind in kinds) for profile in profiles]
            ax.barh(names, widths, left=starts, color=color, edgecolor="0.25", linewidth=0.5, height=0.62, label=group)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for row, total in enumerate(starts):
            ratio = f" ({starts[0] / total:.1f}×)" if row else ""
            ax.text(
                total, row, f" {total:,.3g}{ratio}" if total < 1000 else f" {total:,.0f}{ratio}", va="center", size=7.5
            )
        ax.set(xlabel=label, xlim=(0, 1.35 * max(starts)), ylim=(len(profiles) - 0.5, -0.5))
        ax.grid(axis="x")
        ax.grid(False, axis="y")
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="upper right", bbox_to_anchor=(0.995, 0.995), ncols=3, fontsize=7, columnspacing=1)
    try:
        fig.savefig(file)
    except (OSError, ValueError) as error:  # ValueError: a format that is not known
        raise UserError(f"the picture {str(file)!r} cannot be written: {error}") from None
