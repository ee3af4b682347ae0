"""The engine's environment: what is missing, or cannot be, is said in a sentence."""

import pytest

from jax_entropy.errors import UserError
from jax_entropy.private.engine import environment
from jax_entropy.private.engine.engine import Engine, Setting


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_another_platform_is_said(monkeypatch, tmp_path, system, machine):
    monkeypatch.setattr(environment.platform, "system", lambda: system)
    monkeypatch.setattr(environment.platform, "machine", lambda: machine)
    with pytest.raises(UserError, match=f"Linux on x86-64, and this is {system} on {machine}"):
        environment.setup(print, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_another_python_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_python311", lambda: None)
    if "Linux on x86-64" in (environment.why_not() or ""):
        pytest.skip("another platform")
    with pytest.raises(UserError, match=r"for CPython 3.11; this is 3\."):
        environment.setup(print, tmp_path / "engine")


def test_a_failed_installation_is_said_and_goes_on(monkeypatch, tmp_path):
    if reason := environment.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(environment, "REQUIREMENT", "./no-such-wheel-here")
    lines = []
    with pytest.raises(UserError, match="the engine was not installed: .*the same command goes on"):
        environment.setup(lines.append, tmp_path / "engine")
    assert len(lines) == 2 and not (tmp_path / "engine/ready").exists()
    with pytest.raises(UserError, match="not set up in .*private setup"):
        environment.check(tmp_path / "engine")


def test_a_folder_that_is_no_environment_is_said(tmp_path):
    (tmp_path / "engine").mkdir()
    with pytest.raises(UserError, match="run: jax-entropy private setup"):
        Engine(Setting(), directory=tmp_path / "engine")


def test_a_damaged_environment_is_said(tmp_path):
    (tmp_path / "ready").touch()
    with pytest.raises(UserError, match="is damaged; run: jax-entropy private setup --force"):
        environment.check(tmp_path)


def test_an_engine_that_does_not_start_in_time_is_said(monkeypatch, tmp_path):
    (tmp_path / "ready").touch()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(environment, "_CHECK_SECONDS", 0.2)
    with pytest.raises(UserError, match="has not started within 0.2 s; .*private setup --force"):
        environment.check(tmp_path)


def test_what_is_set_up_is_told(installed):
    assert environment.check()["engine"] == environment.REQUIREMENT.partition("==")[2]
