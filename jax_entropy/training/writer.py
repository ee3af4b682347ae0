"""Writes what a run measured: metrics.jsonl, a TensorBoard event file and, if asked for, Weights & Biases.

Every line is on disk when `write` returns, and a resumed run continues the file as if it had never been stopped.
"""

import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jax_entropy.errors import UserError
from jax_entropy.runs.workdir import Workdir, to_json


class MetricsWriter:
    """Appends the metrics of one run to the files in its workdir; meant for process 0 alone.

    Args:
        workdir: the run's folder, made if it is missing.
        wandb: also log to Weights & Biases, in the mode that WANDB_MODE says.
        first_step: the step a resumed run goes on from: later lines, of a killed run, are dropped; 0 starts afresh.

    Raises:
        UserError: the workdir cannot be written, or W&B is not installed or does not start.
    """

    def __init__(self, workdir: str | Path, *, wandb: bool = False, first_step: int = 0):
        self._workdir = Workdir(Path(workdir).absolute())
        self._wandb = _start_wandb(self._workdir.path) if wandb else None
        with self._failures_explained():
            self._workdir.path.mkdir(parents=True, exist_ok=True)
            if self._workdir.metrics.exists():
                _drop_lines_after(self._workdir.metrics, first_step)
            self._lines = self._workdir.metrics.open("ab", buffering=0)
            # tensorboardX's SummaryWriter hands events to a thread that dies of a full disk and then blocks the run.
            self._events = EventsWriter(str(self._workdir.events), f".{time.time_ns()}")
            # TensorBoard hides what an earlier event file says about the steps from here on.
            restart = Event(step=first_step + 1 if first_step else 0, session_log=SessionLog(status=SessionLog.START))
            self._events.write_event(restart)
            self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line.

        TensorBoard and W&B get numbers only: [L] as `name/layer`, [L, N] as the means over heads, and the head
        entropies [L, N] of an evaluation as a picture too.

        Args:
            step: number of optimizer steps done.
            metrics: `kind` ("train" or "evaluate") and numbers, lists, arrays, or dicts of them.

        Raises:
            UserError: the disk is full.
        """
        line = {"step": int(step)} | to_json(metrics)
        with self._failures_explained():
            rest = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
            while rest:
                rest = rest[self._lines.write(rest) :]
            scalars = dict(_scalars({name: value for name, value in line.items() if name != "step"}))
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            if line.get("kind") == "evaluate" and line.get("head_entropy"):
                values.append(Summary.Value(tag="head_entropy", image=_heat_map(line["head_entropy"], step)))
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log(scalars | {"step": step})

    def close(self) -> None:
        """Closes the files; nothing is waiting to be written."""
        with self._failures_explained():
            self._lines.close()
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextlib.contextmanager
    def _failures_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"the metrics could not be written in {str(self._workdir.path)!r}: {reason}") from error


def _drop_lines_after(path: Path, first_step: int) -> None:
    """Keeps the whole lines up to `first_step`, none if it is 0; a kill leaves the old file or the new one."""
    kept = path.with_suffix(".new")
    with path.open("rb") as old, kept.open("wb") as new:
        new.writelines(line for line in old if 0 < first_step and _step_of(line) <= first_step)
    os.replace(kept, path)


def _step_of(line: bytes) -> float:
    """The step of a line, infinity for one that a kill or a full disk cut short."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _scalars(value: Any, tag: str = "") -> Iterator[tuple[str, float]]:
    """Tag and value of every number, as in ("layer_entropy/3", 1.25); None (not finite) is left out."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _scalars(child, f"{tag}/{name}" if tag else name)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            if isinstance(child, list):
                child = None if None in child else float(np.mean(child))
            yield from _scalars(child, f"{tag}/{index}")
    elif isinstance(value, (int, float)):
        yield tag, value


def _heat_map(entropy_LxN: list[list[float | None]], step: int) -> Summary.Image:
    num_layers, num_heads = np.shape(entropy_LxN)
    figure = Figure(figsize=(2 + 0.4 * num_heads, 1.5 + 0.4 * num_layers), dpi=80, layout="constrained")
    axes = figure.subplots()
    cells = axes.imshow(np.array(entropy_LxN, np.float64), cmap="viridis", vmin=0)
    axes.set(title=f"Head entropy, step {step}", xlabel="head", ylabel="layer")
    axes.set(xticks=range(num_heads), yticks=range(num_layers))
    figure.colorbar(cells, label="nats")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Summary.Image(encoded_image_string=buffer.getvalue())


def _start_wandb(workdir: Path) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError("Weights & Biases was asked for but is not installed: run `pip install wandb`") from None
    try:
        run_id = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
        run = wandb.init(project="jax_entropy", name=workdir.name, id=run_id, resume="allow", dir=workdir)
    except wandb.Error as error:
        raise UserError(f"Weights & Biases did not start ({error}): set WANDB_MODE=offline or leave it out") from error
    run.define_metric("*", step_metric="step")
    return run
