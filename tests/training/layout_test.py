"""Twenty steps are the same on every layout of devices and processes, and a run that changes it reads every chunk once.

Real processes throughout: one, or several that launch/local.sh joins by jax.distributed.
"""

import collections
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import REPOSITORY
from tests.run_helpers import command, environment, lines, parameters

# (processes, devices of each, mesh)
ONE = (1, 1, (-1, 1, 1))
ALONE = [(1, 8, (8, 1, 1)), (1, 8, (1, 8, 1)), (1, 8, (2, 2, 2))]
LONG = functools.partial(pytest.param, marks=pytest.mark.long)
JOINED = [(2, 4, (-1, 1, 1)), LONG((4, 2, (-1, 1, 1))), LONG((2, 4, (1, 4, 2)))]

# Adam divides small gradients by their own size: with a larger ε those that are zero but for rounding stay near zero.
TWENTY = (
    "--config.train.num_steps=20", "--config.train.log_every=1", "--config.train.evaluate_every=20",
    "--config.train.checkpoint_every=20", "--config.optimizer.epsilon=1e-3",
)  # fmt: skip

# Stands in for jax-entropy, and writes down every row that the training loop takes, process by process.
RECORDING = f"""#!{sys.executable}
import json, os, sys
from jax_entropy import data
from jax_entropy.commands import main as cli

make = data.train_iterator

def train_iterator(*args, **kwargs):
    iterator = make(*args, **kwargs)
    read = type(iterator).__next__
    name = os.environ["READ"] + "." + os.environ.get("JAX_PROCESS_ID", "0")

    def recorded(self):
        rows = read(self)
        if self is iterator:
            with open(name, "a") as file:
                file.write(json.dumps(rows["tokens"].tolist()) + "\\n")
        return rows

    type(iterator).__next__ = recorded
    return iterator

data.train_iterator = train_iterator
sys.exit(cli.main())
"""


def start(processes, devices, mesh, workdir, corpus_directory, *overrides, read=None):
    """Starts a run on a layout; `read` names the files that its rows are written to."""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    executable, _, _, _, *flags = command(workdir, corpus_directory, *overrides, *sizes)
    env = environment() | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(REPOSITORY)}
    program = [executable, "-m", "jax_entropy"]
    env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
    if read:
        program = [str(read.parent / "bin/jax-entropy")]
        (read.parent / "bin").mkdir(exist_ok=True)
        (read.parent / "bin/jax-entropy").write_text(RECORDING)
        (read.parent / "bin/jax-entropy").chmod(0o755)
        env |= {"READ": str(read), "PATH": f"{read.parent / 'bin'}:{env['PATH']}"}
    line = [*program, "train", *flags] if processes == 1 else ["bash", "launch/local.sh", str(processes), *flags]
    return subprocess.Popen(line, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory, corpus_directory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(start(*ONE, workdir, corpus_directory, *TWENTY))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*ALONE, *JOINED], ids=str)
def test_twenty_steps_are_the_same_on_every_layout(on_one_device, tmp_path, corpus_directory, layout):
    """Losses, entropies [L, N] and thresholds of each step, and the final parameters, to 1e-5 in float32."""
    finish(start(*layout, tmp_path / "run", corpus_directory, *TWENTY))
    expected, actual = lines(on_one_device), lines(tmp_path / "run")
    assert [line["step"] for line in actual] == [line["step"] for line in expected] == list(range(1, 21))
    for name in ("loss", "cross_entropy", "penalty", "head_entropy", "threshold"):
        one, other = (np.array([line[name] for line in run]) for run in (expected, actual))
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5, err_msg=name)
    assert np.ptp([line["loss"] for line in actual]) > 0.1  # something was learned
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(compare, parameters(tmp_path / "run"), parameters(on_one_device))


def chunks(read):
    """Rows that the processes of a run took, as one list of batches in order; a batch is a multiset of chunks."""
    texts = [path.read_text() for path in sorted(read.parent.glob(f"{read.name}.*"))]
    of_process = [[json.loads(line) for line in text.splitlines()] for text in texts]
    batches = zip(*of_process, strict=True)
    return [collections.Counter(tuple(row) for rows in batch for row in rows) for batch in batches]


def reading(layout, workdir, corpus_directory, name):
    """Sixty steps on a layout, with the rows written to files `name`."""
    steps = ("--config.train.num_steps=60", "--config.train.evaluate_every=60")
    return start(*layout, (-1, 1, 1), workdir, corpus_directory, *steps, read=workdir.parent / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus_directory):
    """A run without a stop: (its batches, its losses)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(reading((1, 1), workdir, corpus_directory, "rows"))
    return chunks(workdir.parent / "rows"), [line["loss"] for line in lines(workdir)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 8), (1, 2)), ((2, 1), (1, 1)), ((1, 2), (2, 2))],
    ids=["8 devices to 2", "2 processes to 1", "1 process to 2"],
)
def test_a_run_that_changes_its_layout_reads_every_chunk_once(whole, tmp_path, corpus_directory, before, after):
    """Stopped by SIGTERM and started on another layout: the same chunks in the same batches as without a stop."""
    process = reading(before, tmp_path / "run", corpus_directory, "first")
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 8/60"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0, "".join(said)
    resumed = finish(reading(after, tmp_path / "run", corpus_directory, "second"))
    (expected, losses), first, second = whole, *(chunks(tmp_path / name) for name in ("first", "second"))
    assert f"resumed at step {len(first)} of 60" in resumed and 8 <= len(first) < 60
    assert [len(batch) for batch in expected] == [8] * 60
    assert first + second == expected
    assert max(sum(first + second, collections.Counter()).values()) == 1  # within an epoch, none twice
    np.testing.assert_allclose([line["loss"] for line in lines(tmp_path / "run")], losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_a_signal_to_one_of_two_processes_stops_both(whole, tmp_path, corpus_directory):
    """SIGTERM to the second process only: both save at one step and end with code 0, within 30 seconds."""
    launched, said = reading((2, 1), tmp_path / "run", corpus_directory, "first"), []
    for line in launched.stdout:
        said.append(line)
        if line.startswith("step 8/60"):
            second = [pid for pid in processes_of(launched.pid) if b"JAX_PROCESS_ID=1" in environment_of(pid)]
            os.kill(max(second), signal.SIGTERM)
            told = time.monotonic()
    assert launched.wait(timeout=30) == 0, "".join(said)
    assert time.monotonic() - told < 30
    resumed = finish(reading((2, 1), tmp_path / "run", corpus_directory, "second"))
    first, second = (chunks(tmp_path / name) for name in ("first", "second"))
    assert f"resumed at step {len(first)} of 60" in resumed and 8 <= len(first) < 60
    assert first + second == whole[0]


def processes_of(parent: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [parent, *(pid for child in children for pid in processes_of(int(child)))]


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
