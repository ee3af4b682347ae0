"""The folder of a run while it trains: whose it is, where the run is, and what may change on the way."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_entropy.commands.main import main
from jax_entropy.config import default_config, model_config
from jax_entropy.errors import UserError
from jax_entropy.runs.load import load_run
from jax_entropy.runs.status import describe
from jax_entropy.runs.workdir import Workdir
from tests.damage import flip
from tests.run_helpers import parameters, run, start


def test_a_run_tells_from_outside_where_it_is(unbroken, tmp_path, corpus_directory):
    assert "complete at step 24 of 24" in describe(unbroken[0])
    workdir = tmp_path / "run"
    process = start(workdir, corpus_directory)
    for line in process.stdout:
        if line.startswith("step 8/24"):
            process.send_signal(signal.SIGSTOP)
            break
    assert f"training, step 8 of 24 0 s ago, process {process.pid}" in describe(workdir)
    second = run(workdir, corpus_directory)
    assert second.returncode == 2 and f"in use: process {process.pid}" in second.stderr
    process.kill()
    process.wait()
    assert "died at step 8 of 24" in describe(workdir) and str(process.pid) in describe(workdir)


def test_what_does_not_change_the_mathematics_may_change_on_the_way(tmp_path, corpus_directory, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # without XLA's optimisation a step that is watched rounds differently
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    assert run(reference, corpus_directory).returncode == 0
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / "checkpoints" / "24")
    done = run(workdir, corpus_directory, "--config.train.log_every=3", "--config.train.keep=5")
    assert done.returncode == 0, done.stderr
    assert "going on with train.keep=5 (was 2), train.log_every=3 (was 4)" in done.stdout
    assert "step 21/24" in done.stdout
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(reference))
    assert json.loads((workdir / "config.json").read_text())["train"]["keep"] == 5


def test_the_time_of_a_run_is_that_of_its_processes_and_not_of_what_lies_between(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path)
    for now, state, devices in ((100, "starting", "8 × TPU v5e"), (130, "training", ""), (900, "starting", "2 × cpu")):
        monkeypatch.setattr("time.time", lambda now=now: float(now))
        workdir.write_status(state, 4, 24, devices=devices)
    monkeypatch.setattr("time.time", lambda: 912.0)
    workdir.write_status("complete", 24, 24)
    status = workdir.read_status()
    assert (status.started, status.time, status.seconds, status.devices) == (100, 912, 42, "2 × cpu")
    assert status.versions["jax"] == jax.__version__


def test_the_status_of_a_run_of_an_earlier_version_is_still_read(tmp_path):
    old = dict(state="stopped", step=3, num_steps=9, reason="", time=1.0, pid=7, host="there")
    (tmp_path / "status.json").write_text(json.dumps(old))
    assert Workdir(tmp_path).read_status().step == 3


def test_a_flipped_bit_of_the_config_is_told_in_a_sentence(tmp_path):
    workdir, refused = Workdir(tmp_path), 0
    workdir.claim(default_config("SM"), None)
    for bit in range(0, 8 * workdir.config.stat().st_size, 101):
        flip(workdir.config, bit)
        try:
            model_config(workdir.read_config(), 4096)
        except UserError as error:
            refused += "\n" not in str(error)
        flip(workdir.config, bit)
    assert refused > 100


def test_a_damaged_status_is_none(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.write_status("training", 4, 24)
    whole = json.loads(workdir.status.read_text())
    assert workdir.read_status().step == 4
    for text in ("", "[]", json.dumps(whole | {"time": "now"}), json.dumps(whole | {"more": 1}), "[" * 100_000):
        workdir.status.write_text(text)
        assert workdir.read_status() is None
        with pytest.raises(UserError, match="no run was started in"):
            describe(tmp_path)


@pytest.fixture
def nobody():
    """Another user, for as long as the test says."""
    if os.geteuid():
        pytest.skip("only root can be another user")

    @contextlib.contextmanager
    def become():
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return become


def test_the_workdir_of_another_user(tmp_path, nobody):
    workdir, config = Workdir(tmp_path / "run"), default_config("SM")
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    with workdir.held(config, print):
        with nobody():
            assert "starting, step 0" in describe(workdir.path)
            with pytest.raises(UserError, match="workdir=.* cannot be written: Permission denied; choose another"):
                workdir.held(config, print).__enter__()
        workdir.path.chmod(0o777)
        with nobody(), pytest.raises(UserError, match="cannot be locked: Permission denied"):
            workdir.held(config, print).__enter__()
    workdir.path.chmod(0o700)
    for ask in (describe, lambda path: Workdir(path).held(config, print).__enter__(), load_run):
        with nobody(), pytest.raises(UserError, match="Permission denied"):
            ask(workdir.path)


def test_a_folder_of_runs_tells_where_each_is_that_needs_a_look(tmp_path, capsys):
    states = {"tuning/a": "complete", "tuning/b": "diverged", "runs/a": "complete", "runs/b": "training", "runs/c": ""}
    for name, state in states.items():
        workdir = Workdir(tmp_path / name)
        workdir.claim(default_config("SM"), None)
        if state:
            workdir.write_status(state, 4, 24, "the loss is NaN" if state == "diverged" else "")
    told = describe(tmp_path)
    assert told.splitlines()[:3] == [
        f"{tmp_path}: nothing goes on", "runs: 1 complete, 1 died, 1 waiting", "tuning: 1 complete, 1 diverged"
    ]  # fmt: skip
    assert "runs/b: died at step 4 of 24" in told and "tuning/b: diverged at step 4" in told and told.count("\n") == 4
    with Workdir(tmp_path)._locked(), Workdir(tmp_path / "runs/b")._locked():
        told = describe(tmp_path)
    assert f"{tmp_path}: a sweep goes on" in told and "1 training" in told and "runs/b: training, step 4 of 24" in told
    assert main(["status", str(tmp_path), "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)[f"{tmp_path}/runs/a"]["state"] == "complete"


def test_ctrl_c_before_the_first_step_is_no_failure(tmp_path):
    workdir, config = Workdir(tmp_path), default_config("SM")
    with pytest.raises(KeyboardInterrupt), workdir.held(config, print):
        raise KeyboardInterrupt
    assert "stopped at step 0 of 1000" in describe(tmp_path) and "the same train command goes on" in describe(tmp_path)


def test_asking_leaves_no_trace(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.write_status("training", 4, 24)
    assert "died at step 4" in describe(tmp_path) and os.listdir(tmp_path) == ["status.json"]


def test_a_workdir_is_a_folder_of_this_machine(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert Workdir("~/run").path == Path("/home/someone/run")
    with pytest.raises(UserError, match="workdir='gs://bucket/run' is an address on a network"):
        Workdir("gs://bucket/run")
