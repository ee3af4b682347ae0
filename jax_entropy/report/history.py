"""A workdir as arrays: what the run was (config.json) and what it measured (metrics.jsonl).

Nothing here runs on an accelerator: a training process may hold it while its workdir is being read.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_entropy.data.catalog import SOURCES
from jax_entropy.entropy import max_entropy
from jax_entropy.errors import UserError
from jax_entropy.paths import reading
from jax_entropy.runs.metrics import read_metrics
from jax_entropy.runs.reading import Reading, read_text
from jax_entropy.runs.workdir import RUNNING, Status, Workdir

BATCH = "training batch"


@dataclasses.dataclass(frozen=True)
class History:
    """A run as read from its workdir.

    `train` and `evaluate` map a metric's name ("head_entropy", "gradient_norms/attention") to an array whose leading
    axis E is the logged steps, as `train["head_entropy"]` [E, L, N]; what was null is NaN.
    """

    workdir: Workdir
    config: dict[str, Any]
    train: dict[str, np.ndarray]
    evaluate: dict[str, np.ndarray]
    incidents: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # times that the guard sent it back
    status: Status | None = None
    died: bool = False  # no process of this machine trains it, though its status says that one does
    tokenizer: str = ""  # a digest: the losses of two tokenizers are not of the same tokens
    private: dict[str, Any] | None = None  # what `private profile` measured of it, if it did
    text: list[Reading] = dataclasses.field(default_factory=list)  # how held-out text was read, by evaluation
    samples: dict[str, Any] | None = None  # what the trained model wrote: step, prompt, texts
    read: str = BATCH  # what `train` was measured on
    windows: tuple[int, ...] | None = None  # what a query sees in each layer, where the configuration does not say
    pieces: list[list[str]] | None = None  # of the text's tokens, where they are not those of the workdir's tokenizer

    @property
    def architecture(self) -> str:
        return printable(str(self.config.get("architecture") or "unnamed architecture"))

    @property
    def name(self) -> str:
        """The folder's own name, also where it was given as `.`."""
        return printable(self.workdir.path.resolve().name)

    @property
    def dataset(self) -> str:
        """A name to print: the corpus, or the last two parts of the folder or glob that say something."""
        data = self.config.get("data") or {}
        source = str(data.get("source") or "unnamed data")
        files = "/".join([part for part in Path(str(data.get("files") or "")).parts if part != "**"][-2:])
        title = SOURCES[source].title if source in SOURCES else ""
        return title or printable(files[-32:] or source)

    @property
    def steps_E(self) -> np.ndarray:
        return self.train["step"].astype(int)

    @property
    def context_length(self) -> int:
        return int(self.config["model"]["context_length"])

    def layer_maxima(self, kind: str) -> np.ndarray:
        """Upper end of the entropy range of each layer, [L] in nats: of what its rows see, with slots or a window.

        Args:
          kind: "context" or "causal".
        """
        if (logged_ExL := self.train.get(f"maximum_{kind}")) is not None:
            return logged_ExL[-1]
        return np.full(self.train["head_entropy"].shape[1], max_entropy(self.context_length, kind))

    def maxima(self) -> dict[str, float]:
        """Upper ends of the entropy range at the last logged step, in nats, under the names the metrics give them.

        Where layers differ, those of the layer that sees most.
        """
        last_LxN = self.train["head_entropy"][-1]
        return dict(
            observed=float(np.nanmax(last_LxN)) if np.isfinite(last_LxN).any() else math.nan,
            context=float(self.layer_maxima("context").max()),
            causal=float(self.layer_maxima("causal").max()),
        )


def read_history(workdir: str | Path) -> History:
    """Reads a workdir, of a finished run or one still in training.

    Raises:
      UserError: there is no workdir, no config, no training line yet, or a damaged one before the last; or it may not
        be read.
    """
    workdir = Workdir(workdir)
    with reading(workdir.path, "workdir"):
        return _read(workdir)


def _read(workdir: Workdir) -> History:
    if not workdir.path.is_dir():
        raise UserError(f"workdir {str(workdir.path)!r} is not there; give the folder that `jax-entropy train` wrote")
    try:
        config = json.loads(workdir.config.read_text("utf-8"))
        int(config["model"]["context_length"])
    except FileNotFoundError:
        raise UserError(f"workdir {str(workdir.path)!r} has no config.json; it is not the folder of a run") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{str(workdir.config)!r} is damaged: it is not a JSON object with model.context_length"
        ) from None
    lines = read_metrics(workdir.metrics)
    train = _stack([line for line in lines if line.get("kind") == "train"])
    if "head_entropy" not in train:
        raise UserError(
            f"workdir {str(workdir.path)!r} has no training line in metrics.jsonl yet; "
            "the first comes after config.train.log_every steps"
        )
    evaluate = _stack([line for line in lines if line.get("kind") == "evaluate"])
    status = workdir.read_status()
    return History(
        workdir=workdir,
        config=config,
        train=train,
        evaluate=evaluate,
        incidents=read_metrics(workdir.incidents),
        status=status,
        died=has_died(workdir, status),
        tokenizer=_digest(workdir.tokenizer),
        private=_read_private(workdir.private),
        # what was evaluated before the run went back and on another way is of no step of this one
        text=[reading for reading in read_text(workdir.text) if reading.step in evaluate.get("step", ())],
        samples=_read_samples(workdir.samples),
    )


def has_died(workdir: Workdir, status: Status | None) -> bool:
    """Whether a run's process ended without a word, or runs on another machine."""
    if status is None or status.state not in RUNNING:
        return False
    try:
        return not workdir.in_use()
    except UserError:  # this user may not ask
        return False


def printable(text: str, keep: str = "") -> str:
    """What can be drawn and written as UTF-8 of a text that anybody may have chosen, but for characters to `keep`."""
    return "".join(character if character.isprintable() or character in keep else "\ufffd" for character in text)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _read_private(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        measured = json.loads(path.read_text("utf-8"))
        measured["total"]["warm"]["bytes"], measured["setting"]["protocol"], measured["num_tokens"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{str(path)!r} is damaged; measure again with `jax-entropy private profile`") from None
    return measured


def _read_samples(path: Path) -> dict[str, Any] | None:
    """None also where the file is not whole: it is rewritten at the end of training."""
    try:
        samples = json.loads(path.read_text("utf-8"))
        return dict(step=int(samples["step"]), prompt=str(samples["prompt"]), texts=[*map(str, samples["texts"])])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stack(lines: list[dict]) -> dict[str, np.ndarray]:
    rows = [dict(_leaves(line)) for line in lines]
    names = dict.fromkeys(name for row in rows for name in row)
    stacked = {}
    for name in names:
        values = [np.asarray(row.get(name), dtype=float) for row in rows]  # None becomes NaN
        shape = max((value.shape for value in values), key=len)
        stacked[name] = np.stack([value if value.shape == shape else np.full(shape, np.nan) for value in values])
    return stacked


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        elif not isinstance(value, str):
            yield prefix + name, value
