"""Real `jax-entropy train` processes on the tiny config, and what their workdirs hold."""

import json
import os
import subprocess
import sys

import jax
import numpy as np

from tests import REPOSITORY


def command(workdir, corpus_directory, *overrides, architecture="EReg(SM(t)+ScFuFFN)"):
    return [
        sys.executable, "-m", "jax_entropy", "train", f"--config={REPOSITORY}/tests/tiny_config.py:{architecture}",
        f"--workdir={workdir}", f"--config.data.directory={corpus_directory}", *overrides,
    ]  # fmt: skip


def environment():
    return os.environ | {"JAX_PLATFORMS": "cpu"}


def run(*args, **kwargs):
    return subprocess.run(
        command(*args, **kwargs), env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )


def start(*args, **kwargs):
    """The process of a run whose lines are read while it trains."""
    return subprocess.Popen(
        command(*args, **kwargs), env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip


def lines(workdir, kind="train"):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def parameters(workdir, notify=print):
    from jax_entropy.runs.load import load_run

    return jax.tree.map(np.asarray, load_run(workdir, notify).variables)


def assert_same_run(workdir, reference):
    """Bit-identical parameters, and the same loss on every line that was logged."""
    jax.tree.map(np.testing.assert_array_equal, parameters(workdir), parameters(reference))
    losses, expected = ({line["step"]: line["loss"] for line in lines(w)} for w in (workdir, reference))
    assert losses == expected
