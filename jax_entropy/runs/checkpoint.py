"""Saves and restores a training run through Orbax: in the background, the newest few steps and the best one.

A step gets its name only once it was read back and a manifest of hashes lies in it: a killed save never counts, no
changed byte restores.
"""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jax_entropy.errors import UserError, nearest
from jax_entropy.manifest import damage, seal
from jax_entropy.runs.orbax import Alias, leaves, quieten, reads_back, storage_failure, stored_leaves
from jax_entropy.runs.workdir import saved_steps

PyTree = Any

_LEFTOVER = re.compile(r"[0-9]+\.(unfinished|removed|orbax-checkpoint-tmp)")
_NOTHING_SAVED, _ALL_DAMAGED = -1, -2


class Checkpointer:
    """The checkpoints of one run: a folder a step, named by its number.

    All processes of a run call the same methods in the same order; process 0 hashes, verifies, renames and deletes.

    Args:
      directory: where the steps lie; made by the first save.
      keep: how many of the newest good steps to keep; the one of the lowest validation loss stays besides.
      notify: receives one sentence about each damaged step, and about leftovers that were removed.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, notify: Callable[[str], None] = print) -> None:
        if keep < 1:
            raise UserError(f"at least 1 checkpoint must be kept, not {keep}")
        quieten()
        self._directory = Path(directory).absolute()
        self._place = repr(str(self._directory))
        self._alias = Alias(self._directory)
        self._keep = keep
        self._notify = notify
        # Folders made in the background would hold a failed save, and with it the exit, for five minutes.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        composite_options = ocp.CompositeOptions(async_options=options)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(composite_options=composite_options),
            async_options=options,
            checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=True, blocking_write=True),
        )
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        self._verified: set[int] = set()
        self._named: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: PyTree,
        iterator: grain.DatasetIterator | None,
        meta: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Starts saving; returns once the device arrays may be changed or donated.

        Once complete, it replaces a step of the same number and removes those of higher ones, which are damaged or
        belong to a line of training that was given up.

        Args:
          step: number of optimizer steps done.
          state: pytree of jax arrays, sharded in any way.
          iterator: of the training data, its state the same on all processes; None saves no position.
          meta: JSON values that come back with the state.
          validation_loss: nats per token; the lowest decides which step is the best.
        Raises:
          UserError: the directory cannot be written, or the disk is full; also for the save before this one.
        """
        self._wait()
        loss = None if validation_loss is None else float(validation_loss)
        items = {"state": ocp.args.StandardSave(state)}
        items["meta"] = ocp.args.JsonSave({"validation_loss": loss, "meta": meta})
        if iterator is not None:
            items["data"] = ocp.args.JsonSave(iterator.get_state())
        with self._failures_explained(step):
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
            self._orbax.save(self._alias.path / f"{step}.unfinished", args=ocp.args.Composite(**items))
        self._saving = self._background.submit(self._finish, step, leaves(state))

    def poll(self) -> None:
        """Looks after a save in the background; costs nothing, call it every step.

        Raises:
          UserError: the disk is full; anything else that the save ran into is raised as it is.
        """
        if self._saving is not None and self._saving.done():
            self._wait()

    def take_back(self) -> None:
        """Names the steps that were saved whole when a kill came before they had their names.

        For the process that has the run: another one might take a step from under its hands.
        """
        self._wait()  # for a save of its own, which names its step itself
        if jax.process_index() == 0 and self._directory.is_dir():
            for path in self._directory.glob("*.unfinished"):
                if not path.with_suffix("").exists() and damage(path) is None:
                    path.rename(path.with_suffix(""))

    def latest_step(self) -> int | None:
        """The newest step whose every byte is as written, None if nothing was saved yet; damaged ones are passed over.

        Raises:
          UserError: steps were saved, and all of them are damaged.
        """
        self._wait()
        found = _from_process_zero(self._find_latest)
        if found == _ALL_DAMAGED:
            raise UserError(
                f"all checkpoints in {self._place} are damaged (steps {', '.join(map(str, self._steps()))}): "
                "put back a copy of one, or start in another workdir"
            )
        return None if found == _NOTHING_SAVED else found

    def best_step(self) -> int | None:
        """The good step of the lowest validation loss, None if none has a finite one."""
        self._wait()
        found = _from_process_zero(self._find_best)
        return None if found == _NOTHING_SAVED else found

    def restore(
        self, step: int, abstract_state: PyTree, iterator: grain.DatasetIterator | None
    ) -> tuple[PyTree, dict[str, Any]]:
        """Reads a step back, on any layout of devices and processes.

        Args:
          step: one that `latest_step` or `best_step` named.
          abstract_state: tree of jax.ShapeDtypeStruct, each with the sharding that its array shall have.
          iterator: a training data iterator to set to the saved position, or None.
        Returns:
          The state and the saved `meta`.
        Raises:
          UserError: no such step, a damaged one, or a tree, shape or dtype other than the saved one.
        """
        self._wait()
        if step not in self._steps():
            choices = nearest(str(step), self._steps()) if self._steps() else ", nor of any other step"
            raise UserError(f"there is no checkpoint of step {step} in {self._place}{choices}")
        if not _from_process_zero(lambda: step in self._verified or self._verify(step)):
            raise UserError(f"the checkpoint of step {step} in {self._place} is damaged: restore another step")
        path = self._alias.path / str(step)
        stored, wanted = stored_leaves(path / "state"), leaves(abstract_state)
        for name in [*wanted, *stored]:  # Orbax would cast another dtype silently and answer another tree with pages
            has, needs = stored.get(name, "nothing"), wanted.get(name, "nothing")
            if has != needs:
                raise UserError(
                    f"the checkpoint of step {step} in {self._place} has {has} for {name}, but this configuration "
                    f"needs {needs}"
                )
        items = {"state": ocp.args.StandardRestore(abstract_state), "meta": ocp.args.JsonRestore()}
        if iterator is not None:
            if not (path / "data").exists():
                raise UserError(f"the checkpoint of step {step} in {self._place} was saved without a data position")
            items["data"] = ocp.args.JsonRestore()
        restored = self._orbax.restore(path, args=ocp.args.Composite(**items))
        if iterator is not None:
            iterator.set_state(restored.data)
        return restored.state, restored.meta["meta"]

    def close(self) -> None:
        """Waits until the last save is complete.

        Raises:
          UserError: that save failed.
        """
        try:
            self._wait()
        finally:
            self._background.shutdown()
            self._orbax.close()
            self._alias.close()

    def _wait(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _finish(self, step: int, saved: dict[str, str]) -> None:
        with self._failures_explained(step):
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            unfinished = self._unfinished(step)
            if not reads_back(self._alias.path / unfinished.name / "state", saved):
                raise OSError("what was written cannot be read back")
            seal(unfinished)
            replaced = self._set_aside(step)
            unfinished.rename(self._directory / str(step))
            if replaced:
                shutil.rmtree(replaced)
            self._verified.add(step)
            self._named.discard(step)
            self._prune(step)

    def _prune(self, newest: int) -> None:
        good = [step for step in self._steps() if step <= newest and (step in self._verified or self._verify(step))]
        kept = set(good[-self._keep :]) | set(self._by_loss(good)[:1])
        for step in sorted(set(self._steps()) - kept):
            self._remove(step)
            if step > newest:
                self._notify(f"removed step {step} in {self._place}, since training went on from an earlier checkpoint")

    def _steps(self) -> list[int]:
        return saved_steps(self._directory)

    def _find_latest(self) -> int:
        steps, named = self._steps(), set(self._named)
        good = next(filter(self._verify, reversed(steps)), None)
        if good is None:
            return _ALL_DAMAGED if steps else _NOTHING_SAVED
        if self._named - named:
            self._notify(f"the checkpoint of step {good} is used instead")
        return good

    def _find_best(self) -> int:
        return next(iter(self._by_loss(list(filter(self._verify, self._steps())))), _NOTHING_SAVED)

    def _by_loss(self, good_steps: list[int]) -> list[int]:
        losses = {step: self._validation_loss(step) for step in good_steps}
        return sorted((step for step, loss in losses.items() if math.isfinite(loss)), key=losses.get)

    def _validation_loss(self, step: int) -> float:
        loss = json.loads((self._directory / str(step) / "meta/metadata").read_text())["validation_loss"]
        return math.nan if loss is None else loss

    def _verify(self, step: int) -> bool:
        found = damage(self._directory / str(step))
        if found is None:
            self._verified.add(step)
            return True
        self._verified.discard(step)
        if step not in self._named:
            self._named.add(step)
            self._notify(f"the checkpoint of step {step} in {self._place} is damaged and not used: {found}")
        return False

    def _unfinished(self, step: int) -> Path:
        return self._directory / f"{step}.unfinished"

    def _remove(self, step: int) -> None:
        if removed := self._set_aside(step):
            shutil.rmtree(removed)

    def _set_aside(self, step: int) -> Path | None:
        """Renames before anything is deleted, so that a kill in between leaves no half of a step; the new name."""
        path = self._directory / str(step)
        self._verified.discard(step)
        return path.rename(path.with_suffix(".removed")) if path.exists() else None

    def _leftovers(self) -> list[Path]:
        """What killed or failed saves and removals leave: 7.unfinished…, 7.removed, an empty 7."""
        folders = [path for path in self._directory.iterdir() if path.is_dir()]
        empty = [path for path in folders if path.name.isdecimal() and not any(path.iterdir())]
        return sorted(empty + [path for path in folders if _LEFTOVER.match(path.name)])

    def _remove_leftovers(self) -> None:
        leftovers = self._leftovers()
        for path in leftovers:
            shutil.rmtree(path)
        if leftovers:
            names = ", ".join(path.name for path in leftovers)
            self._notify(f"removed what an interrupted save left in {self._place}: {names}")

    @contextlib.contextmanager
    def _failures_explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = storage_failure(error)
            if reason is None:
                raise
            if jax.process_index() == 0:
                # A half-written step would keep the disk full.
                for path in self._leftovers() if self._directory.is_dir() else []:
                    shutil.rmtree(path, ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} could not be saved in {self._place}: {reason}; "
                "earlier checkpoints are intact"
            ) from error


def _from_process_zero(find: Callable[[], int]) -> int:
    """What process 0 finds in the directory, on all processes."""
    if jax.process_count() == 1:
        return find()
    return int(multihost_utils.broadcast_one_to_all(np.int32(find() if jax.process_index() == 0 else 0)))
