"""What a run is made of, and what its training goes on from: a checkpoint, another model, or nothing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_entropy.data import Corpus
from jax_entropy.errors import UserError
from jax_entropy.model import Transformer
from jax_entropy.optimizer import learning_rate_schedule
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.workdir import Workdir
from jax_entropy.state import TrainState, abstract_state, initial_collections, new_state
from jax_entropy.training.warm_start import Source, check_teacher, take_over


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of; nothing of it changes while it trains."""

    config: ConfigDict
    workdir: Workdir
    corpus: Corpus
    model: Transformer
    mesh: Mesh
    checkpointer: Checkpointer
    notify: Callable[[str], None]

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the training state."""
        return abstract_state(self.config, self.model, self.mesh)

    @property
    def state_sharding(self) -> TrainState:
        """A sharding for each leaf of the training state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)


class Start(NamedTuple):
    """The state after a step, what the guard had seen by then, whether that step's evaluation was broken off, and
    whether the state was made of another model."""

    step: int
    state: TrainState
    guard: dict[str, Any] | None = None
    evaluation_due: bool = False
    of_source: bool = False


def find_start(setup: Setup, iterator: grain.DatasetIterator | None, source: Source | None = None) -> Start:
    """Restores or makes what training goes on from.

    Args:
      iterator: of the training data, set to the position of the checkpoint; None where the data is to stay.
      source: another model to start from where there is no checkpoint.
    Raises:
      UserError: every checkpoint is damaged or another model's, or the corpus is not the one that was trained on.
    """
    setup.checkpointer.take_back()
    step = setup.checkpointer.latest_step()
    # 1. Resumed: the newest good checkpoint, and the data that comes after it.
    if step:
        return _restored(setup, step, iterator)
    # 2. Imported: a checkpoint of step 0 holds a model that has not read any data.
    if step == 0:
        return _restored(setup, 0, None)
    # 3. Warm start: what fits of another model.
    if source is not None:
        return _warm_start(setup, source)
    # 4. Fresh.
    return Start(0, new_state(setup.config, setup.model, setup.mesh, setup.state_sharding))


def _restored(setup: Setup, step: int, iterator: grain.DatasetIterator | None) -> Start:
    state, meta = setup.checkpointer.restore(step, setup.abstract_state, iterator)
    if step and meta["corpus"] != setup.corpus.fingerprint:
        raise UserError(
            f"the corpus of {setup.config.data.source} has changed since {setup.workdir.path} was started "
            f"({meta['corpus']} then, {setup.corpus.fingerprint} now); restore it or start in another workdir"
        )
    before = meta["config"]["train"]["num_steps"]
    if step and before != setup.config.train.num_steps:
        setup.notify(
            f"the run of {before} steps gets {setup.config.train.num_steps}: from step {step} on its learning rate is "
            f"that of the longer schedule, {_learning_rate(setup.config, step):.3g}"
        )
    return Start(step, state, meta["guard"], meta.get("evaluation_due", False))


def _learning_rate(config: ConfigDict, step: int) -> float:
    return float(learning_rate_schedule(config.optimizer, config.train.num_steps)(step))


def _warm_start(setup: Setup, source: Source) -> Start:
    same_tokens = source.tokenizer is None or source.tokenizer.digest() == setup.corpus.tokenizer.digest()
    variables, origin = take_over(source, setup.model, setup.config.seed, same_tokens=same_tokens)
    if jax.process_index() == 0:
        origin.write(setup.workdir)
    for line in origin.lines():
        setup.notify(line)

    def place(value: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])

    abstract, collections = setup.abstract_state, initial_collections(setup.config, setup.model, variables)
    if "teacher" in collections:
        beside = {name: of for name, of in collections.items() if name != "teacher"}
        check_teacher(source, setup.model, {"params": variables["params"]} | beside, origin)
    state = new_state(setup.config, setup.model, setup.mesh, setup.state_sharding)._replace(
        params=jax.tree.map(place, variables["params"], abstract.params),
        collections=jax.tree.map(place, collections, abstract.collections),
    )
    return Start(0, state, of_source=True)
