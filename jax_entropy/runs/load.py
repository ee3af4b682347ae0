"""The trained model in a run's folder."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jax_entropy.annealing import settled, trained_model
from jax_entropy.architecture import ModelConfig
from jax_entropy.config import model_config
from jax_entropy.data import Tokenizer, load_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.model import Transformer
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.workdir import Workdir
from jax_entropy.state import abstract_state


class Run(NamedTuple):
    """A trained run, loaded."""

    workdir: Workdir
    config: ConfigDict
    model: Transformer
    variables: Any
    tokenizer: Tokenizer
    step: int
    corpus: str | None = None  # fingerprint of what it was trained on; None: not here, as far as is known


def load_run(workdir: str | os.PathLike, notify: Callable[[str], None] = print, *, best: bool = False) -> Run:
    """The model of a workdir's newest good checkpoint, or of the best by validation loss.

    Args:
      workdir: the run's folder.
      notify: receives one sentence about each damaged checkpoint.
      best: the checkpoint of the lowest validation loss instead of the newest.
    Raises:
      UserError: there is no run, no checkpoint, none that is undamaged, or for `best` none that was evaluated.
    """
    workdir = Workdir(workdir)
    config = workdir.read_config()
    if not workdir.tokenizer.exists():
        raise UserError(f"{workdir.path} has no tokenizer.json; the run stopped before it trained")
    tokenizer = load_tokenizer(workdir.tokenizer)
    model, variables, step, meta = load_model(workdir, config, tokenizer.vocab_size, notify, best=best)
    return Run(workdir, config, Transformer(model), variables, tokenizer, step, meta.get("corpus"))


def loaded(run: Run | str | os.PathLike, notify: Callable[[str], None], *, best: bool) -> Run:
    """A run that is loaded already as it is, else that of a workdir, as `load_run` makes it.

    Raises:
      UserError: `best` of one that is loaded already; and as `load_run` does.
    """
    if not isinstance(run, Run):
        return load_run(run, notify, best=best)
    if best:
        raise UserError(f"best=True comes too late: step {run.step} is loaded; name the workdir instead")
    return run


def load_model(
    workdir: Workdir, config: ConfigDict, vocab_size: int, notify: Callable[[str], None], *, best: bool = False
) -> tuple[ModelConfig, dict[str, Any], int, dict[str, Any]]:
    """What a run's checkpoint computes: its model and variables, the step, and the checkpoint's notes.

    Raises:
      UserError: as `load_run` does.
    """
    trained, end = trained_model(config, vocab_size), model_config(config, vocab_size)
    abstract = abstract_state(config, Transformer(trained))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    with Checkpointer(workdir.checkpoints, notify=notify) as checkpointer:
        step = checkpointer.best_step() if best else checkpointer.latest_step()
        if step is None:
            unrated = best and workdir.has_checkpoint()
            lacks = "good checkpoint with a finite validation loss; the newest is loaded without best"
            raise UserError(f"{workdir.path} has no {lacks if unrated else 'checkpoint yet; train it first'}")
        state, meta = checkpointer.restore(step, abstract, None)
    return *settled(end, trained, state.variables), step, meta


def own_tokens(workdir: Workdir, config: ConfigDict) -> ConfigDict:
    """`config.data`, with the workdir's own tokenizer in place of one that was named: the folder may have moved."""
    section = config.data.copy_and_resolve_references()
    if section.tokenizer and workdir.tokenizer.exists():
        section.tokenizer = str(workdir.tokenizer)
    return section
