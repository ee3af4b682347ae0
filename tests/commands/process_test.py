"""A process without a home, and one that may not start threads."""

import subprocess
import sys
import threading

import pytest

from jax_entropy.commands import process
from jax_entropy.errors import UserError
from tests import REPOSITORY

WITHOUT = "from jax_entropy.commands import process; process.prepare(); import os; print(os.environ['MPLCONFIGDIR']); "
WITHOUT += "import matplotlib"


def test_matplotlib_gets_a_folder_where_there_is_no_home():
    environment = {"HOME": "/proc/no/home"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "jax_entropy-" in done.stdout and not done.stderr


def test_a_limit_on_threads_is_told_before_a_library_ends_the_process(monkeypatch):
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) == 20:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    process.prepare()
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(UserError, match="may start only 20 more threads, and 64 are needed"):
        process.prepare()
    assert len(started) == 20 and not any(thread.is_alive() for thread in started)
