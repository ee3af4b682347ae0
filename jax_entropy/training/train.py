"""Training a run from its config to its report; started again, it goes on where its last checkpoint left it.

Every process of a pod runs this same function.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_entropy import data
from jax_entropy.annealing import settled, trained_model
from jax_entropy.census import census
from jax_entropy.config import check, model_config
from jax_entropy.errors import UserError, check_number
from jax_entropy.model import Transformer
from jax_entropy.paths import replacing, writing
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.load import own_tokens
from jax_entropy.runs.workdir import OWN_TOKENIZER, Workdir
from jax_entropy.sharding import config_mesh
from jax_entropy.state import abstract_state
from jax_entropy.training.loop import Loop
from jax_entropy.training.start import Setup, find_start
from jax_entropy.training.warm_start import Origin, Source, open_source


class Result(NamedTuple):
    """How training ended: steps done, the step it went on from, whether nothing is left to do, and the last evaluation,
    None if there was none."""

    step: int
    start: int
    complete: bool
    model: Transformer
    variables: Any
    corpus: data.Corpus
    evaluation: dict[str, Any] | None


def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    notify: Callable[[str], None] = print,
    *,
    profile: int = 0,
    start_from: str | os.PathLike | None = None,
    command: str = "",
) -> Result:
    """Trains the run of `config` in a workdir, or goes on with it.

    Args:
      config: as `default_config` or a file in `configs/` makes it.
      workdir: the run's folder, made if it is missing.
      start_from: workdir or Hugging Face folder of a model of any architecture or size; what fits of it is taken over,
        and its tokenizer is the run's unless `config.data.tokenizer` names one.
      notify: is told, one line at a time, how training goes; on process 0 only.
      profile: steps to trace into the workdir's folder `profile`, 0: none.
      command: what is noted as the command that made the run.
    Raises:
      UserError: for a config, workdir, corpus or checkpoint that cannot work, for a workdir in use, and when the loss
        is no longer one to train on.
    """
    check(config)
    check_number("profile", profile, 0)
    mesh = config_mesh(config)
    workdir = Workdir(workdir)
    if jax.process_index() > 0:
        notify = _say_nothing
    if not config.data.tokenizer and workdir.exists() and workdir.read_config().data.tokenizer == OWN_TOKENIZER:
        config = config.copy_and_resolve_references()
        config.data.tokenizer = OWN_TOKENIZER
    config, source = open_source(config, workdir, start_from, notify)
    if config.anneal.distillation and not (source or Origin.read(workdir)):
        raise UserError(
            f"config.anneal.distillation={config.anneal.distillation} needs a model to learn from: start from one"
        )
    if jax.process_index() > 0:
        return _train(config, mesh, workdir, source, notify, profile)
    with workdir.held(config, notify, f"{jax.device_count()} × {jax.devices()[0].device_kind}", command):
        if source:  # noted before anything else, so that a run that ends before its first checkpoint begins alike
            Origin(source.name).write(workdir)
            if source.tokenizer and config.data.tokenizer == OWN_TOKENIZER:
                with writing(workdir.tokenizer), replacing(workdir.tokenizer) as file:
                    source.tokenizer.save(file)
        result = _train(config, mesh, workdir, source, notify, profile)
        workdir.write_status("complete" if result.complete else "stopped", result.step, config.train.num_steps)
        return result


def _say_nothing(line: str) -> None:
    pass


def _train(
    config: ConfigDict,
    mesh: Mesh,
    workdir: Workdir,
    source: Source | None,
    notify: Callable[[str], None],
    profile: int,
) -> Result:
    # traced, not run: what cannot work is found before the corpus is prepared
    rehearsal = Transformer(trained_model(config, config.model.vocab_size or mesh.size))  # which every axis divides
    abstract_state(config, rehearsal, mesh)
    corpus = _corpus(config, workdir, notify)
    model = Transformer(trained_model(config, corpus.tokenizer.vocab_size))
    notify(f"{config.architecture}: {_describe(config, model, corpus, mesh)}")

    iterator = _iterator(config, corpus)
    with Checkpointer(workdir.checkpoints, keep=config.train.keep, notify=notify) as checkpointer:
        setup = Setup(config, workdir, corpus, model, mesh, checkpointer, notify)
        start = find_start(setup, iterator, source)
        if jax.process_index() == 0:  # not before it is known that this config can go on with what is there
            workdir.claim(config, corpus.tokenizer)
        if start.of_source:
            checkpointer.save(0, start.state, None, dict(config=config.to_dict(), corpus=None, guard=None))
        if start.step:
            notify(f"resumed at step {start.step} of {config.train.num_steps}")
        end = Loop(setup, profile).run(start, iterator)

    variables = end.state.variables
    if jax.process_count() > 1:
        variables = multihost_utils.process_allgather(variables, tiled=True)
    model, variables = settled(model_config(config, corpus.tokenizer.vocab_size), model.config, variables)
    return Result(end.step, start.step, end.complete, Transformer(model), variables, corpus, end.evaluation)


def _corpus(config: ConfigDict, workdir: Workdir, notify: Callable[[str], None]) -> data.Corpus:
    """The prepared corpus; where processes share a disk, the first prepares it and the others find it."""

    def prepare() -> data.Corpus:
        return data.prepare(own_tokens(workdir, config), config.model.context_length, notify)

    if jax.process_count() > 1 and jax.process_index() > 0:
        multihost_utils.sync_global_devices("corpus prepared")
        return prepare()
    corpus = prepare()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("corpus prepared")
    return corpus


def _iterator(config: ConfigDict, corpus: data.Corpus) -> grain.DatasetIterator:
    return data.train_iterator(
        corpus,
        batch_size=config.train.batch_size * config.optimizer.accumulate,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )


def _describe(config: ConfigDict, model: Transformer, corpus: data.Corpus, mesh: Mesh) -> str:
    millions = census(model.config).parameters / 1e6
    return (
        f"{millions:.2f} M parameters, {corpus.num_train_chunks:,} chunks of {corpus.context_length} tokens from "
        f"{config.data.source}, {'×'.join(map(str, mesh.shape.values()))} devices (data×fsdp×tensor)"
    )
