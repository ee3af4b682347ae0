"""The trained model in a run's folder."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jax_entropy.config import model_config
from jax_entropy.data import Tokenizer, load_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.model import Transformer
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.workdir import Workdir
from jax_entropy.state import TrainState, init_state


class Run(NamedTuple):
    """A trained run, loaded."""

    config: ConfigDict
    model: Transformer
    variables: Any
    tokenizer: Tokenizer
    step: int


def load_run(path: str | Path, notify: Callable[[str], None] = print, *, best: bool = False) -> Run:
    """The model of a workdir's newest good checkpoint, or of the best by validation loss.

    Raises UserError if there is no run, no checkpoint, or none that is undamaged.
    """
    workdir = Workdir(path)
    config = workdir.read_config()
    if not workdir.tokenizer.exists():
        raise UserError(f"{workdir.path} has no tokenizer.json; the run stopped before it trained")
    tokenizer = load_tokenizer(workdir.tokenizer)
    model = Transformer(model_config(config, tokenizer.vocab_size))
    state, step = load_state(workdir, config, model, notify, best=best)
    return Run(config, model, state.variables, tokenizer, step)


def load_state(
    workdir: Workdir, config: ConfigDict, model: Transformer, notify: Callable[[str], None], *, best: bool = False
) -> tuple[TrainState, int]:
    """The training state in a workdir's newest good checkpoint, or the best by validation loss, and its step.

    Raises UserError if there is no checkpoint, or none that is undamaged.
    """
    abstract = jax.eval_shape(functools.partial(init_state, config, model))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    nothing = UserError(f"{workdir.path} has no checkpoint yet; train it first")
    if not workdir.checkpoints.is_dir():
        raise nothing
    with Checkpointer(workdir.checkpoints, notify=notify) as checkpointer:
        step = checkpointer.best_step() if best else checkpointer.latest_step()
        if step is None:
            raise nothing
        return checkpointer.restore(step, abstract, None)[0], step
