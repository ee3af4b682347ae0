"""The folder of a run: where its parts lie, whose it is, and the trained model in it."""

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from jax_entropy.config import changes, from_json, to_json
from jax_entropy.data import Tokenizer
from jax_entropy.errors import UserError
from jax_entropy.training import writer


class Workdir:
    """Paths in a run's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.figures = self.path / "figures"
        self.profile = self.path / "profile"
        self.status = self.path / "status.json"
        self.private = self.path / "private.json"
        self.incidents = self.path / "guard.jsonl"

    @contextlib.contextmanager
    def held(self, config: ConfigDict, notify: Callable[[str], None], devices: str = "") -> Iterator[None]:
        """Keeps the folder for this process's run while it trains on `devices`, and notes how that ends.

        Raises UserError if the folder holds another config's run, is in use, or cannot be written.
        """
        if self.config.exists():
            try:
                changed = changes(from_json(self.read_config_text()), config, imported=self._imported())
            except UserError as error:
                raise UserError(
                    f"{self.path} holds a run of another config: {error}; choose another --workdir"
                ) from None
            if changed:
                notify(f"going on with {', '.join(changed)}")
        with self._written():
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        with self._locked():
            self.write_status("starting", *self._progress(config), devices=devices)
            try:
                yield
            except BaseException as error:
                reason = str(error) if isinstance(error, UserError) else repr(error)
                with contextlib.suppress(UserError):  # a full disk must not hide what went wrong
                    self.write_status("failed", *self._progress(config), reason)
                raise

    def _imported(self) -> bool:
        """Whether `convert` made the folder and nothing was trained here since."""
        return self.checkpoints.is_dir() and [path.name for path in self.checkpoints.iterdir()] == ["0"]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self.path / "lock")  # the kernel's: it does not outlive the process
        try:
            lock.acquire(blocking=False)
        except Timeout:
            status = self.read_status()
            holder = f"process {status.pid} on {status.host}" if status else "another process"
            raise UserError(f"{self.path} is in use: {holder} trains there; choose another --workdir") from None
        except OSError as error:
            raise UserError(f"--workdir={self.path} cannot be locked: {error.strerror}; choose another") from error
        try:
            yield
        finally:
            lock.release()

    def in_use(self) -> bool:
        """Whether a process of this machine trains here."""
        lock = FileLock(self.path / "lock")
        try:
            with lock.acquire(blocking=False):
                return False
        except Timeout:
            return True

    def _progress(self, config: ConfigDict) -> tuple[int, int]:
        status = self.read_status()
        return (status.step if status else 0), config.train.num_steps

    def write_status(self, state: str, step: int, num_steps: int, reason: str = "", devices: str = "") -> None:
        """Notes where the run is, for `read_status`; each process begins with "starting". Raises UserError if the disk
        is full."""
        now, before = time.time(), self.read_status()
        seconds = before.seconds + (0 if state == "starting" else max(now - before.time, 0)) if before else 0.0
        status = Status(
            state, step, num_steps, reason, now, os.getpid(), socket.gethostname(),
            started=before and before.started or now,
            seconds=seconds,
            versions=_versions() if state == "starting" or not before else before.versions,
            devices=devices or (before.devices if before else ""),
        )  # fmt: skip
        with self._written():
            partial = self.path / "partial"
            partial.write_text(json.dumps(status._asdict()))
            partial.replace(self.status)

    def read_status(self) -> "Status | None":
        """What was noted last, None if nothing whole was."""
        try:
            return Status(**json.loads(self.status.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def add_incident(self, incident: dict[str, Any]) -> None:
        """Appends what the guard saw to guard.jsonl. Raises UserError if the disk is full."""
        with self._written(), self.incidents.open("a") as file:
            file.write(json.dumps(writer.to_json(incident)) + "\n")

    def claim(self, config: ConfigDict, tokenizer: Tokenizer | None) -> None:
        """Makes the folder this config's run; from now on no other config may train here."""
        with self._written():
            self.path.mkdir(parents=True, exist_ok=True)
            partial = self.path / "partial"  # files appear whole or not at all
            if tokenizer and not self.tokenizer.exists():
                tokenizer.save(partial)
                partial.replace(self.tokenizer)
            partial.write_text(to_json(config))
            partial.replace(self.config)

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"--workdir={self.path} cannot be written: {error.strerror}; choose another") from error

    def read_config_text(self) -> str:
        """config.json. Raises UserError if there is no run here or the file is damaged."""
        try:
            text = self.config.read_text()
            json.loads(text)["architecture"]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path} holds no run: {self.config} is missing; train one with --workdir") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config} is damaged ({error}); restore it or choose another --workdir") from None
        return text


class Status(NamedTuple):
    """Where a run is: its state (starting, training, stopped, complete, failed) and since when, in Unix seconds."""

    state: str
    step: int
    num_steps: int
    reason: str  # why it failed
    time: float
    pid: int
    host: str
    started: float = 0.0  # when the first process began, in Unix seconds; 0: not known
    seconds: float = 0.0  # that processes trained here, all together
    versions: dict[str, str] | None = None  # of the process that trained last
    devices: str = ""  # of the same, as in "8 × TPU v5 lite"


def _versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    found = dict(Python=platform.python_version())
    for name in ("jax_entropy", "jax", "flax", "optax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
