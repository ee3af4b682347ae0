"""How one run of a sweep ended, read from its workdir without loading it."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_entropy.errors import UserError
from jax_entropy.runs.metrics import read_metrics
from jax_entropy.runs.workdir import Workdir


class Outcome(NamedTuple):
    """What a run came to; figures of a run that is not complete are NaN.

    state: complete; diverged, with the diagnosis as the reason; failed, for any other reason; unfinished.
    """

    state: str
    reason: str = ""
    perplexity: float = math.nan  # held out
    bits_per_byte: float = math.nan
    head_entropy_LxN: np.ndarray | None = None  # held out, nats
    nan_count: int = 0  # row entropies that were not a number, over all steps that were logged
    sent_back: int = 0  # times that the guard sent training back
    seconds: float = 0.0

    @property
    def settled(self) -> bool:
        """Whether running it again would change nothing."""
        return self.state in ("complete", "diverged")


def read_outcome(path: Path) -> Outcome:
    """The outcome of the run in a folder.

    Raises:
      UserError: the run is complete, but what it measured is missing or damaged.
    """
    workdir = Workdir(path)
    status = workdir.read_status()
    if status is None:
        return Outcome("unfinished")
    lines = read_metrics(workdir.metrics)
    known = dict(
        nan_count=int(sum(np.sum(line["nan_count"]) for line in lines if "nan_count" in line)),
        sent_back=len(read_metrics(workdir.incidents)),
        seconds=status.seconds,
    )
    if status.state != "complete":
        state = status.state if status.state in ("diverged", "failed") else "unfinished"
        return Outcome(state, status.reason, **known)
    last = next((line for line in reversed(lines) if line.get("kind") == "evaluate"), None)
    if last is None or last["step"] != status.num_steps:
        raise UserError(
            f"{workdir.metrics} lacks the last evaluation of a complete run; remove {path} to train it anew"
        )
    if last["validation_perplexity"] is None:  # the loss of every step was finite, this one is not
        return Outcome("diverged", "the held-out loss is not finite", **known)
    return Outcome(
        "complete",
        perplexity=last["validation_perplexity"],
        bits_per_byte=last["bits_per_byte"],
        head_entropy_LxN=np.asarray(last["head_entropy"], float),
        **known,
    )
