"""`jax-entropy train`."""

import os
import shlex
from argparse import Namespace
from pathlib import Path
from types import ModuleType

from jax_entropy.commands.console import console
from jax_entropy.commands.parse import CONFIG, WORKDIR, XLA, Flag, command
from jax_entropy.commands.process import set_compiler
from jax_entropy.errors import UserError


@command(
    CONFIG,
    WORKDIR,
    Flag("from", None, "workdir or Hugging Face folder to start from: what fits of its model is taken over", kind=Path),
    Flag("distributed", False, "one of several processes of one run, see docs/launching.md"),
    XLA,
    Flag("profile", 0, "steps to trace into the workdir's folder `profile`"),
    examples=[
        "train --config=quickstart --workdir=runs/quickstart",
        "train --config=quickstart:SM+LN+G --workdir=runs/baseline --config.train.num_steps=100",
        "train runs/quickstart",
        "train --from=gpt2/ --workdir=runs/repaired --config.architecture='EReg(SM+LN+G)'",
    ],
)
def train(values: Namespace) -> None:
    """Trains the run of a config in a workdir, or goes on with it; there, and with --from, --config may be left out."""
    set_compiler(values.xla)
    count, index = _place_among_processes() if values.distributed else (None, None)
    import jax

    from jax_entropy.commands.summary import conclude
    from jax_entropy.training.train import train as run

    if values.distributed:
        _join(jax, count, index)
    out, called = console(), shlex.join(["jax-entropy", "train", *values.arguments])
    result = run(
        values.config, values.workdir, notify=out.print, profile=values.profile, start_from=getattr(values, "from"),
        command=called,
    )  # fmt: skip
    if jax.process_index() == 0:
        conclude(values.config, values.workdir, result, called, out)


def _place_among_processes() -> tuple[int | None, int | None]:
    """How many processes there are and which this is; None where JAX finds out.

    Raises:
      UserError: variables that no launcher can have meant.
    """
    numbers = []
    for name, least in (("JAX_NUM_PROCESSES", 1), ("JAX_PROCESS_ID", 0)):
        text = os.environ.get(name)
        if text is not None and not (text.isdecimal() and int(text) >= least):
            raise UserError(f"{name}={text!r} must be a whole number of at least {least}")
        numbers.append(None if text is None else int(text))
    count, index = numbers
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    host, _, port = (address or "").rpartition(":")
    if address is not None and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r} must be HOST:PORT of process 0")
    if count is not None and index is not None and index >= count:
        raise UserError(f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}")
    return count, index


def _join(jax: ModuleType, count: int | None, index: int | None) -> None:
    """Joins the other processes.

    Raises:
      UserError: JAX cannot find out what there is to join.
    """
    # jax would take SIGTERM for itself; the loop saves and stops on it
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (KeyError, ValueError) as error:  # not RuntimeError: of processes that were to come, some did not
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"--distributed finds no other processes to join ({reason}); set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or start it through launch/"
        ) from error
