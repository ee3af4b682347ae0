"""The folder of a run while it trains: whose it is, where the run is, and what may change on the way."""

import json
import shutil
import signal

import jax
import numpy as np

from jax_entropy.runs.status import describe
from jax_entropy.runs.workdir import Workdir
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


def test_what_does_not_change_the_mathematics_may_change_on_the_way(unbroken, tmp_path, corpus_directory):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "24")
    done = run(workdir, corpus_directory, "--config.train.log_every=3", "--config.train.keep=5")
    assert done.returncode == 0, done.stderr
    assert "going on with train.keep=5 (was 2), train.log_every=3 (was 4)" in done.stdout
    assert "step 21/24" in done.stdout
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(unbroken[0]))
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
