"""Real disks that are full or read-only, and a clock that jumps: one sentence, code 2, nothing saved is lost."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_entropy.commands.main import main
from tests import REPOSITORY
from tests.damage import Disk, sentence
from tests.run_helpers import assert_same_run, environment

TINY = f"--config={REPOSITORY}/tests/tiny_config.py"
FIELDS = ("--config.train.num_steps=8", "--config.train.checkpoint_every=4", "--config.train.keep=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a disk that is large enough, and the folder of its corpus."""
    corpora, workdir = tmp_path_factory.mktemp("corpora"), tmp_path_factory.mktemp("run") / "run"
    assert alone("train", TINY, f"--workdir={workdir}", f"--config.data.directory={corpora}", *FIELDS).returncode == 0
    return workdir, corpora


def alone(*arguments):
    """A command in a process of its own: libraries write to stderr past what pytest captures."""
    command = [sys.executable, "-m", "jax_entropy", *map(str, arguments)]
    return subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True)


def test_a_corpus_on_a_full_disk(disk, tmp_path, capfd):
    small = disk(200)
    said = sentence(capfd, "train", TINY, f"--workdir={tmp_path}/run", f"--config.data.directory={small.path}")
    assert "No space left on device; choose another place" in said
    assert not [path for path in small.path.iterdir() if path.suffix != ".lock"]
    small.enlarge(20_000)
    arguments = ["train", TINY, f"--workdir={tmp_path}/run", f"--config.data.directory={small.path}", *FIELDS]
    assert main(arguments) == 0


@pytest.mark.parametrize("make", [Disk.fill, Disk.read_only])
def test_a_workdir_that_cannot_be_written(disk, finished, capfd, make):
    there = disk(100)
    make(there)
    directory = f"--config.data.directory={finished[1]}"
    said = sentence(capfd, "train", TINY, f"--workdir={there.path}/run", directory, *FIELDS)
    assert str(there.path) in said and ("No space left" in said or "Read-only" in said)


def test_a_corpus_on_a_read_only_disk(disk, tmp_path, capfd):
    there = disk(100)
    there.read_only()
    said = sentence(capfd, "train", TINY, f"--workdir={tmp_path}/run", f"--config.data.directory={there.path}")
    assert str(there.path) in said and "not writable" in said


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(disk, finished):
    """The first checkpoint fits and the second does not beside it; with more room the run ends as any other."""
    reference, corpora = finished
    size = sum(path.stat().st_size for path in (reference / "checkpoints").rglob("*")) // 1024
    there = disk(size + size // 2 + 200)
    arguments = ["train", TINY, f"--workdir={there.path}/run", f"--config.data.directory={corpora}", *FIELDS]
    failed = alone(*arguments)
    said = failed.stderr
    assert failed.returncode == 2 and said.count("\n") == 1, said
    assert "step 8 could not be saved" in said and "No space left" in said and "earlier checkpoints are intact" in said
    assert [path.name for path in (there.path / "run/checkpoints").iterdir()] == ["4"]
    there.enlarge(4 * size + 1000)
    assert "resumed at step 4" in alone(*arguments).stdout
    assert_same_run(there.path / "run", reference)


@pytest.mark.parametrize("make", [Disk.fill, Disk.read_only])
def test_a_report_that_cannot_be_written(disk, finished, capfd, make):
    there = disk(20_000)
    workdir = Path(shutil.copytree(finished[0], there.path / "run"))
    before = sorted(path.name for path in workdir.rglob("*"))
    shutil.rmtree(workdir / "figures")
    make(there)
    assert "cannot be written" in sentence(capfd, "report", f"--workdir={workdir}")
    if make is Disk.fill:
        (there.path / "filler").unlink()
        assert main(["report", f"--workdir={workdir}"]) == 0
        assert sorted(path.name for path in workdir.rglob("*")) == before


@pytest.mark.slow
def test_a_clock_that_jumps_backwards(finished, tmp_path, monkeypatch, capfd):
    """A day at every look, while a run is stopped halfway and goes on."""
    directory, reference = f"--config.data.directory={finished[1]}", tmp_path / "reference"
    fields = (directory, *FIELDS, "--config.train.keep=2")
    assert main(["train", TINY, f"--workdir={reference}", *fields]) == 0
    now, looked = time.time(), []

    def jumping() -> float:
        looked.append(1)
        return now - 86_400 * len(looked)

    monkeypatch.setattr(time, "time", jumping)
    arguments = ["train", TINY, f"--workdir={tmp_path}/run", *fields]
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "run/checkpoints/8")
    capfd.readouterr()
    assert main(arguments) == 0
    captured = capfd.readouterr()
    assert "resumed at step 4" in captured.out and "Traceback" not in captured.err
    assert len(looked) > 10
    assert_same_run(tmp_path / "run", reference)
