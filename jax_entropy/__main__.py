"""The process of `jax-entropy` and `python -m jax_entropy`: Ctrl-C ends it without a traceback, whenever it comes."""

import signal
import sys
from types import FrameType

from jax_entropy.commands import INTERRUPTED

_IMPORT = "<frozen importlib._bootstrap>"
_LATER = 0.05  # seconds


def main() -> int:
    """Runs the command that this process was started with and returns its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell had it ignored
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGALRM, interrupt)
    try:
        from jax_entropy.commands.main import main as run  # longer than a finger takes

        return run()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 1
    finally:  # what the interpreter tidies up now may be cut short, in silence
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(_: int, frame: FrameType | None) -> None:
    """What Ctrl-C does: as always, but never amid an import, where extension modules lose it, print it or crash."""
    while frame:
        if frame.f_code.co_filename == _IMPORT:
            signal.setitimer(signal.ITIMER_REAL, _LATER)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
