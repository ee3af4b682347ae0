"""A report shows what was logged, number for number, on any shape of run, and nothing in it overlaps or hides."""

import base64
import io
import itertools
import json
import math
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from rich.console import Console

from jax_entropy import report
from jax_entropy.errors import UserError
from jax_entropy.report import drawing, figures
from jax_entropy.report.comparison import comparison

CONTEXT = 128
CAUSAL = math.lgamma(CONTEXT + 1) / CONTEXT


def bands(entropy_LxN, maximum):
    """Quarters one by one, half-open but for the last (paper.md §4): the definition that the report must agree with."""
    quarter = maximum / 4
    inside = [(entropy_LxN >= i * quarter) & (entropy_LxN < (i + 1) * quarter) for i in range(3)]
    return [float(np.mean(x)) for x in (*inside, entropy_LxN >= 3 * quarter)]


def as_json(tree):
    """What the metrics writer makes of arrays: lists, with null for what is not finite."""
    if isinstance(tree, dict):
        return {name: as_json(value) for name, value in tree.items()}
    if isinstance(tree, (list, np.ndarray)):
        return [as_json(value) for value in tree]
    return None if tree is None or not math.isfinite(tree) else float(tree)


def write_run(workdir, *, L=12, N=12, steps=40, ereg=True, nan_from=None, architecture="EReg(SM(t)+ScFuFFN)", seed=0):
    """Writes a workdir like that of a real run, logged `steps` times; from the `nan_from`-th on it diverges upwards."""
    rng = np.random.default_rng(seed)
    depth_L = np.linspace(0, 1, L)
    final_LxN = CAUSAL * np.clip(0.7 - 0.5 * depth_L[:, None] + 0.1 * rng.standard_normal((L, N)), 0.01, 1)
    theta_LxN = np.clip(0.4 + 0.07 * rng.standard_normal((L, N)), 0.1, 0.9)
    lines = []
    for i in range(steps):
        done = (i + 1) / steps
        learned = 1 - math.exp(-6 * done)
        entropy_LxN = CAUSAL * 0.98 * (1 - learned) + final_LxN * learned
        cross_entropy = 1.2 + 7 * math.exp(-9 * done) + 0.03 * rng.standard_normal()
        max_logit_L = 2 + 40 * learned * (0.3 + depth_L)
        lost = 0 if nan_from is None else max(0, min(L, i - nan_from + 1))
        nan_count_L = np.where(np.arange(L) >= L - lost, 1000 * N, 0)
        if lost:
            entropy_LxN[L - lost :] = max_logit_L[L - lost :] = cross_entropy = np.nan
        known = entropy_LxN[np.isfinite(entropy_LxN)]
        norms = dict(embedding=0.5, attention=0.8, feed_forward=0.3, norm=0.05, scale=0.02)
        line = dict(
            step=50 * (i + 1),
            loss=cross_entropy + 0.01,
            cross_entropy=cross_entropy,
            penalty=900 * (1.1 - learned) if ereg else 0.0,
            tokens_per_second=20000.0 + i,
            gradient_norm=1.1 * (1.1 - done),
            gradient_norms={name: value * (1.1 - done) for name, value in norms.items()},
            head_entropy=entropy_LxN,
            layer_entropy=entropy_LxN.mean(axis=1),
            bands_observed=bands(entropy_LxN, known.max(initial=0)),
            bands_context=bands(entropy_LxN, math.log(CONTEXT)),
            bands_causal=bands(entropy_LxN, CAUSAL),
            threshold=0.5 + (theta_LxN - 0.5) * learned if ereg else None,
            temperature={
                name: x * (1 + 9 * learned * (1 + depth_L))
                for name, x in zip(("mean", "min", "max"), (1, 0.3, 4), strict=True)
            }
            if ereg
            else None,
            max_logit=max_logit_L,
            nan_count=nan_count_L,
            inf_count=np.zeros(L),
        )
        lines.append(as_json(line) | dict(kind="train", step=line["step"]))
        if (i + 1) % 5 == 0 or i + 1 == steps:
            validation = dict(validation_loss=cross_entropy + 0.05, bits_per_byte=0.6, head_entropy=entropy_LxN)
            lines.append(as_json(validation) | dict(kind="evaluate", step=line["step"]))
    config = dict(
        architecture=architecture,
        model=dict(num_layers=L, num_heads=N, model_dim=64 * N, context_length=CONTEXT),
        data=dict(source="stdlib", files=""),
    )
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


CASES = dict(
    paper=dict(),
    deep=dict(L=18, N=12),
    very_deep=dict(L=48, N=25),
    smallest=dict(L=1, N=1, steps=1, ereg=False, architecture="SM"),
    single_step=dict(L=6, N=2, steps=1),
    two_steps=dict(L=4, N=4, steps=2),
    plain=dict(L=4, N=4, ereg=False, architecture="SM+LN+G"),
    diverged=dict(L=6, N=8, ereg=False, architecture="SM", nan_from=30),
    never_finite=dict(L=3, N=2, nan_from=-9, architecture="SM"),
)


@pytest.fixture(params=CASES)
def run(request, tmp_path):
    return report.load_run(write_run(tmp_path / request.param, **CASES[request.param]))


@pytest.fixture
def paper(tmp_path):
    return report.load_run(write_run(tmp_path / "paper"))


def texts_of(fig):
    return [text for text in fig.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text().strip()]


def words_of(fig):
    fig.draw_without_rendering()
    return "\n".join(text.get_text() for text in texts_of(fig))


def titled_axes(fig, start):
    return next(ax for ax in fig.axes if ax.get_title(loc="left").startswith(start))


def line_to(ax, values):
    return any(np.array_equal(line.get_ydata(), values, equal_nan=True) for line in ax.lines)


# Reading a workdir


def test_arrays_are_what_was_logged(tmp_path):
    workdir = write_run(tmp_path / "run", L=3, N=2, steps=7, nan_from=5)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    run = report.load_run(workdir)
    assert run.train["head_entropy"].shape == (7, 3, 2)
    assert run.train["head_entropy"].tolist()[:5] == [line["head_entropy"] for line in train[:5]]
    assert np.isnan(run.train["head_entropy"][5, 2]).all() and np.isnan(run.train["cross_entropy"][5])
    assert run.train["gradient_norms/feed_forward"].tolist() == [
        line["gradient_norms"]["feed_forward"] for line in train
    ]
    assert run.train["temperature/max"].shape == (7, 3)
    assert run.steps_E.tolist() == [50, 100, 150, 200, 250, 300, 350]
    assert run.evaluate["step"].tolist() == [250, 350]
    assert run.maxima()["context"] == pytest.approx(4.852, abs=1e-3)
    assert run.maxima()["causal"] == pytest.approx(3.878, abs=1e-3)  # paper.md §4
    assert run.maxima()["observed"] == np.nanmax(run.train["head_entropy"][-1])


def test_a_metric_that_starts_late_is_nan_before(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines[0]["threshold"] = None
    del lines[1]["max_logit"]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = report.load_run(workdir)
    assert run.train["threshold"].shape == (3, 2, 2)
    assert np.isnan(run.train["threshold"][0]).all() and np.isfinite(run.train["threshold"][1:]).all()
    assert np.isnan(run.train["max_logit"][1]).all() and np.isfinite(run.train["max_logit"][[0, 2]]).all()


def test_half_a_last_line_is_a_run_still_writing(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 200, "kind": "tr')
    assert report.load_run(workdir).steps_E.tolist() == [50, 100, 150]


def drop_config(workdir):
    (workdir / "config.json").unlink()


def damage_config(workdir):
    (workdir / "config.json").write_bytes(b"\xff\xfe{")


def drop_metrics(workdir):
    (workdir / "metrics.jsonl").unlink()


def empty_metrics(workdir):
    (workdir / "metrics.jsonl").write_text("")


def only_evaluations(workdir):
    (workdir / "metrics.jsonl").write_text('{"step": 5, "kind": "evaluate", "validation_loss": 3.0}\n')


def damage_second_line(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text("\n".join([lines[0], "[1, 2]", *lines[1:]]))


@pytest.mark.parametrize(
    "damage, words",
    [
        (drop_config, "has no config.json"),
        (damage_config, "config.json' is damaged"),
        (drop_metrics, "no training line in metrics.jsonl yet"),
        (empty_metrics, "no training line in metrics.jsonl yet"),
        (only_evaluations, "no training line in metrics.jsonl yet"),
        (damage_second_line, "damaged at line 2"),
    ],
)
def test_what_is_not_a_run_is_told_in_one_sentence(tmp_path, damage, words):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    damage(workdir)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        report.write_report(workdir)
    assert str(workdir) in str(error.value) and "\n" not in str(error.value)
    assert not (workdir / "figures").exists()


def test_missing_workdir_and_unwritable_one(tmp_path):
    with pytest.raises(UserError, match="'/no/such/run' is not there"):
        report.write_report("/no/such/run")
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    (workdir / "figures").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write .*figures"):
        report.write_report(workdir)


# Figures


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
    deep = report.load_run(write_run(tmp_path / "deep", L=18, N=12))
    assert not any(ax.texts for ax in figures.head_entropy(deep).axes)
    diverged = report.load_run(write_run(tmp_path / "diverged", L=3, N=4, nan_from=38))
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
    fig = figures.loss(report.load_run(workdir))
    assert len(fig.axes) == 2 and len(fig.axes[0].lines) == 1
    assert "validation" not in words_of(fig) and "penalty" not in words_of(fig)


def test_loss_says_where_it_was_lost(tmp_path):
    run = report.load_run(write_run(tmp_path / "run", L=2, N=2, nan_from=30))
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
    workdir = write_run(tmp_path / "run", L=2, N=2, ereg=False, architecture="SM")
    run = report.load_run(workdir)
    assert figures.thresholds(run) is None and figures.temperature(run) is None
    names = {path.name for path in report.write_report(workdir, notify=lambda _: None)}
    assert not names & {"thresholds.png", "temperature.png"} and {"loss.png", "stability.png"} <= names


def test_stability_counts_only_where_there_are_any(tmp_path, paper):
    fig = figures.stability(paper)
    assert line_to(fig.axes[0], paper.train["gradient_norm"])
    assert line_to(fig.axes[0], paper.train["gradient_norms/attention"])
    for layer in range(12):
        assert line_to(fig.axes[1], paper.train["max_logit"][:, layer])
    assert len(fig.axes) == 2 and "NaN and Inf: none in any layer (logged steps: 40)" in words_of(fig)

    diverged = report.load_run(write_run(tmp_path / "diverged", L=3, N=4, nan_from=37))
    fig = figures.stability(diverged)
    (mesh,) = titled_axes(fig, "NaN").collections
    count_LxE = mesh.get_array().reshape(3, 40)
    np.testing.assert_array_equal(count_LxE.filled(0), diverged.train["nan_count"].T)
    assert count_LxE.count() == 1 + 2 + 3
    words = words_of(fig)
    assert "Inf: none in any layer" in words and "NaN and Inf" not in words and "count" in words


def test_comparison_shows_shares_and_losses_of_each_run(tmp_path):
    kinds = dict(a=dict(architecture="SM", ereg=False), b=dict(), c=dict(seed=1))
    runs = [report.load_run(write_run(tmp_path / name, L=4, N=4, **kind)) for name, kind in kinds.items()]
    fig = comparison(runs)
    bars_ax, loss_ax = fig.axes
    widths = np.array([[bar.get_width() for bar in bars] for bars in bars_ax.containers]).T
    np.testing.assert_allclose(widths, [run.train["bands_observed"][-1] for run in runs], atol=1e-12)
    names = [label.get_text().splitlines()[0] for label in bars_ax.get_yticklabels()]
    assert names == ["SM", "EReg(SM(t)+ScFuFFN) (b)", "EReg(SM(t)+ScFuFFN) (c)"]
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
    _, loss_ax = comparison([report.load_run(workdir) for workdir in workdirs]).axes
    assert loss_ax.get_ylabel() == "training loss [nats/token]"
    out = report.write_comparison(workdirs, tmp_path / "new" / "comparison.png")
    assert out == tmp_path / "new" / "comparison.png" and imread(out).shape[2] in (3, 4)
    with pytest.raises(UserError, match="at least one"):
        report.write_comparison([], tmp_path / "none.png")


# What every figure owes its reader


def test_no_text_is_cut_or_overlaps_another(run, monkeypatch):
    drawn = []
    draw_text = matplotlib.text.Text.draw
    monkeypatch.setattr(
        matplotlib.text.Text, "draw", lambda text, renderer: (drawn.append(text), draw_text(text, renderer))
    )
    for fig in (*(draw(run) for draw in figures.FIGURES), comparison([run, run])):
        if fig is None:
            continue
        drawn.clear()
        FigureCanvasAgg(fig).draw()
        shown = [text for text in drawn if text.get_visible() and text.get_text().strip()]
        extent = matplotlib.text.Text.get_window_extent  # of an annotation: without its line
        boxes = [(text.get_text(), extent(text).padded(-1)) for text in shown]
        page = fig.bbox
        for text, box in boxes:
            inside = box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1
            assert inside, f"{text!r} is cut"
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), f"{one!r} overlaps {other!r}"


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
    for draw in figures.FIGURES:
        draw(paper)
    assert dict(matplotlib.rcParams) == before
    command = "import sys, jax_entropy.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0


# The report as files


@pytest.mark.parametrize("run", ["paper", "smallest", "single_step", "diverged", "never_finite"], indirect=True)
def test_report_of_any_run_is_whole(run):
    said = []
    paths = report.write_report(run.workdir, notify=said.append)
    assert len(said) == 1 and str(run.workdir) in said[0]
    *pictures, page = paths
    assert page == run.workdir / "report.html" and {path.parent for path in pictures} == {run.workdir / "figures"}
    assert sorted(path.name for path in pictures) == sorted(path.name for path in (run.workdir / "figures").iterdir())
    text = page.read_text()
    for path in pictures:
        png = path.read_bytes()
        pixels = imread(path)
        assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) < 600_000
        assert 800 <= pixels.shape[1] <= 1600 and 350 <= pixels.shape[0] <= 1600
        assert 0.002 < np.mean(pixels[..., :3].min(axis=2) < 0.9) < 0.9  # neither blank nor black
        assert base64.b64encode(png).decode() in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_page_escapes_and_tells_the_key_numbers(tmp_path):
    workdir = write_run(tmp_path / "run", L=4, N=4, architecture="<b>SM & co</b>")
    run = report.load_run(workdir)
    text = report.write_report(workdir, notify=lambda _: None)[-1].read_text()
    assert "<b>SM" not in text and "<h1>&lt;b&gt;SM &amp; co&lt;/b&gt;</h1>" in text
    assert f"<dt>validation perplexity</dt><dd>{math.exp(run.evaluate['validation_loss'][-1]):.4g}</dd>" in text
    assert f"<dd>{run.train['head_entropy'][-1].mean():.2f} <small>nats" in text
    assert f"<dd>{np.median(run.train['tokens_per_second']):,.0f} <small>tokens/s" in text
    assert "4 layers · 4 heads · 256 wide · 128 tokens of context · step 2,000" in text


# The terminal


def printed(entropy_LxN, width, **kwargs):
    file = io.StringIO()
    report.print_head_entropy(entropy_LxN, CAUSAL, Console(file=file, width=width, **kwargs))
    return file.getvalue()


def test_terminal_prints_every_head_and_the_layer_means(paper):
    entropy_LxN = paper.train["head_entropy"][-1]
    rows = [line.split() for line in printed(entropy_LxN, 80).splitlines()]
    head_row = next(i for i, row in enumerate(rows) if row and row[0] == "layer")
    assert rows[head_row] == ["layer", *map(str, range(12)), "mean"]
    for layer, row in enumerate(rows[head_row + 1 : head_row + 13]):
        assert row == [str(layer), *(f"{x:.2f}" for x in entropy_LxN[layer]), f"{entropy_LxN[layer].mean():.2f}"]
    assert "nats" in printed(entropy_LxN, 80) and "3.88" in printed(entropy_LxN, 80)
    assert "\x1b[" in printed(entropy_LxN, 80, force_terminal=True, color_system="truecolor")


def test_terminal_quarters_are_half_open_but_for_the_last():
    entropy_LxN = np.array([[0.0, 0.99, 1.0, 1.99], [2.0, 2.5, 3.0, 4.0]])
    assert "largest (4.00 nats): 25.0 / 25.0 / 25.0 / 25.0 %" in printed(entropy_LxN, 80)
    heat_map = np.repeat([0.1, 1.0, 2.0, 3.2], [47, 14, 18, 65]).reshape(12, 12)  # the shares of SM, paper.md §4
    assert "32.6 / 9.7 / 12.5 / 45.1 %" in printed(heat_map, 80)


@pytest.mark.parametrize("width, cell", [(80, "2.00"), (61, "2.0"), (40, "▓▓"), (26, "▓")])
def test_terminal_says_less_where_there_is_less_room(width, cell):
    lines = printed(np.full((2, 12), 2.0), width).splitlines()
    row = next(line for line in lines if line.startswith("    0 "))
    shown = row.removeprefix("    0 ").rsplit(maxsplit=1)
    assert shown[1] == "2.00" and len(row) <= width
    assert shown[0].replace(" ", "") == 12 * cell


def test_terminal_shows_what_is_not_a_number():
    entropy_LxN = np.array([[1.0, np.nan], [np.nan, np.nan]])
    text = printed(entropy_LxN, 80)
    assert text.count("NaN") == 3 + 2  # three heads, two means
    assert "largest (1.00 nats): 0.0 / 0.0 / 0.0 / 25.0 %" in text
    assert "quarter" not in printed(np.full((2, 2), np.nan), 80)
