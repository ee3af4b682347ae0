"""A report reads any run, tells what is wrong with a workdir, and writes and prints what was logged."""

import io
import json
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from jax_entropy.errors import UserError
from jax_entropy.report import print_head_entropy, read_history, report
from jax_entropy.report.history import History
from jax_entropy.report.page import page
from jax_entropy.report.private import of_history
from jax_entropy.report.verdict import verdict
from jax_entropy.runs.workdir import Workdir
from tests.report.helpers import CASES, CAUSAL, write_run

# Reading a workdir


def test_arrays_are_what_was_logged(tmp_path):
    workdir = write_run(tmp_path / "run", L=3, N=2, steps=7, nan_from=5)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    run = read_history(workdir)
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


def test_a_layer_with_a_window_is_judged_by_what_it_sees(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=1, steps=3)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    seen = dict(maximum_context=[0.2, 4.8], maximum_causal=[0.1, 3.8], head_entropy=[[0.09], [0.09]])
    lines = [line | seen for line in lines if line["kind"] == "train"]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = read_history(workdir)
    assert run.maxima() == dict(observed=0.09, context=4.8, causal=3.8)
    said = " ".join(verdict(run).seen)
    assert (
        "1 of 2 heads is overloaded (above ¾ of the causal maximum, 0.08 to 2.85 nats by layer, on a training" in said
    )
    assert "1 of 2 heads is collapsed" in said and said.index("layer 0.") < said.index("layer 1.")


def test_a_metric_that_starts_late_is_nan_before(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines[0]["threshold"] = None
    del lines[1]["max_logit"]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = read_history(workdir)
    assert run.train["threshold"].shape == (3, 2, 2)
    assert np.isnan(run.train["threshold"][0]).all() and np.isfinite(run.train["threshold"][1:]).all()
    assert np.isnan(run.train["max_logit"][1]).all() and np.isfinite(run.train["max_logit"][[0, 2]]).all()


def test_half_a_last_line_is_a_run_still_writing(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 200, "kind": "tr')
    assert read_history(workdir).steps_E.tolist() == [50, 100, 150]


def drop_config(workdir):
    (workdir / "config.json").unlink()


def damage_config(workdir):
    (workdir / "config.json").write_bytes(b"\xff\xfe{")


def drop_metrics(workdir):
    (workdir / "metrics.jsonl").unlink()


def empty_metrics(workdir):
    (workdir / "metrics.jsonl").write_text("")


def unreadable_metrics(workdir):
    drop_metrics(workdir)
    (workdir / "metrics.jsonl").mkdir()


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
        (unreadable_metrics, "cannot be read: Is a directory"),
        (empty_metrics, "no training line in metrics.jsonl yet"),
        (only_evaluations, "no training line in metrics.jsonl yet"),
        (damage_second_line, "damaged at line 2"),
    ],
)
def test_what_is_not_a_run_is_told_in_one_sentence(tmp_path, damage, words):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    damage(workdir)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        report(workdir)
    assert str(workdir) in str(error.value) and "\n" not in str(error.value)
    assert not (workdir / "figures").exists()


def test_missing_workdir_and_unwritable_one(tmp_path):
    with pytest.raises(UserError, match="'/no/such/run' is not there"):
        report("/no/such/run")
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    (workdir / "figures").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="figures.* cannot be written"):
        report(workdir)


# The report as files


def test_what_was_measured_privately_is_on_the_page(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    measured = dict(
        setting=dict(protocol="semi2k"), num_tokens=32, total=dict(warm=dict(bytes=[1e6, 2.5e6], rounds=798))
    )
    (workdir / "private.json").write_text(json.dumps(measured))
    history = read_history(workdir)
    assert "2.5 <small>MB, 798 rounds, 32 tokens, semi2k</small>" in page([history])
    assert of_history(history) is None  # of an earlier version, without what the picture shows
    costs = {"softmax": dict(bytes=2e6, rounds=700, seconds=28.4), "projections": dict(bytes=5e5, rounds=98, seconds=4)}
    measured |= dict(costs=costs, network="wan", architecture="SM", export="optimised")
    measured["setting"]["fraction_bits"] = 18
    (workdir / "private.json").write_text(json.dumps(measured))
    assert of_history(read_history(workdir)).get_axes()
    (workdir / "private.json").write_text("{}")
    with pytest.raises(UserError, match="private.json' is damaged"):
        read_history(workdir)


@pytest.mark.parametrize("case", ["paper", "smallest", "single_step", "diverged", "never_finite"])
def test_report_of_any_run_is_whole(tmp_path, case):
    workdir = write_run(tmp_path / case, **CASES[case])
    written = report(workdir)
    text = written.pop("page").read_text()
    pictures = list(written.values())
    assert [path.stem for path in pictures] == list(written)
    assert {path.parent for path in pictures} == {workdir / "figures"}
    assert ("thresholds" in written) == ("temperature" in written) == CASES[case].get("ereg", True)
    assert sorted(path.name for path in pictures) == sorted(path.name for path in (workdir / "figures").iterdir())
    for path in pictures:
        png = path.read_bytes()
        pixels = imread(path)
        assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) < 600_000
        assert 800 <= pixels.shape[1] <= 1600 and 350 <= pixels.shape[0] <= 1600
        assert 0.002 < np.mean(pixels[..., :3].min(axis=2) < 0.9) < 0.9  # neither blank nor black
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert ("speed, median" in text) == (CASES[case].get("steps", 2) > 1)  # of the first step none is logged


def test_page_tells_the_key_numbers_of_held_out_text_and_of_a_batch_apart(tmp_path):
    workdir = write_run(tmp_path / "run", L=4, N=4)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["head_entropy"] = [[0.1, 1.0, 2.0, 3.0]] * 4  # held out
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    history = read_history(workdir)
    text = page([history])
    assert f"<dt>validation perplexity</dt><dd>{math.exp(history.evaluate['validation_loss'][-1]):.4g}</dd>" in text
    assert f"<dd>{np.nanmedian(history.train['tokens_per_second']):,.0f} <small>tokens/s" in text
    assert "4 layers · 4 heads · 256 wide · 128 tokens of context" in text
    batch = history.train["bands_observed"][-1]
    for name, quarter in (("bottom", 0), ("top", 3)):
        assert f"<dt>in the {name} quarter, held out</dt><dd>25.0 <small>" in text
        assert f"<dt>in the {name} quarter, training batch</dt><dd>{100 * batch[quarter]:.1f} <small>" in text
    assert "<dt>mean head entropy, held out</dt><dd>1.52 <small>nats, 31 % of log T" in text
    assert f"mean head entropy, training batch</dt><dd>{history.train['head_entropy'][-1].mean():.2f} <small>" in text


def test_page_says_which_run_it_is_and_what_the_guard_did(tmp_path, monkeypatch):
    workdir = write_run(tmp_path / "first", L=2, N=2, steps=3, incidents=(120,))
    status = Workdir(workdir)
    for now, state, reason in ((0, "starting", ""), (8000, "training", ""), (8065, "failed", "the disk is full")):
        monkeypatch.setattr("time.time", lambda now=now: 1.7e9 + now)
        status.write_status(state, 150, 200, reason, devices="8 × TPU v5e", command=f"train --at={now}")
    text = page([read_history(workdir)])
    assert "<title>EReg(SM(t)+ScFuFFN) · first</title>" in text
    for fact in (str(workdir), "failed at step 150 of 200: the disk is full", "15 November 2023, 00:27 UTC",
                 "2 h 14 min", "8 × TPU v5e", "<span>train</span> <span>--at=0</span></code>",
                 f"jax {jax.__version__}"):  # fmt: skip
        assert f"{fact}</dd>" in text or f"{fact}, " in text, fact
    assert "<b>step 120, back to step 60</b> the loss is not finite at step 120</li>" in text
    assert "The guard sent training back once, at step 120." in text and "■ trouble" in text
    (workdir / "guard.jsonl").unlink()
    (workdir / "status.json").unlink()
    text = page([read_history(workdir)])
    assert "guard sent" not in text and "<dt>state</dt><dd>step 150</dd>" in text


def test_names_are_shown_and_never_obeyed(tmp_path):
    evil = "<script>alert('x')</script> ${config} \ud800"
    workdir = Path(os.fsdecode(os.fsencode(tmp_path) + b"/<script>alert(1)$title\n\xff"))
    write_run(workdir, L=2, N=2, steps=2, architecture=evil, incidents=(70,))
    config = json.loads((workdir / "config.json").read_text())
    config["data"] = dict(source="files", files=f"/data/{evil}")
    config["optimizer"] = {evil: evil}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "guard.jsonl").write_text(json.dumps(dict(step=70, what=evil)))
    (workdir / "private.json").write_text(
        json.dumps(dict(setting=dict(protocol=evil), num_tokens=evil, total=dict(warm=dict(bytes=[1], rounds=2))))
    )
    Workdir(workdir).write_status("failed", 70, 100, evil, devices=evil)
    Workdir(workdir).write_samples(100, evil, [evil])
    written = report(workdir, against=workdir)
    assert written["page"] == workdir / "report.html" and written["comparison"].parent == workdir / "figures"
    text = written["page"].read_text("utf-8")
    assert text.count("<script") == 2 and "alert(1)$title" in text  # the page's block of numbers, and its own
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)") >= 8
    assert text.count("${config}") >= 8  # what stands in a value is not a place of the page's


# The terminal


def printed(entropy_LxN, width, **kwargs):
    file = io.StringIO()
    print_head_entropy(entropy_LxN, CAUSAL, Console(file=file, width=width, **kwargs))
    return file.getvalue()


def test_terminal_prints_every_head_and_the_layer_means():
    entropy_LxN = np.random.default_rng(0).uniform(0, CAUSAL, (12, 12))
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


@pytest.mark.parametrize(
    ("files", "name"), [("/data/code/**/*.py", "code/*.py"), ("**/*.py", "*.py"), ("books", "books"), (None, "files")]
)
def test_a_corpus_is_named_by_what_its_glob_says(tmp_path, files, name):
    history = History(Workdir(tmp_path), {"data": {"source": "files", "files": files}}, {}, {})
    assert history.dataset == name
