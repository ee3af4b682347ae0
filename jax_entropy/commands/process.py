"""What a command needs of the process that it runs in, whoever runs it and wherever: threads, places for files."""

import atexit
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import tempfile
import threading
from pathlib import Path

from jax_entropy.commands.console import warn
from jax_entropy.errors import UserError
from jax_entropy.paths import cache_directory

_KEPT = 2 << 30  # bytes of compiled programs
# Of GPUs; other devices' compilers do not read them. docs/benchmarks/device.md has what they gain: cuBLAS adds biases
# in its products, which XLA's own do not, and q, k and v come out apart, where a merged one would be cut by copies.
_XLA = dict(
    fast="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_triton_gemm=false "
    "--xla_gpu_dot_merger_threshold_mb=0"
)
_THREADS = 64  # XLA, TensorStore and the loader have so many on two cores, and end the process where one is missing


def prepare() -> None:
    """Prepares the process for a command.

    Raises:
      UserError: a command could not run to its end.
    """
    _check_threads()
    _give_matplotlib_a_folder()


def set_compiler(options: str) -> None:
    """Sets XLA's options by the name that `--xla` gives them, before JAX runs; the user's own XLA_FLAGS win."""
    if options:
        os.environ["XLA_FLAGS"] = f"{_XLA[options]} {os.environ.get('XLA_FLAGS', '')}".strip()


def keep_compilations() -> None:
    """Lets JAX, once it is imported, keep what it compiles for the next process; JAX_COMPILATION_CACHE_DIR wins.

    Compiled programs are code for one kind of processor: their folder is the user's own, one for each kind. Programs
    for several CPU devices are not kept (`sharding.make_mesh`).
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_directory() / "compilations" / _processor()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{folder} is not a folder that this user alone writes")
    except (OSError, UserError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        warn(f"jax-entropy: the next start compiles anew, nothing is kept: {reason}; set JAX_COMPILATION_CACHE_DIR")
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if importlib.util.find_spec("filelock"):  # JAX needs it to throw away what was not used for longest
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_KEPT))


def _processor() -> str:
    """A name for the instructions that this machine's processor has."""
    try:
        flags = re.search(r"^(flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        flags = None
    known = f"{platform.machine()} {flags[0] if flags else platform.processor()}"
    return hashlib.sha256(known.encode()).hexdigest()[:12]


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
