"""The folder of a run while it trains: whose it is, where the run is, and what may change on the way."""

import json
import shutil
import signal

import jax
import numpy as np

from jax_entropy.runs.status import describe
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
