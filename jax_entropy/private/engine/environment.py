"""The engine's own virtual environment: made once, checked, and never imported into this one.

Its wheel pins another JAX than this package needs, and exists for one platform and one Python only.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from jax_entropy.errors import UserError
from jax_entropy.paths import cache_directory, local_path

REQUIREMENT = "spu==0.10.0.dev20251211"
_CHECK_SECONDS = 300  # ten times what a cold disk needs


def default_directory() -> Path:
    """Where the environment lives: $JAX_ENTROPY_ENGINE, or under the user's cache."""
    if chosen := os.environ.get("JAX_ENTROPY_ENGINE"):
        return local_path(chosen, "JAX_ENTROPY_ENGINE")
    return cache_directory() / REQUIREMENT.replace("==", "-")


def environment_python(directory: Path | None = None) -> Path:
    """The environment's Python.

    Raises:
      UserError: it is not set up.
    """
    directory = directory or default_directory()
    python = directory / "bin" / "python"
    if not (directory / "ready").exists():
        raise UserError(f"the engine is not set up in {directory}; run: jax-entropy private setup")
    if not os.access(python, os.X_OK):
        raise UserError(f"the engine in {directory} is damaged; run: jax-entropy private setup --force")
    return python


def why_not() -> str | None:
    """Why the engine cannot run on this machine, in a sentence; None if it can."""
    machine = platform.machine().lower()
    if platform.system() != "Linux" or machine not in ("x86_64", "amd64"):
        return f"the engine's wheel is for Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
    if _python311() is None:
        here = platform.python_version()
        return f"the engine's wheel is for CPython 3.11; this is {here}, and there is no python3.11 on the PATH"
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    lacking = {"avx", "aes"} - set(flags[1].split()) if flags else set()
    return f"the engine needs a CPU with {' and '.join(sorted(lacking)).upper()}" if lacking else None


def _python311() -> str | None:
    return sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")


def check(directory: Path | None = None) -> dict[str, str]:
    """What is set up: {"engine": version, "python": version, "directory": path}.

    Raises:
      UserError: the engine is not set up, or does not start.
    """
    python = environment_python(directory)
    code = (
        "import importlib.metadata as m, platform, spu.libspu as l; "
        "print('VERSIONS', m.version('spu'), platform.python_version())"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=_CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the engine in {python.parent.parent} has not started within {_CHECK_SECONDS} s; try again when the "
            "machine does less, or run: jax-entropy private setup --force"
        ) from None
    found = re.search(r"VERSIONS (\S+) (\S+)", done.stdout)
    if not found:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"the engine in {python.parent.parent} does not start ({last}); run: jax-entropy private setup --force"
        )
    return dict(engine=found[1], python=found[2], directory=str(python.parent.parent))


def setup(notify: Callable[[str], None], directory: Path | None = None, *, force: bool = False) -> dict[str, str]:
    """Makes the engine's environment, or goes on with one that was interrupted.

    Returns:
      What `check` does.
    Raises:
      UserError: in a sentence: platform, Python, CPU, disk or network do not allow it.
    """
    if reason := why_not():
        raise UserError(reason)
    directory = directory or default_directory()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if force:
                shutil.rmtree(directory, ignore_errors=True)
            if not (directory / "ready").exists():
                _install(notify, directory)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written: {error.strerror}; set JAX_ENTROPY_ENGINE to another folder"
        ) from None
    return check(directory)


def _install(notify: Callable[[str], None], directory: Path) -> None:
    needed, free = 1.5e9, shutil.disk_usage(directory.parent).free
    if free < needed:
        raise UserError(
            f"the engine needs {needed / 1e9:.1f} GB in {directory.parent}, and {free / 1e9:.1f} GB are free"
        )
    log, start = Path(f"{directory}.log"), time.monotonic()
    pip = [directory / "bin" / "python", "-m", "pip"]
    commands = [
        ("makes a Python 3.11 environment", [_python311(), "-m", "venv", directory]),
        (
            f"installs {REQUIREMENT} (about 730 MB on disk)",
            [*pip, "install", "--disable-pip-version-check", "--pre", REQUIREMENT],
        ),
    ]
    for line, command in commands:
        notify(f"{line} …")
        with log.open("w") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
        if code:
            errors = [text for text in log.read_text().splitlines() if "error" in text.lower()] or ["see the log"]
            raise UserError(f"the engine was not installed: {errors[-1].strip()} ({log}); the same command goes on")
    (directory / "ready").touch()
    notify(f"done in {time.monotonic() - start:.0f} s")
