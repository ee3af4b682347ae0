"""Runs that are killed again and again under the supervisor: real processes, real SIGKILLs, at random moments."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import REPOSITORY
from tests.run_helpers import assert_same_run, command, environment, lines

OVERRIDES = ("--config.train.num_steps=300", "--config.train.checkpoint_every=10", "--config.train.log_every=50")


def trainers(workdir):
    """Processes that train in a workdir."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_trainer = b"train" in arguments and b"--" not in arguments and not arguments[0].endswith(b"bash")
        if is_trainer and f"--workdir={workdir}".encode() in arguments:
            found.append(int(process.name))
    return found


def kill_again_and_again(supervisor, workdir, count, seed):
    """Kills one process of the run `count` times, and returns how often one was there to be killed."""
    rng, kills = np.random.default_rng(seed), 0
    while supervisor.poll() is None and kills < count:
        time.sleep(rng.uniform(0.3, 6.0))
        victims = trainers(workdir)
        if victims:
            os.kill(int(rng.choice(victims)), signal.SIGKILL)
            kills += 1
    return kills


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_twenty_kills_in_a_row_end_bit_identical(tmp_path, corpus_directory):
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    unbroken = subprocess.run(
        command(reference, corpus_directory, *OVERRIDES),
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert unbroken.returncode == 0, unbroken.stderr
    supervise = [sys.executable, "-m", "jax_entropy.supervise", "--restart=30", "--backoff=0", "--"]
    with open(tmp_path / "log", "w") as log:
        supervisor = subprocess.Popen(
            supervise + command(workdir, corpus_directory, *OVERRIDES), env=environment(), cwd=REPOSITORY, stdout=log,
            stderr=log,
        )  # fmt: skip
        kills = kill_again_and_again(supervisor, workdir, 20, seed=0)
        assert supervisor.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-2000:]
    said = (tmp_path / "log").read_text()
    assert kills >= 5 and said.count("was killed by SIGKILL") == kills
    assert_same_run(workdir, reference)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_two_processes_of_which_either_is_killed_end_as_unbroken_ones(tmp_path, corpus_directory):
    def launch(workdir, *options):
        arguments = command(workdir, corpus_directory, *OVERRIDES)
        return [str(REPOSITORY / "launch/local.sh"), *options, "2", *arguments[arguments.index("train") + 1 :]]

    env = environment() | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    unbroken = subprocess.run(launch(reference), env=env, cwd=REPOSITORY, capture_output=True, text=True)
    assert unbroken.returncode == 0, unbroken.stderr
    with open(tmp_path / "log", "w") as log:
        supervisor = subprocess.Popen(launch(workdir, "--restart=20"), env=env, cwd=REPOSITORY, stdout=log, stderr=log)
        kills = kill_again_and_again(supervisor, workdir, 4, seed=1)
        assert supervisor.wait(timeout=900) == 0, (tmp_path / "log").read_text()[-2000:]
    assert kills
    assert [line["step"] for line in lines(workdir)] == [line["step"] for line in lines(reference)]
    assert_same_run(workdir, reference)
