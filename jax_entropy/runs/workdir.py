"""The folder of a run: where its parts lie, whose it is, how far it got, and what it measured.

Nothing here needs JAX: a run is asked about from outside while it has the accelerator.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from jax_entropy import config as configs
from jax_entropy.errors import Diverged, UserError
from jax_entropy.paths import local_path, replacing, writing

if TYPE_CHECKING:
    from jax_entropy.data import Tokenizer

_STEP = re.compile("0|[1-9][0-9]*")

# config.data.tokenizer of a run whose tokenizer came with another model: it lies in the workdir, wherever that is moved
OWN_TOKENIZER = "workdir:tokenizer.json"


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps whose folders lie among a run's checkpoints, damaged or not; an empty folder is a leftover."""
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.iterdir() if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(int(path.name) for path in folders if any(path.iterdir()))


class Workdir:
    """Paths in a run's folder, and what is written there.

    Raises:
      UserError: `path` is no path of this machine.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = local_path(path, "workdir")
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.events = self.path / "events"  # how TensorBoard's files begin
        self.figures = self.path / "figures"
        self.report = self.path / "report.html"
        self.profile = self.path / "profile"
        self.status = self.path / "status.json"
        self.private = self.path / "private.json"
        self.incidents = self.path / "guard.jsonl"
        self.text = self.path / "text"  # how a piece of the held-out text was read at some evaluations
        self.samples = self.path / "samples.json"  # what the trained model wrote
        self.origin = self.path / "origin.json"  # of a run that was started from another model
        self._lock = self.path / "lock"

    @contextlib.contextmanager
    def held(
        self, config: ConfigDict, notify: Callable[[str], None], devices: str = "", command: str = ""
    ) -> Iterator[None]:
        """Keeps the folder for this process's run while it trains on `devices`, and notes how that ends.

        Args:
          command: that the run was asked for with.

        Raises:
          UserError: the folder holds another config's run, is in use, or cannot be written.
        """
        if self.exists():
            try:
                stored = self.read_config()
                complete = stored.train.num_steps in saved_steps(self.checkpoints)
                changed = configs.changes(stored, config, imported=self.imported(), complete=complete)
            except UserError as error:
                raise UserError(
                    f"{self.path} holds a run of another config: {error}; choose another --workdir"
                ) from None
            if changed:
                notify(f"going on with {', '.join(changed)}")
        with writing(self.path, "workdir"):
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        with self._locked():
            self.write_status("starting", *self._progress(config), devices=devices, command=command)
            try:
                yield
            except BaseException as error:
                reason = str(error) if isinstance(error, UserError) else repr(error)
                state = "diverged" if isinstance(error, Diverged) else "failed"
                if isinstance(error, KeyboardInterrupt):  # before the loop, or a second one
                    state, reason = "stopped", ""
                with contextlib.suppress(UserError):  # a full disk must not hide what went wrong
                    self.write_status(state, *self._progress(config), reason)
                raise

    def exists(self) -> bool:
        """Whether a run was started here.

        Raises:
          UserError: this user may not look.
        """
        try:
            return self.config.exists()
        except OSError as error:
            raise UserError(f"workdir={self.path} cannot be read: {error.strerror}") from None

    def has_checkpoint(self) -> bool:
        """Whether a step was saved here, damaged or not."""
        return bool(saved_steps(self.checkpoints))

    def imported(self) -> bool:
        """Whether a model was brought here and nothing was trained since."""
        return saved_steps(self.checkpoints) == [0]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            file = self._lock.open("ab")
        except OSError as error:
            raise UserError(f"workdir={self.path} cannot be locked: {error.strerror}; choose another") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel's: it does not outlive the process
            except BlockingIOError:
                status = self.read_status()
                holder = f"process {status.pid} on {status.host}" if status else "another process"
                raise UserError(f"{self.path} is in use: {holder} trains there; choose another --workdir") from None
            except OSError as error:
                raise UserError(f"workdir={self.path} cannot be locked: {error.strerror}; choose another") from error
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # also where a child process has inherited the file

    def in_use(self) -> bool:
        """Whether a process of this machine trains here.

        Raises:
          UserError: this user may not ask.
        """
        try:
            with self._lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError as error:
            raise UserError(f"{self._lock} cannot be read: {error.strerror}") from None
        return False

    def _progress(self, config: ConfigDict) -> tuple[int, int]:
        status = self.read_status()
        return (status.step if status else 0), config.train.num_steps

    def write_status(
        self, state: str, step: int, num_steps: int, reason: str = "", devices: str = "", command: str = ""
    ) -> None:
        """Notes where the run is, for `read_status`; each process begins with "starting".

        Raises:
          UserError: the disk is full.
        """
        now, before = time.time(), self.read_status()
        seconds = before.seconds + (0 if state == "starting" else max(now - before.time, 0)) if before else 0.0
        status = Status(
            state, step, num_steps, reason, now, os.getpid(), socket.gethostname(),
            started=(before and before.started) or now,
            seconds=seconds,
            versions=_versions() if state == "starting" or not before else before.versions,
            devices=devices or (before.devices if before else ""),
            command=(before.command if before else "") or command,
        )  # fmt: skip
        with writing(self.path, "workdir"), replacing(self.status) as file:
            file.write_text(json.dumps(status._asdict()))

    def read_status(self) -> "Status | None":
        """What was noted last, None if nothing whole was.

        Raises:
          UserError: this user may not read it.
        """
        try:
            status = Status(**json.loads(self.status.read_text()))
        except PermissionError as error:
            raise UserError(f"{self.status} cannot be read: {error.strerror}") from None
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        whole = all(isinstance(value, type(like)) for value, like in zip(status, _NO_STATUS, strict=True))
        return status if whole else None

    def add_incident(self, incident: Mapping[str, Any]) -> None:
        """Appends what the guard saw to guard.jsonl.

        Raises:
          UserError: the disk is full.
        """
        with writing(self.path, "workdir"), self.incidents.open("a") as file:
            file.write(json.dumps(to_json(incident)) + "\n")

    def write_samples(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        """Keeps what the model of `step` wrote after a prompt.

        Raises:
          UserError: the disk is full.
        """
        with writing(self.path, "workdir"), replacing(self.samples) as file:
            file.write_text(json.dumps(dict(step=step, prompt=prompt, texts=list(texts))))

    def claim(self, config: ConfigDict, tokenizer: "Tokenizer | None") -> None:
        """Makes the folder this config's run; from now on no other config may train here."""
        with writing(self.path, "workdir"):
            self.path.mkdir(parents=True, exist_ok=True)
            if tokenizer and not self.tokenizer.exists():
                with replacing(self.tokenizer) as file:
                    tokenizer.save(file)
            with replacing(self.config) as file:
                file.write_text(configs.to_json(config))

    def read_config(self) -> ConfigDict:
        """The run's config.

        Raises:
          UserError: there is no run here or the file is damaged.
        """
        try:
            text = self.config.read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path} holds no run: {self.config} is missing; train one with --workdir") from None
        except OSError as error:
            raise UserError(f"{self.config} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.config} is damaged ({error}); restore it") from None
        try:
            return configs.from_json(text)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None


RUNNING = ("starting", "training")  # states in which a process has the run, unless it died


class Status(NamedTuple):
    """Where a run is: its state (starting, training, stopped, complete, diverged, failed) and since when."""

    state: str
    step: int
    num_steps: int
    reason: str  # why it diverged or failed
    time: float  # Unix seconds
    pid: int
    host: str
    started: float = 0.0  # when the first process began, in Unix seconds; 0: not known
    seconds: float = 0.0  # that processes trained here, all together
    versions: Mapping[str, str] = {}  # of the process that trained last
    devices: str = ""  # of the same, as in "8 × TPU v5 lite"
    command: str = ""  # that first asked for the run, where it was one


_NO_STATUS = Status("", 0, 0, "", 0.0, 0, "")


def _versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes, and the options that XLA was given."""
    found = dict(Python=platform.python_version())
    for name in ("jax_entropy", "jax", "flax", "optax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if flags := os.environ.get("XLA_FLAGS"):
        found["XLA_FLAGS"] = flags
    return found


def to_json(value: Any) -> Any:
    """Turns numbers, arrays, paths, named tuples, dataclasses and containers into what JSON knows.

    Floats keep seven significant digits, those of float32; NaN and infinities become None.
    """
    if hasattr(value, "_asdict"):
        return to_json(value._asdict())
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(child) for key, child in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple, set)):
        return [to_json(child) for child in value]
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
