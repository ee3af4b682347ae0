"""Where a run is, told from outside and without loading it: also of one that died, and why."""

import os
import time

from jax_entropy.errors import UserError
from jax_entropy.runs.workdir import Status, Workdir


def describe(path: str | os.PathLike) -> str:
    """A few lines about the run in the folder `path`.

    Raises:
      UserError: none was started there.
    """
    workdir = Workdir(path)
    status = workdir.read_status()
    if status is None:
        raise UserError(f"no run was started in {path}: it has no readable status.json")
    lines = [f"{path}: {_state(status, workdir.in_use())}"]
    saved = sorted(int(step.name) for step in workdir.checkpoints.glob("*") if step.name.isdecimal())
    lines.append(f"checkpoints: {', '.join(map(str, saved)) or 'none'}")
    if workdir.incidents.exists():
        count = len(workdir.incidents.read_text().splitlines())
        lines.append(f"sent back by the guard: {count} times, see {workdir.incidents}")
    return "\n".join(lines)


def _state(status: Status, in_use: bool) -> str:
    where = f"step {status.step} of {status.num_steps}"
    ago = f"{max(0, time.time() - status.time):,.0f} s ago"
    process = f"process {status.pid} on {status.host}"
    if status.state in ("diverged", "failed"):
        return f"{status.state} at {where}, {ago}: {status.reason}"
    if status.state in ("complete", "stopped"):
        return f"{status.state} at {where}, {ago}; " + (
            "nothing is left to train" if status.state == "complete" else "the same train command goes on"
        )
    if in_use:
        return f"{status.state}, {where} {ago}, {process}"
    return (
        f"died at {where}, last heard of {ago}: {process} ended without a word (killed, out of memory, or power lost), "
        "or runs on another machine; the same train command goes on"
    )
