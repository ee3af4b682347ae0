"""Writes what a run measured: metrics.jsonl, a TensorBoard event file and, if asked for, Weights & Biases.

Every line is on disk when `write` returns, and a resumed run continues the file as if it had never been stopped.
"""

import contextlib
import hashlib
import importlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from matplotlib.image import imsave
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

from jax_entropy.errors import UserError
from jax_entropy.runs.metrics import drop_lines_after
from jax_entropy.runs.workdir import Workdir, to_json

_SQUARE = 16  # pixels of a head in a picture


class MetricsWriter:
    """Appends the metrics of one run to the files in its workdir; meant for process 0 alone.

    Args:
      workdir: the run's folder, made if it is missing.
      wandb: the run's configuration, to log with it to Weights & Biases too, in the mode that WANDB_MODE says.
      first_step: the step a resumed run goes on from: later lines, of a killed run, are dropped; 0 starts afresh.
    Raises:
      UserError: the workdir cannot be written, or W&B is not installed or does not start.
    """

    def __init__(self, workdir: str | Path, *, wandb: Mapping[str, Any] | None = None, first_step: int = 0) -> None:
        self._workdir = Workdir(Path(workdir).absolute())
        self._wandb = _start_wandb(self._workdir.path, wandb) if wandb else None
        with self._failures_explained(), contextlib.ExitStack() as opened:
            if self._wandb is not None:
                opened.callback(self._wandb.finish)
            self._workdir.path.mkdir(parents=True, exist_ok=True)
            if self._workdir.metrics.exists():
                drop_lines_after(self._workdir.metrics, first_step)
            self._lines = opened.enter_context(self._workdir.metrics.open("ab", buffering=0))
            # tensorboardX's SummaryWriter hands events to a thread that dies of a full disk and then blocks the run.
            self._events = EventsWriter(str(self._workdir.events), f".{time.time_ns()}")
            opened.callback(self._events.close)
            # TensorBoard hides what an earlier event file says about the steps from here on.
            restart = Event(step=first_step + 1 if first_step else 0, session_log=SessionLog(status=SessionLog.START))
            self._events.write_event(restart)
            self._events.flush()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line.

        TensorBoard and W&B get each number: [L] as `name/layer`, [L, N] as `name/layer/head`, those of an evaluation
        under `evaluate/`. TensorBoard also gets the head entropies as a histogram, and an evaluation's as a picture.

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
            prefix = "evaluate/" if line.get("kind") == "evaluate" else ""
            scalars = {
                prefix + tag: number
                for name, value in line.items()
                if name != "step"
                for tag, number in _scalars(value, name)
            }
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            if entropy_LxN := line.get("head_entropy"):
                most = prefix and line.get("maximum_causal")
                values += _pictures(f"{prefix}head_entropy", np.array(entropy_LxN, float), most)
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log(scalars | {"step": step})

    def close(self) -> None:
        """Closes the files; nothing is waiting to be written."""
        with self._failures_explained():
            self._opened.close()

    @contextlib.contextmanager
    def _failures_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"the metrics could not be written in {str(self._workdir.path)!r}: {reason}") from error


def _scalars(value: Any, tag: str) -> Iterator[tuple[str, float]]:
    """Tag and value of every number, as in ("layer_entropy/3", 1.25); None (not finite) is left out."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _scalars(child, f"{tag}/{name}")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _scalars(child, f"{tag}/{index}")
    elif isinstance(value, (int, float)):
        yield tag, value


def _pictures(tag: str, entropy_LxN: np.ndarray, maximum_L: list[float] | None) -> Iterator[Summary.Value]:
    """A histogram over all heads; of an evaluation, which knows the most that they can have, also a square a head."""
    finite = entropy_LxN[np.isfinite(entropy_LxN)]
    if finite.size:
        counts, edges = np.histogram(finite, bins=20)
        histogram = HistogramProto(
            min=finite.min(), max=finite.max(), num=finite.size, sum=finite.sum(), sum_squares=np.sum(finite**2),
            bucket_limit=edges[1:], bucket=counts,
        )  # fmt: skip
        yield Summary.Value(tag=f"{tag}/heads", histo=histogram)
    if maximum_L:
        buffer = io.BytesIO()
        squares = np.kron(entropy_LxN, np.ones((_SQUARE, _SQUARE)))
        imsave(buffer, squares, vmin=0, vmax=max(maximum_L), cmap="viridis", format="png")
        yield Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=buffer.getvalue()))


def _start_wandb(workdir: Path, config: Mapping[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError("Weights & Biases was asked for but is not installed: run `pip install wandb`") from None
    try:
        run_id = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
        run = wandb.init(
            project="jax_entropy", name=workdir.name, id=run_id, resume="allow", dir=workdir, config=dict(config),
            allow_val_change=True,
        )  # fmt: skip
    except wandb.Error as error:
        raise UserError(f"Weights & Biases did not start ({error}): set WANDB_MODE=offline or leave it out") from error
    run.define_metric("*", step_metric="step")
    return run
