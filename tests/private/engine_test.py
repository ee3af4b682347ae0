"""The engine's environment: what is missing is said in a sentence, a broken engine ends in one too."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jax_entropy.errors import UserError
from jax_entropy.private.cost.profile import Network, on_network, read_network
from jax_entropy.private.engine import engine
from jax_entropy.private.engine.engine import Account, Engine, Setting
from tests import REPOSITORY
from tests.private.helpers import need_engine


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_another_platform_is_said(monkeypatch, tmp_path, system, machine):
    monkeypatch.setattr(engine.platform, "system", lambda: system)
    monkeypatch.setattr(engine.platform, "machine", lambda: machine)
    with pytest.raises(UserError, match=f"Linux on x86-64, and this is {system} on {machine}"):
        engine.setup(print, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_another_python_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "_python311", lambda: None)
    if "Linux on x86-64" in (engine.why_not() or ""):
        pytest.skip("another platform")
    with pytest.raises(UserError, match=r"for CPython 3.11; this is 3\."):
        engine.setup(print, tmp_path / "engine")


def test_a_failed_installation_is_said_and_goes_on(monkeypatch, tmp_path):
    if reason := engine.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(engine, "REQUIREMENT", "./no-such-wheel-here")
    lines = []
    with pytest.raises(UserError, match="the engine was not installed: .*the same command goes on"):
        engine.setup(lines.append, tmp_path / "engine")
    assert len(lines) == 2 and not (tmp_path / "engine/ready").exists()
    with pytest.raises(UserError, match="not set up in .*private setup"):
        engine.check(tmp_path / "engine")


def test_a_folder_that_is_no_environment_is_said(tmp_path):
    (tmp_path / "engine").mkdir()
    with pytest.raises(UserError, match="run: jax-entropy private setup"):
        Engine(Setting(), directory=tmp_path / "engine")


def test_a_damaged_environment_is_said(tmp_path):
    (tmp_path / "ready").touch()
    with pytest.raises(UserError, match="is damaged; run: jax-entropy private setup --force"):
        engine.check(tmp_path)


def test_what_is_set_up_is_told():
    need_engine()
    assert engine.check()["engine"] == engine.REQUIREMENT.partition("==")[2]


def test_an_engine_that_dies_ends_in_a_sentence():
    need_engine()
    with Engine(Setting()) as started:
        os.kill(started.process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="the engine has ended"):
            started.run("none", [], [])


def test_an_engine_that_hangs_is_given_up():
    need_engine()
    with Engine(Setting()) as started:
        started.timeout = 1
        os.kill(started.process.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match="did not answer within 1 s"):
            started.run("none", [], [])


def test_what_the_engine_refuses_is_a_sentence():
    need_engine()
    with Engine(Setting()) as started:
        with pytest.raises(UserError, match=r"the engine failed \(load\)"):
            started.load("broken", b"no program", ["secret"], {})
        with pytest.raises(UserError, match=r"the engine failed \(run\)"):
            started.run("broken", ["x"], ["y"])


def test_a_closed_engine_leaves_nothing_behind():
    need_engine()
    with Engine(Setting()) as started:
        folder, pid = started.folder.name, started.process.pid
        assert os.path.isdir(folder)
    assert not os.path.exists(folder)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_networks():
    assert read_network("100mbps,80ms") == read_network("wan") == Network(0.04, 1.25e7)
    assert read_network("1gbps,1ms") == read_network("lan")
    account = Account(2.0, (12_500_000, 25_000_000), (1, 1), 10)
    assert on_network(account, read_network("wan")) == pytest.approx(2.0 + 10 * 0.04 + 2.0)
    for text in ("moon", "100mbps", "0mbps,80ms", "100,80"):
        with pytest.raises(UserError, match="must be lan, wan, or like 100mbps,80ms"):
            read_network(text)


def test_the_engine_ends_with_the_process_that_started_it():
    need_engine()
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
