"""Where a run is, told from outside and without loading it: also of one that died, and why; and where a sweep is."""

import collections
import os
import time
from collections.abc import Iterator

from jax_entropy.errors import UserError
from jax_entropy.runs.workdir import RUNNING, Status, Workdir, saved_steps

_QUIET = ("waiting", "stopped", "complete")  # states of a sweep's runs that their number tells enough about


def describe(path: str | os.PathLike) -> str:
    """A few lines about the run in the folder `path`, or about those in its folders, like a sweep's.

    Raises:
      UserError: none was started there.
    """
    workdir = Workdir(path)
    status = workdir.read_status()
    if status is None and not workdir.exists() and (runs := runs_in(path)):
        return "\n".join(_many(workdir, runs))
    if status is None:
        raise UserError(f"no run was started in {path}: it has no readable status.json")
    lines = [f"{path}: {_state(status, workdir.in_use())}"]
    saved = saved_steps(workdir.checkpoints)
    lines.append(f"checkpoints: {', '.join(map(str, saved)) or 'none'}")
    if workdir.incidents.exists():
        count = len(workdir.incidents.read_text().splitlines())
        lines.append(f"sent back by the guard: {count} times, see {workdir.incidents}")
    return "\n".join(lines)


def runs_in(path: str | os.PathLike) -> list[Workdir]:
    """The runs in the folders of a folder, and in those of these: a sweep has `tuning/RUN` and `runs/RUN`."""
    configs = (config for pattern in ("*", "*/*") for config in Workdir(path).path.glob(f"{pattern}/config.json"))
    return [Workdir(config.parent) for config in sorted(configs)]


def _many(folder: Workdir, runs: list[Workdir]) -> Iterator[str]:
    """How many runs there are in which state, and where each one is that trains, died or failed."""
    # a sweep holds the lock of its folder like a run
    yield f"{folder.path}: {'a sweep goes on' if folder.in_use() else 'nothing goes on'}"
    counts: dict[str, collections.Counter[str]] = {}
    lines = []
    for run in runs:
        status, in_use = run.read_status(), run.in_use()
        state = status.state if status else "waiting"
        if state in RUNNING and not in_use:
            state = "died"
        counts.setdefault(run.path.parent.name, collections.Counter())[state] += 1
        if status and state not in _QUIET:
            lines.append(f"{run.path}: {_state(status, in_use)}")
    for name, states in counts.items():
        yield f"{name}: {', '.join(f'{count} {state}' for state, count in states.most_common())}"
    yield from lines


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
