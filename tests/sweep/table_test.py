"""Ratios with their intervals, the Pareto front and its picture, against definitions of their own."""

import dataclasses
import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_entropy.architecture import architecture
from jax_entropy.sweep.frontier import frontier, pareto
from jax_entropy.sweep.outcome import Outcome
from jax_entropy.sweep.spec import Published
from jax_entropy.sweep.table import make_row, ratio, with_ratios


def test_the_interval_is_that_of_all_ways_to_draw_the_seeds_anew():
    values, baseline = [62.1, 60.4, 63.0], [57.6, 57.9, 58.4]
    draws = [[statistics.fmean(d) for d in itertools.product(of, repeat=3)] for of in (values, baseline)]
    every = np.divide.outer(*map(np.array, draws)).ravel()
    found = ratio(values, baseline)
    assert found.value == pytest.approx(statistics.fmean(values) / statistics.fmean(baseline))
    np.testing.assert_allclose(found[1:], np.percentile(every, (2.5, 97.5)), atol=1e-3)
    assert ratio(values, baseline) == found  # the same whenever it is asked
    assert np.isnan(ratio([60.0], baseline)[1:]).all()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    def beaten(one):
        return any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)

    assert {i for i, point in enumerate(points) if not beaten(point)} == set(pareto(points))


def row(name, perplexities, published=None, **size):
    config = architecture(name, **size)
    head_entropy = np.array([[4.0, 3.0], [2.0, 0.5]])
    outcomes = {seed: Outcome("complete", "", value, 1.5, head_entropy) for seed, value in enumerate(perplexities)}
    return make_row(name, 1e-3, {}, outcomes, 1, config, published)


SMALL = dict(num_layers=2, num_heads=2, model_dim=64, context_length=32, vocab_size=512)


def test_a_row_counts_what_it_has_and_divides_by_what_there_is():
    rows = with_ratios([row("SM+LN+G", [10.0, 12.0], **SMALL), row("SM", [], **SMALL)], ["SM+LN+G", "SM"])
    assert rows[0].ratios == {"SM+LN+G": (1.0, 1.0, 1.0)} and rows[1].ratios == {}
    assert rows[0].perplexity == 11 and rows[1].perplexity is None and rows[1].bands == []


def test_the_papers_models_have_the_papers_cost_beside_their_own():
    baseline, reduced = (row(name, [3.0]) for name in ("SM+LN+G", "EReg(SM(t)+ScFuFFN)"))
    assert baseline.paper_system.gigabytes == pytest.approx(25.32, rel=0.02)
    assert reduced.paper_system.minutes == pytest.approx(4.76, rel=0.03)
    assert baseline.private["semi2k"].bytes > 3 * reduced.private["semi2k"].bytes
    assert row("SM", [3.0], **SMALL).paper_system is None


@pytest.mark.parametrize("count", [1, 3, 14])
def test_the_frontier_shows_every_row_with_its_number_and_cuts_nothing(count):
    names = ["SM+LN+G", "SM+ScFuFFN", *(f"SM+LR(0.{i})" for i in range(1, count))][:count]
    rows = [row(name, [10.0 + i, 10.5 + i], Published(3.0 + i, 9.0, 5.0)) for i, name in enumerate(names)]
    fig = frontier([*rows, dataclasses.replace(rows[0], perplexity=None)], "semi2k")
    assert [ax.get_xlabel().partition(" ")[0] for ax in fig.axes] == ["MB", "rounds", "seconds", "GB", ""]
    costs = [line.get_xdata()[0] for line in fig.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(costs, [row.private["semi2k"].bytes / 1e6 for row in rows])
    assert [text.get_text().split("  ")[1] for text in fig.axes[-1].texts] == names
    fig.draw_without_rendering()
    for ax in fig.axes[:-1]:  # numbers beside marks that are close to each other
        boxes = [text.get_window_extent().shrunk(0.9, 0.7) for text in ax.texts]
        assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))
    for text in (text for ax in fig.axes for text in ax.texts):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y0 >= 0 and box.y1 <= fig.bbox.y1
    assert frontier([dataclasses.replace(rows[0], private={})], "semi2k") is None
