"""The process of `jax-entropy` and `python -m jax_entropy`: whenever Ctrl-C comes, it ends without a traceback."""

import signal
import sys


def main() -> int:
    """Runs the command that this process was started with and returns its exit code."""
    try:
        from jax_entropy.commands.main import main as run  # here: the imports take longer than a finger

        return run()
    except KeyboardInterrupt:
        print("jax-entropy: interrupted; the same command starts again", file=sys.stderr)
        return 1
    finally:  # all is done: what the interpreter tidies up now may be cut short, in silence
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
