"""The picture of private execution shows the numbers that were written, by group, and what the others save."""

import numpy as np
import pytest

from jax_entropy.census import GROUPS, KINDS
from jax_entropy.report.private import private_costs


def profile(architecture, factor):
    """A profile as JSON: of the i-th kind i MB, i rounds and i seconds, times the factor."""
    cost = {kind.name: i * factor for i, kind in enumerate(KINDS, start=1)}
    return dict(
        architecture=architecture, export="plain", network="wan", num_tokens=32,
        setting=dict(protocol="semi2k", fraction_bits=18),
        costs={kind: dict(bytes=1e6 * n, rounds=n, seconds=n) for kind, n in cost.items()},
    )  # fmt: skip


def test_bars_are_sums_by_group_and_ratios_those_of_the_first():
    fig = private_costs([profile("SM+LN+G", 4), profile("SM", 1)])
    numbers = {group: [i for i, kind in enumerate(KINDS, start=1) if kind.group == group] for group in GROUPS}
    for ax, label in zip(fig.axes, ("MB sent", "rounds", "seconds (wan)"), strict=True):
        assert ax.get_xlabel() == label
        widths = np.array([[bar.get_width() for bar in bars] for bars in ax.containers]).T
        expected = np.array([sum(numbers[group]) for group in GROUPS])
        np.testing.assert_allclose(widths, [4 * expected, expected])
        total = sum(range(1, len(KINDS) + 1))
        assert [text.get_text() for text in ax.texts] == [f" {4 * total:,}", f" {total:,} (4.0×)"]
    names = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert names == ["SM+LN+G\nplain", "SM\nplain"]
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == list(GROUPS)


def test_every_kind_has_a_group_that_is_drawn():
    assert {kind.group for kind in KINDS} == set(GROUPS)


@pytest.mark.parametrize("count", [1, 8])
def test_nothing_is_cut(count):
    fig = private_costs([profile(f"EReg(SM(t)+ScFuFFN^{i})", 1 + i) for i in range(count)])
    fig.draw_without_rendering()
    for ax in fig.axes:
        for text in (*ax.texts, *ax.get_yticklabels()):
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y0 >= 0 and box.y1 <= fig.bbox.y1
