"""The engine's process: whatever becomes of it ends in a sentence, and it leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Engine, Setting
from tests import REPOSITORY


def test_an_engine_that_dies_ends_in_a_sentence(installed):
    with Engine(Setting()) as started:
        os.kill(started.process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="the engine has ended"):
            started.run("none", [], [])


def test_an_engine_that_hangs_is_given_up(installed):
    with Engine(Setting()) as started:
        started.timeout = 1
        os.kill(started.process.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match="did not answer within 1 s"):
            started.run("none", [], [])


def test_what_the_engine_refuses_is_a_sentence(engine):
    started = engine(Setting())
    with pytest.raises(UserError, match=r"the engine failed \(load\)"):
        started.load("broken", b"no program", ["secret"], {})
    with pytest.raises(UserError, match=r"the engine failed \(run\)"):
        started.run("broken", ["x"], ["y"])


def test_a_closed_engine_leaves_nothing_behind(installed):
    with Engine(Setting()) as started:
        folder, pid = started.folder.name, started.process.pid
        assert os.path.isdir(folder)
    assert not os.path.exists(folder)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_engine_ends_with_the_process_that_started_it(installed):
    code = "from jax_entropy.private.engine.engine import *; e = Engine(Setting()); print(e.process.pid, flush=True); "
    code += "os.kill(os.getpid(), 9)"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    for _ in range(50):
        try:
            os.kill(int(started.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the engine is still there")
