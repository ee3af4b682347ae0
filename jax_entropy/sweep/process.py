"""The process of one run of a sweep: `python -m jax_entropy.sweep.process WORKDIR [CORES]` trains the config that lies
in the workdir.

It reads its standard input, which the sweep holds open: when the sweep ends, however that happens, the run saves and
stops.
"""

import os
import shlex
import signal
import sys
import threading

from jax_entropy.errors import UserError


def main(workdir: str, cores: str = "") -> int:
    """Trains and returns the exit code: 0 done or cleanly stopped, 2 as a sentence on standard error says.

    Args:
      cores: numbers of those to run on, with commas between; empty: all.
    """
    threading.Thread(target=_end_with_sweep, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    from jax_entropy.runs.workdir import Workdir
    from jax_entropy.training.train import train

    try:
        train(
            Workdir(workdir).read_config(), workdir,
            command=f"python -m jax_entropy.sweep.process {shlex.quote(workdir)}",
        )  # fmt: skip
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _end_with_sweep() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
