"""Runs of a sweep as processes, several at a time: each on its own cores or GPU, all stopped when the sweep is.

A run that is complete, or that diverged, is not run again; any other goes on from its last checkpoint.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jax_entropy import config as configs
from jax_entropy.errors import UserError, check_number
from jax_entropy.paths import writing
from jax_entropy.runs.workdir import Workdir
from jax_entropy.sweep.outcome import Outcome, read_outcome
from jax_entropy.sweep.spec import PlannedRun
from jax_entropy.training.signals import Signals

_PROCESS = (sys.executable, "-m", "jax_entropy.sweep.process")
_POLL_SECONDS = 0.2
_REFUSED = 2  # exit code of what a person has to correct


class Place(NamedTuple):
    """Where a process runs: core numbers with commas between (empty: all), and variables of its environment."""

    cores: str = ""
    variables: tuple[tuple[str, str], ...] = ()


def places(jobs: int) -> list[Place]:
    """A place for each of so many processes at a time, none of which shares a GPU or, without GPUs, a core.

    Raises:
      UserError: there are not so many.
    """
    check_number("jobs", jobs, 1)
    if jobs == 1:
        return [Place()]
    if os.environ.get("JAX_PLATFORMS") != "cpu" and list(Path("/dev").glob("accel[0-9]*")):
        raise UserError(f"jobs={jobs} must be 1 here: a process takes all of this machine's TPU chips")
    cores, gpus = sorted(os.sched_getaffinity(0)), _gpus()
    available, what = (gpus, "GPUs") if gpus else (cores, "cores")
    if jobs > len(available):
        raise UserError(f"jobs={jobs} is more than the {len(available)} {what} that are here, and each run takes one")
    if gpus:
        return [Place("", (("CUDA_VISIBLE_DEVICES", ",".join(gpus[i::jobs])),)) for i in range(jobs)]
    return [Place(",".join(map(str, cores[i::jobs]))) for i in range(jobs)]


def _gpus() -> list[str]:
    """Numbers or names of the GPUs that a process may use."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)


def claim(runs: Sequence[PlannedRun]) -> None:
    """Makes each folder its run's, so that its process, or a later `jax-entropy train FOLDER`, knows what to train.

    A run that is still to be trained goes on with the fields that may change as they are now.

    Raises:
      UserError: one holds another run.
    """
    for run in runs:
        workdir = Workdir(run.path)
        if workdir.exists():
            try:
                changed = configs.changes(workdir.read_config(), run.config)
            except UserError as error:
                raise UserError(f"{run.path} holds a run of another config: {error}; choose another workdir") from None
            if not changed or workdir.in_use() or read_outcome(run.path).settled:
                continue
        workdir.claim(run.config, None)


def train_all(runs: Sequence[PlannedRun], where: Sequence[Place], cache: Path, notify: Callable[[str], None]) -> bool:
    """Trains what is not settled yet, one run at each place at a time; False where a signal stopped it.

    A run whose process dies does not keep the others from running; one that is refused stops all, which would be, too.

    Args:
      cache: folder of compiled programs, which runs of one shape share.
      notify: is told about each run that begins and ends, a line each.
    Raises:
      UserError: a run cannot be trained, for another reason than a loss that diverged.
    """
    waiting, count = [run for run in runs if not read_outcome(run.path).settled], len(runs)
    done, free, active, told = count - len(waiting), list(where), [], False
    with Signals() as signals:
        try:
            while active or (waiting and not signals.wanted):
                for process, run, place in [entry for entry in active if entry[0].poll() is not None]:
                    active.remove((process, run, place))
                    free.append(place)
                    outcome = read_outcome(run.path)
                    done += outcome.settled
                    end = _told(outcome, process.returncode, stopped=signals.wanted)
                    notify(f"[{done}/{count}] {run}: {end}")
                    process.stdin.close()
                    if process.returncode == _REFUSED and not outcome.settled:
                        reason = outcome.reason or _last_line(run.path / "train.log")
                        raise UserError(f"{run} cannot be trained: {reason}; what is done is kept")
                if signals.wanted:
                    for process, *_ in active:
                        if not process.stdin.closed:  # once: a second signal would be obeyed without saving
                            process.stdin.close()
                while free and not signals.wanted and (run := _next(waiting)):
                    notify(f"[{done}/{count}] {run} trains in {run.path}")
                    place = free.pop()
                    active.append((_start(run, place, cache), run, place))
                if waiting and not (active or told or signals.wanted):
                    told = True
                    notify(f"another process still has {waiting[0].path}; waiting for it")
                time.sleep(_POLL_SECONDS)
        finally:  # a second signal, or a fault of this process
            for process, *_ in active:
                process.send_signal(signal.SIGTERM)
                process.wait()
                process.stdin.close()  # not before: its end would be a second signal
    return not signals.wanted


def _next(waiting: list[PlannedRun]) -> PlannedRun | None:
    """Takes the first run whose folder no process has: one of a sweep that was killed may still be saving."""
    found = next((run for run in waiting if not Workdir(run.path).in_use()), None)
    if found:
        waiting.remove(found)
    return found


def _start(run: PlannedRun, place: Place, cache: Path) -> subprocess.Popen:
    variables = {"JAX_COMPILATION_CACHE_DIR": str(cache)} | os.environ | dict(place.variables)
    command = [*_PROCESS, str(run.path), *([place.cores] if place.cores else [])]
    with writing(run.path / "train.log"), (run.path / "train.log").open("ab") as log:
        # in a session of its own: Ctrl-C reaches it once, from here
        return subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )


def _last_line(path: Path) -> str:
    """What a process said last, which was refused before its run had a status."""
    return (path.read_text(errors="replace").splitlines() or ["it did not say why"])[-1]


def _told(outcome: Outcome, code: int, stopped: bool) -> str:
    """How a run ended, in a phrase."""
    if outcome.state == "complete":
        return f"perplexity {outcome.perplexity:.2f}, {outcome.seconds:.0f} s"
    if outcome.state == "unfinished" and code < 0 and not stopped:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"{'stopped' if outcome.state == 'unfinished' else outcome.state}{outcome.reason and ': ' + outcome.reason}"
