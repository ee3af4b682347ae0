"""What a command needs of the process that it runs in, whoever runs it and wherever: threads, a place for settings."""

import atexit
import os
import shutil
import tempfile
import threading
from pathlib import Path

from jax_entropy.errors import UserError

_THREADS = 64  # XLA, TensorStore and the loader have so many on two cores, and end the process where one is missing


def prepare() -> None:
    """Prepares the process for a command.

    Raises:
      UserError: a command could not run to its end.
    """
    _check_threads()
    _give_matplotlib_a_folder()


def _check_threads() -> None:
    done, threads = threading.Event(), []
    try:
        for _ in range(_THREADS):
            threads.append(threading.Thread(target=done.wait))
            threads[-1].start()
    except RuntimeError:
        raise UserError(
            f"this user may start only {len(threads) - 1} more threads, and {_THREADS} are needed; raise the limit "
            "that `ulimit -u` prints, or the container's"
        ) from None
    finally:
        done.set()
        for thread in threads:
            if thread.ident:
                thread.join()


def _give_matplotlib_a_folder() -> None:
    """One that lasts as long as this process, where the user has none to write to: matplotlib would warn of it."""
    if "MPLCONFIGDIR" in os.environ:
        return
    try:
        settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "matplotlib")
        settings.mkdir(parents=True, exist_ok=True)
        found = os.access(settings, os.W_OK)
    except (OSError, RuntimeError):
        found = False
    if not found:
        os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="jax_entropy-")
        atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
