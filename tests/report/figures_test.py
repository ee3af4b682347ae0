"""Figures show what was logged, number for number, on any shape of run, and nothing in them overlaps or hides."""

import dataclasses
import itertools
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from jax_entropy.errors import UserError
from jax_entropy.report import comparison, drawing, figures, read_history
from tests.report.helpers import CASES, CAUSAL, write_run


@pytest.fixture(params=CASES)
def run(request, tmp_path):
    return read_history(write_run(tmp_path / request.param, **CASES[request.param]))


@pytest.fixture
def paper(tmp_path):
    return read_history(write_run(tmp_path / "paper"))


def texts_of(fig):
    return [text for text in fig.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text().strip()]


def words_of(fig):
    fig.draw_without_rendering()
    return "\n".join(text.get_text() for text in texts_of(fig))


def titled_axes(fig, start):
    return next(ax for ax in fig.axes if ax.get_title(loc="left").startswith(start))


def line_to(ax, values):
    return any(np.array_equal(line.get_ydata(), values, equal_nan=True) for line in ax.lines)


def test_head_entropy_maps_are_the_data(paper):
    fig = figures.head_entropy(paper)
    panels = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title(loc="left") for ax in panels] == ["step 50", "step 1,050", "step 2,000 (last)"]
    for ax, e in zip(panels, (0, 20, 39), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array().data, paper.train["head_entropy"][e])
        assert ax.images[0].get_clim() == pytest.approx((0, CAUSAL))
        assert ax.get_xlabel() == "head" and len(ax.texts) == 144
        shown = {tuple(map(int, text.get_position())): float(text.get_text()) for text in ax.texts}
        for (head, layer), value in shown.items():
            assert value == pytest.approx(paper.train["head_entropy"][e, layer, head], abs=0.051)
    assert panels[0].get_ylabel() == "layer" and panels[0].yaxis_inverted()
    words = words_of(fig)
    assert "head entropy [nats]" in words and "EReg(SM(t)+ScFuFFN)" in words and "Python standard library" in words
    observed = paper.train["head_entropy"][-1].max()
    assert f"Observed maximum {observed:.2f} nats, log T 4.85 nats, causal maximum 3.88 nats" in words
    bars = [[bar.get_width() for bars in ax.containers for bar in bars] for ax in fig.axes if ax.containers]
    for e, widths in zip((0, 20, 39), bars, strict=True):
        np.testing.assert_allclose(widths, paper.train["bands_observed"][e], atol=1e-12)
        assert " · ".join(f"{100 * x:.1f}" for x in paper.train["bands_observed"][e]) + " %" in words


def test_large_maps_are_not_annotated_and_nan_is_hatched(tmp_path):
    deep = read_history(write_run(tmp_path / "deep", L=18, N=12))
    assert not any(ax.texts for ax in figures.head_entropy(deep).axes)
    diverged = read_history(write_run(tmp_path / "diverged", L=3, N=4, nan_from=38))
    fig = figures.head_entropy(diverged)
    last = [ax for ax in fig.axes if ax.images][-1]
    assert last.images[0].get_array().mask.tolist() == np.isnan(diverged.train["head_entropy"][-1]).tolist()
    assert last.patch.get_hatch() and len(last.texts) == 4  # one layer of three is left
    assert "Hatched: not a number" in words_of(fig)


def test_quarter_bars_are_the_logged_shares(paper):
    ax = titled_axes(figures.entropy_bands(paper), "at step 2,000")
    widths = np.array([[bar.get_width() for bar in bars] for bars in ax.containers]).T
    for row, name in zip(widths, ("observed", "context", "causal"), strict=True):
        np.testing.assert_allclose(row, paper.train[f"bands_{name}"][-1], atol=1e-12)
        assert row.sum() == pytest.approx(1)
    labels = [label.get_text().splitlines()[0] for label in ax.get_yticklabels()]
    assert labels == ["observed maximum", "log T", "causal maximum"]
    assert ax.get_xlabel() == "share of heads [%]"
    for text, bar in zip(ax.texts, itertools.chain(*ax.containers), strict=True):
        assert text.get_text() == "" or int(text.get_text()) == pytest.approx(100 * bar.get_width(), abs=0.51)
        assert text.get_color() == drawing.text_color(bar.get_facecolor())


def test_stacked_shares_over_the_steps(paper):
    fig = figures.entropy_bands(paper)
    ax = titled_axes(fig, "over training")
    tops_4xE = np.cumsum(paper.train["bands_observed"], axis=1).T
    for area, top_E in zip(ax.collections, tops_4xE, strict=True):
        vertices = area.get_paths()[0].vertices
        for step, top in zip(paper.steps_E, top_E, strict=True):
            assert vertices[vertices[:, 0] == step, 1].max() == pytest.approx(top, abs=1e-9)
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == ["bottom quarter (collapse)", "second quarter", "third quarter", "top quarter (overload)"]


def test_layer_entropy_lines_and_reference_maxima(paper):
    fig = figures.layer_entropy(paper)
    (ax,) = fig.axes
    for layer in range(12):
        assert line_to(ax, paper.train["layer_entropy"][:, layer])
    assert any(np.allclose(line.get_ydata(), CAUSAL) for line in ax.lines)
    words = words_of(fig)
    assert "log T = 4.85 nats" in words and "causal maximum = 3.88 nats" in words
    assert "mean head entropy [nats]" in words and "training step" in words
    ends = [text.get_text().removeprefix("layer ") for text in ax.texts[2:]]
    assert sorted(ends, key=int) == [str(layer) for layer in range(12)]


def test_loss_curves_and_the_perplexities_beside_them(paper):
    fig = figures.loss(paper)
    ax, penalty_ax, right = fig.axes
    assert line_to(ax, paper.train["cross_entropy"]) and line_to(ax, paper.evaluate["validation_loss"])
    assert line_to(penalty_ax, paper.train["penalty"]) and penalty_ax.get_ylabel() == "penalty [nats²]"
    assert ax.get_ylabel() == "cross-entropy [nats/token]" and right.get_ylabel() == "perplexity"
    assert right.get_ylim() == ax.get_ylim() and len(right.get_yticks()) >= 4
    for height, label in zip(right.get_yticks(), right.get_yticklabels(), strict=True):
        assert math.exp(height) == pytest.approx(float(label.get_text().replace(",", "")), rel=1e-5)
    last = paper.evaluate["validation_loss"][-1]
    assert f"validation, at the end {last:.3f} (perplexity {math.exp(last):.4g})" in words_of(fig)


def test_loss_without_penalty_or_validation(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=2, ereg=False, architecture="SM")
    lines = [line for line in (workdir / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    fig = figures.loss(read_history(workdir))
    assert len(fig.axes) == 2 and len(fig.axes[0].lines) == 1
    assert "validation" not in words_of(fig) and "penalty" not in words_of(fig)


def test_loss_says_where_it_was_lost(tmp_path):
    run = read_history(write_run(tmp_path / "run", L=2, N=2, nan_from=30))
    words = words_of(figures.loss(run))
    assert "NaN at step 1,550" in words and "training, NaN at the end" in words


def test_thresholds_with_mean_and_variance_of_each_layer(paper):
    fig = figures.thresholds(paper)
    theta_LxN = paper.train["threshold"][-1]
    heat = next(ax for ax in fig.axes if ax.images)
    np.testing.assert_array_equal(heat.images[0].get_array().data, theta_LxN)
    mean_ax, variance_ax = titled_axes(fig, "mean"), titled_axes(fig, "variance")
    np.testing.assert_allclose(mean_ax.lines[0].get_xdata(), [np.mean(theta_N) for theta_N in theta_LxN])
    np.testing.assert_allclose(variance_ax.lines[0].get_xdata(), [np.var(theta_N) for theta_N in theta_LxN])
    assert mean_ax.lines[0].get_ydata().tolist() == list(range(12)) and mean_ax.yaxis_inverted()
    assert "θ [fraction of log T]" in words_of(fig)


def test_temperatures_over_steps_and_their_range(paper):
    fig = figures.temperature(paper)
    over_steps, at_end = titled_axes(fig, "mean"), titled_axes(fig, "least")
    for layer in range(12):
        assert line_to(over_steps, paper.train["temperature/mean"][:, layer])
    segments = np.array(at_end.collections[0].get_segments())
    np.testing.assert_array_equal(segments[:, 0, 0], paper.train["temperature/min"][-1])
    np.testing.assert_array_equal(segments[:, 1, 0], paper.train["temperature/max"][-1])


def test_what_a_run_does_not_have_is_not_drawn(tmp_path):
    run = read_history(write_run(tmp_path / "run", L=2, N=2, ereg=False, architecture="SM"))
    assert figures.thresholds(run) is None and figures.temperature(run) is None


def test_stability_counts_only_where_there_are_any(tmp_path, paper):
    fig = figures.stability(paper)
    assert line_to(fig.axes[0], paper.train["gradient_norm"])
    assert line_to(fig.axes[0], paper.train["gradient_norms/attention"])
    for layer in range(12):
        assert line_to(fig.axes[1], paper.train["max_logit"][:, layer])
    assert len(fig.axes) == 2 and "NaN and Inf: none in any layer (logged steps: 40)" in words_of(fig)

    paper.train["max_logit"][:, 3] *= -1e6
    paper.train["max_logit"][:, 5] *= 1e5
    ax = figures.stability(paper).axes[1]
    assert ax.get_yscale() == "symlog"  # a layer that runs away does not flatten the others
    diverged = read_history(write_run(tmp_path / "diverged", L=3, N=4, nan_from=37))
    fig = figures.stability(diverged)
    (mesh,) = titled_axes(fig, "NaN").collections
    count_LxE = mesh.get_array().reshape(3, 40)
    np.testing.assert_array_equal(count_LxE.filled(0), diverged.train["nan_count"].T)
    assert count_LxE.count() == 1 + 2 + 3
    words = words_of(fig)
    assert "Inf: none in any layer" in words and "NaN and Inf" not in words and "count" in words


def test_comparison_shows_shares_and_losses_of_each_run(tmp_path):
    kinds = {"a": dict(architecture="SM", ereg=False), "$b^": dict(), r"c$\x": dict(seed=1)}  # no mathematics
    runs = [read_history(write_run(tmp_path / name, L=4, N=4, **kind)) for name, kind in kinds.items()]
    fig = comparison(runs)
    bars_ax, loss_ax = fig.axes
    widths = np.array([[bar.get_width() for bar in bars] for bars in bars_ax.containers]).T
    np.testing.assert_allclose(widths, [run.train["bands_observed"][-1] for run in runs], atol=1e-12)
    names = ["SM", "EReg(SM(t)+ScFuFFN) ($b^)", r"EReg(SM(t)+ScFuFFN) (c$\x)"]
    labels = [" ".join(label.get_text().splitlines()[:-1]) for label in bars_ax.get_yticklabels()]
    assert labels == names
    assert all(line_to(loss_ax, run.evaluate["validation_loss"]) for run in runs)
    assert loss_ax.get_ylabel() == "validation loss [nats/token]"
    ends = "\n".join(text.get_text() for text in loss_ax.texts)
    assert all(
        f"{name}, {run.evaluate['validation_loss'][-1]:.3f}" in ends for name, run in zip(names, runs, strict=True)
    )


def test_comparison_falls_back_on_training_loss_for_all(tmp_path):
    workdirs = [write_run(tmp_path / name, L=2, N=2) for name in "ab"]
    lines = [line for line in (workdirs[1] / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    (workdirs[1] / "metrics.jsonl").write_text("\n".join(lines))
    _, loss_ax = comparison([read_history(workdir) for workdir in workdirs]).axes
    assert loss_ax.get_ylabel() == "training loss [nats/token]"
    with pytest.raises(UserError, match="at least one"):
        comparison([])


def test_losses_of_different_tokenizers_are_compared_by_the_byte(tmp_path):
    workdirs = [write_run(tmp_path / name, L=2, N=2) for name in "ab"]
    for workdir in workdirs:
        (workdir / "tokenizer.json").write_text("the same")
    (_, ax) = comparison([*map(read_history, workdirs)]).axes
    assert ax.get_ylabel() == "validation loss [nats/token]"

    (workdirs[1] / "tokenizer.json").write_text("another")
    histories = [*map(read_history, workdirs)]
    fig = comparison(histories)
    ax = fig.axes[1]
    assert ax.get_ylabel() == "validation loss [bits/byte]" and "tokenizers differ" in words_of(fig)
    assert all(line_to(ax, history.evaluate["bits_per_byte"]) for history in histories)

    del histories[0].evaluate["bits_per_byte"]
    fig = comparison(histories)
    assert fig.axes[1].get_ylabel() == "training loss [nats/token]"
    assert "nats per token do not compare" in words_of(fig)


def test_steps_from_which_the_guard_sent_training_back_are_marked_wherever_there_are_steps(tmp_path):
    history = read_history(write_run(tmp_path / "run", L=2, N=2, incidents=(430, 2100)))
    shown = {"loss": 2, "layer_entropy": 1, "entropy_bands": 1, "temperature": 1, "stability": 2}
    for item in figures.ITEMS:
        fig = item.draw(history)
        if fig is None:  # not executed privately
            continue
        marks = [[line.get_xdata()[0] for line in ax.lines if line.get_gid() == "incident"] for ax in fig.axes]
        marked = [steps for steps in marks if steps]
        assert marked == [[430, 2100]] * shown.get(item.name, 0), item.name
        assert ("sent training back to an earlier checkpoint (at step 430, 2,100)" in words_of(fig)) == bool(marked)
        for ax, steps in zip(fig.axes, marks, strict=True):
            assert not steps or ax.get_xlim()[1] >= 2100  # after the last step that was logged


# What every figure owes its reader


def test_no_text_is_cut_or_overlaps_another(run, monkeypatch):
    drawn = []
    draw_text = matplotlib.text.Text.draw
    monkeypatch.setattr(
        matplotlib.text.Text, "draw", lambda text, renderer: (drawn.append(text), draw_text(text, renderer))
    )
    name = "EReg(SM(t)+LN+LR(global)+SNorm(QKVO+FFN)+ScFFN+Conv4+RoPE^1)"
    long = dataclasses.replace(run, config=run.config | dict(architecture=name))
    for fig in (*(item.draw(run) for item in figures.ITEMS), comparison([run, long, run])):
        if fig is None:
            continue
        drawn.clear()
        fig.draw_without_rendering()
        shown = [text for text in drawn if text.get_visible() and text.get_text().strip()]
        extent = matplotlib.text.Text.get_window_extent  # of an annotation: without its line
        low_Ix2, high_Ix2 = np.split(np.array([extent(text).padded(-1).extents for text in shown]), 2, axis=1)
        cut_I = ((low_Ix2 < fig.bbox.min) | (high_Ix2 > fig.bbox.max)).any(axis=1)
        assert not cut_I.any(), [text.get_text() for text, cut in zip(shown, cut_I, strict=True) if cut]
        overlap_IxI = ((low_Ix2[:, None] <= high_Ix2) & (low_Ix2 <= high_Ix2[:, None])).all(axis=2)
        pairs = np.argwhere(np.triu(overlap_IxI, 1))
        assert not pairs.size, [(shown[i].get_text(), shown[j].get_text()) for i, j in pairs]


@pytest.mark.parametrize("colors", [drawing.HEAT_MAP, drawing.DEPTH])
def test_colours_keep_their_order_in_grey_print(colors):
    luminances = [drawing.luminance(rgb) for rgb in colors(np.linspace(0, 1, 256))]
    assert np.all(np.diff(luminances) > -1e-3) and luminances[-1] - luminances[0] > 0.6
    quarters = [drawing.luminance(rgb) for rgb in drawing.QUARTERS]
    assert np.all(np.diff(quarters) > 0.1)


def test_numbers_in_cells_contrast_with_their_colour():
    for rgb in drawing.HEAT_MAP(np.linspace(0, 1, 256)):
        ink = drawing.luminance(matplotlib.colors.to_rgb(drawing.text_color(rgb)))
        low, high = sorted((ink, drawing.luminance(rgb)))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA


def test_drawing_leaves_matplotlib_as_it_was(paper):
    before = dict(matplotlib.rcParams)
    for item in figures.ITEMS:
        item.draw(paper)
    assert dict(matplotlib.rcParams) == before
    command = "import sys, jax_entropy.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
