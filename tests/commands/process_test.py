"""A process without a home, and one that may not start threads."""

import os
import subprocess
import sys
import threading
from pathlib import Path

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


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """A user's, whose cache is a folder of its own and who says nothing of compilations."""
    monkeypatch.setattr(
        os, "environ", {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": "--xla_gpu_triton_gemm_any=false"}
    )
    return os.environ


def test_what_is_compiled_is_kept_in_a_folder_of_the_users_own(environment, tmp_path):
    process.keep_compilations()
    folder = Path(environment["JAX_COMPILATION_CACHE_DIR"])
    assert folder.is_dir() and folder.parent == tmp_path / "jax_entropy" / "compilations"
    assert folder.stat().st_mode & 0o077 == 0
    before = dict(environment)
    process.keep_compilations()
    assert environment == before


@pytest.mark.parametrize("folder", ["", "/elsewhere"])
def test_a_users_own_place_for_compilations_wins(environment, tmp_path, folder):
    environment["JAX_COMPILATION_CACHE_DIR"] = folder
    before = dict(environment)
    process.keep_compilations()
    assert environment == before and not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_a_line_and_no_more(environment, tmp_path, capsys):
    (tmp_path / "jax_entropy").write_text("a file")
    process.keep_compilations()
    assert "JAX_COMPILATION_CACHE_DIR" not in environment
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "jax_entropy") in said


def test_named_options_of_the_compiler_come_before_the_users_own(environment):
    process.set_compiler("")
    assert environment["XLA_FLAGS"] == "--xla_gpu_triton_gemm_any=false"
    process.set_compiler("fast")
    *named, last = environment["XLA_FLAGS"].split()
    assert named and last == "--xla_gpu_triton_gemm_any=false"
