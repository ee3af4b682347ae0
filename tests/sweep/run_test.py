"""A sweep trains what is not done, chooses rates by its rule, goes on after signals, and reports what failed."""

import csv
import json
import signal
import subprocess
import sys

import pytest

import jax_entropy as je
from jax_entropy.commands.main import main
from jax_entropy.errors import UserError
from jax_entropy.sweep import Published, Sweep, Tuning, product
from jax_entropy.sweep.frontier import frontier
from tests import REPOSITORY
from tests.sweep.helpers import stub

NAMES = ["SM+LN+G", "SM+G", "SM"]


def three(**changes):
    given = dict(points=product({"architecture": NAMES}), seeds=(1, 2), baselines=["SM+LN+G"], tuning=Tuning(seed=7))
    return Sweep(**given | changes)


def test_the_rate_is_that_of_the_lowest_loss_on_a_seed_that_is_not_reported(tmp_path, monkeypatch):
    trained = stub(monkeypatch, tmp_path, {"SM": "diverged"})
    rows = je.sweep(three(), tmp_path / "sweep", notify=str)
    assert sorted(trained()[:9]) == sorted(f"{n}-rate{r}-seed7" for n in NAMES for r in (0.001, 0.003, 0.01))
    expected = [f"{name}-rate{0.001 if name == 'SM' else 0.003}-seed{seed}" for seed in (1, 2) for name in NAMES]
    assert trained()[9:] == expected  # SM diverged at each of them: the lowest
    baseline, _, diverged = rows
    assert baseline.tuning == {"0.001": pytest.approx(52.1 / 3), "0.003": 10.7, "0.01": pytest.approx(102.1 / 3)}
    assert baseline.perplexities == {"1": 10.1, "2": 10.2} and baseline.spread == pytest.approx(0.1 / 2**0.5)
    assert baseline.bands == [0.25, 0, 0.25, 0.5] and baseline.layer_entropy == [3.5, 1.25]
    assert baseline.nan_count == 4 and baseline.seconds == 7 and baseline.tokens == 560 * 32 * 128
    assert (diverged.perplexity, diverged.diverged, diverged.diagnosis, diverged.ratios) == (None, 2, "diverged", {})
    table = (tmp_path / "sweep/table.md").read_text()
    assert "| `SM+G` | 0.003 |" in table and "| `SM` | 0.001, the lowest |" in table

    assert je.sweep(three(), tmp_path / "sweep", notify=str) == rows
    assert len(trained()) == 15  # what is complete or diverged is not run again
    je.sweep(three(seeds=(1, 2, 3)), tmp_path / "sweep", notify=str)
    assert trained()[15:] == [f"{name}-rate{0.001 if name == 'SM' else 0.003}-seed3" for name in NAMES]


def test_the_shorter_trials_of_a_rate_are_as_long_as_the_rule_says(tmp_path, monkeypatch):
    trained = stub(monkeypatch, tmp_path, {})
    points = [{"architecture": "SM"}, {"architecture": "SM", "optimizer.learning_rate": 0.02}]
    je.sweep(Sweep(points=points, seeds=(1,), tuning=Tuning((0.1,), share=0.25)), tmp_path / "sweep", notify=str)
    assert trained() == ["SM-rate0.1-seed0", "SM-rate0.1-seed1", "SM_learning_rate=0.02-rate0.02-seed1"]
    config = json.loads((tmp_path / "sweep/tuning/SM-rate0.1-seed0/config.json").read_text())
    assert config["train"]["num_steps"] == 140


def test_of_rates_that_end_within_a_hundredth_the_lowest_is_taken(tmp_path, monkeypatch):
    trained = stub(monkeypatch, tmp_path, {})  # 10.3, 10.1 and 10 at these rates
    tuning = Tuning((2.91e-3, 2.97e-3, 3e-3))
    (row,) = je.sweep(Sweep(points=[{"architecture": "SM"}], seeds=(1,), tuning=tuning), tmp_path / "sweep", notify=str)
    assert [*row.tuning] == ["0.00291", "0.00297", "0.003"]
    assert trained()[3:] == ["SM-rate0.00297-seed1"]


def test_a_signal_stops_all_runs_and_the_same_sweep_goes_on(tmp_path, monkeypatch):
    told = []
    trained = stub(monkeypatch, tmp_path, {"SM+G": "interrupts"})
    rows = je.sweep(three(tuning=None), tmp_path / "sweep", notify=told.append)
    assert trained() == ["SM+LN+G-rate0.003-seed1", "SM+G-rate0.003-seed1"] and told[-1].endswith("seed 1: stopped")
    assert [row.unfinished for row in rows] == [1, 2, 2] and rows[0].ended == [10.1]
    trained = stub(monkeypatch, tmp_path, {})
    rows = je.sweep(three(tuning=None), tmp_path / "sweep", jobs=2, notify=str)
    assert len(trained()) == 2 + 5 and [row.unfinished for row in rows] == [0, 0, 0]


def test_a_process_ends_when_its_sweep_does():
    waits = "import threading, time; from jax_entropy.sweep import process; threading.Thread(target="
    waits += "process._end_with_sweep, daemon=True).start(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", waits], cwd=REPOSITORY, stdin=subprocess.PIPE) as process:
        process.stdin.close()  # as when the sweep is killed
        assert process.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize("fate", ["failed", "killed"])
def test_a_run_that_fails_keeps_no_other_from_running_and_is_tried_again(fate, tmp_path, monkeypatch):
    trained = stub(monkeypatch, tmp_path, {"SM+G": fate})
    with pytest.raises(UserError, match=r"2 of 6 runs failed, the first SM\+G, rate 0.003, seed 1 in .*train.log"):
        je.sweep(three(tuning=None), tmp_path / "sweep", notify=str)
    assert len(trained()) == 6
    rows = json.loads((tmp_path / "sweep/table.json").read_text())["rows"]
    assert [row["unfinished"] for row in rows] == [0, 2, 0]
    trained = stub(monkeypatch, tmp_path, {})
    je.sweep(three(tuning=None, fields={"train.log_every": 7}), tmp_path / "sweep", notify=str)
    assert len(trained()) == 8
    for name, every in (("SM", 20), ("SM+G", 7)):  # what is done keeps what it was done with
        config = json.loads((tmp_path / f"sweep/runs/{name}-rate0.003-seed1/config.json").read_text())
        assert config["train"]["log_every"] == every


@pytest.mark.parametrize("fate", ["refused", "refused at once"])
def test_a_run_that_is_refused_stops_the_sweep_before_others_are(tmp_path, monkeypatch, fate):
    trained = stub(monkeypatch, tmp_path, {"SM+G": fate})
    with pytest.raises(
        UserError, match=rf"^SM\+G, rate 0.003, seed 1 cannot be trained: {fate}; what is done is kept$"
    ):
        je.sweep(three(tuning=None), tmp_path / "sweep", notify=str)
    assert len(trained()) == 2


def test_a_folder_keeps_to_its_sweep_and_its_text(tmp_path, monkeypatch):
    trained = stub(monkeypatch, tmp_path, {})
    je.sweep(three(tuning=None), tmp_path / "sweep", notify=str)
    with pytest.raises(UserError, match="train.num_steps is 560 there and 7 here; choose another workdir"):
        je.sweep(three(tuning=None, fields={"train.num_steps": 7}), tmp_path / "sweep", notify=str)
    (tmp_path / "sweep/corpora.json").write_text('{"SM": "another"}')
    with pytest.raises(UserError, match="the text of SM has changed since the sweep in .* began"):
        je.sweep(three(tuning=None), tmp_path / "sweep", notify=str)
    (tmp_path / "sweep/corpora.json").unlink()
    (tmp_path / "sweep/runs/SM-rate0.003-seed1/metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="lacks the last evaluation of a complete run"):
        je.sweep(three(tuning=None), tmp_path / "sweep", notify=str)
    assert len(trained()) == 6


def test_every_number_is_in_each_of_the_tables(tmp_path, monkeypatch):
    stub(monkeypatch, tmp_path, {"SM+G": "diverged"}, draw=frontier)
    paper = {"SM+LN+G": Published(2.69, 25.32, 8.21), "SM": Published(3.48)}
    rows = je.sweep(three(tuning=None, published=paper, title="A title"), tmp_path / "sweep", notify=str)
    text = (tmp_path / "sweep/table.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| `SM` |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["`SM`", "0.003", "10.15 ± 0.07 (2)"] and cells[3].startswith("1.000 [0.9")
    assert cells[4:9] == ["1.294", "25 / 0 / 25 / 50", "3.50 1.25", "4", "0"]
    assert text.startswith("# A title") and "- `SM+G` diverged: diverged" in text and "–, 2 diverged" in text
    table = list(csv.DictReader((tmp_path / "sweep/table.csv").open()))
    assert [row["label"] for row in table] == NAMES
    assert float(table[2]["private.semi2k.bytes"]) == rows[2].private["semi2k"].bytes
    stored = json.loads((tmp_path / "sweep/table.json").read_text())
    assert stored["rows"][2]["ratios"]["SM+LN+G"]["value"] == 1 and stored["seeds"] == "1, 2"
    assert "scale" not in stored  # which says something of a file only
    assert {path.name for path in (tmp_path / "sweep/pictures").iterdir()} == {
        f"frontier-{protocol}.png" for protocol in ("semi2k", "aby3", "cheetah")
    }


FILE = """from jax_entropy.sweep import Sweep
def get_sweep(scale):
    return Sweep(points=[{"architecture": "SM"}], seeds=(1,), config="TINY", pictures=["comparison", "loss"],
        fields={"train.num_steps": 4, "train.evaluate_chunks": 2, "model.num_layers": 1})
"""


def test_a_real_run_of_a_sweep_is_a_workdir_like_any_other(tmp_path, corpus_directory, capsys):
    (tmp_path / "one.py").write_text(FILE.replace("TINY", f"{REPOSITORY}/tests/tiny_config.py"))
    command = [
        "sweep",
        f"{tmp_path}/one.py",
        f"--workdir={tmp_path}/sweep",
        f"--config.data.directory={corpus_directory}",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "[1/1] SM, rate 0.003, seed 1: perplexity" in said and "table.md" in said and "stopped" not in said
    assert said.count("s on wan") == 3  # headings are whole, one for each protocol
    run = tmp_path / "sweep/runs/SM-rate0.003-seed1"
    assert main(["status", str(run)]) == 0 and "complete at step 4 of 4" in capsys.readouterr().out
    assert je.load_run(run).step == 4
    assert {"comparison.png", f"loss-{run.name}.png"} < {p.name for p in (tmp_path / "sweep/pictures").iterdir()}
