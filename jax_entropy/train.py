"""Training a run from its config to its report; started again, it goes on where its last checkpoint left it.

Every process of a pod runs this same function. A step never waits for its metrics: those of step n−1 are fetched after
step n was launched.
"""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_entropy import data
from jax_entropy.checkpoint import Checkpointer
from jax_entropy.config import check, model_config
from jax_entropy.errors import UserError
from jax_entropy.evaluate import evaluate
from jax_entropy.model import Transformer
from jax_entropy.optimizer import learning_rate_schedule
from jax_entropy.sharding import batch_sharding, config_mesh, tree_sharding
from jax_entropy.state import TrainState, init_state, make_train_step
from jax_entropy.workdir import Workdir
from jax_entropy.writer import MetricsWriter


class Result(NamedTuple):
    """How training ended: steps done, the step it went on from, and the last evaluation, None if there was none yet."""

    step: int
    start: int
    model: Transformer
    variables: Any
    corpus: data.Corpus
    evaluation: dict[str, Any] | None


def train(config: ConfigDict, path: str, notify: Callable[[str], None] = print) -> Result:
    """Trains the run of `config` in the workdir `path`.

    Args:
      notify: is told, one line at a time, how training goes; on process 0 only.
    Raises:
      UserError: for a config, workdir, corpus or checkpoint that cannot work, and when the loss is no longer finite.
    """
    lead = jax.process_index() == 0
    notify = notify if lead else lambda line: None
    check(config)
    mesh = config_mesh(config)
    workdir = Workdir(path)
    if lead:
        workdir.check(config)
    # traced, not run: what cannot work is found before the corpus is prepared
    rehearsal = Transformer(model_config(config, config.model.vocab_size or 1))
    jax.eval_shape(functools.partial(init_state, config, rehearsal))
    corpus = _corpus(config)
    model = Transformer(model_config(config, corpus.tokenizer.vocab_size))
    notify(f"{config.architecture}: {_describe(config, model, corpus, mesh)}")

    state_sharding, state_shape = _abstract_state(config, model, mesh)
    iterator = _iterator(config, corpus)
    if lead:
        workdir.claim(config, corpus.tokenizer)
    with Checkpointer(workdir.checkpoints, keep=config.train.keep, notify=notify) as checkpointer:
        start = checkpointer.latest_step() or 0
        if start:
            abstract = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state_shape, state_sharding
            )
            state, meta = checkpointer.restore(start, abstract, iterator)
            if meta["corpus"] != corpus.fingerprint:
                raise UserError(
                    f"the corpus of {config.data.source} has changed since {workdir.path} was started "
                    f"({meta['corpus']} then, {corpus.fingerprint} now); restore it or start in another --workdir"
                )
            notify(f"resumed at step {start} of {config.train.num_steps}")
        else:
            with jax.set_mesh(mesh):
                state = jax.jit(functools.partial(init_state, config, model), out_shardings=state_sharding)()
        loop = _Loop(config, workdir, corpus, model, mesh, state_sharding, checkpointer, notify)
        return loop.run(state, iterator, start)


class _Loop:
    """The steps of a run, from a restored or fresh state to the last step or a signal."""

    def __init__(self, config, workdir, corpus, model, mesh, state_sharding, checkpointer, notify):
        self.config, self.workdir, self.corpus, self.model, self.mesh = config, workdir, corpus, model, mesh
        self.checkpointer, self.notify = checkpointer, notify
        self.batch_sharding = batch_sharding(mesh)
        self.train_step = jax.jit(
            make_train_step(config, model),
            static_argnums=2,
            donate_argnums=0,
            in_shardings=(state_sharding, self.batch_sharding),
            out_shardings=(state_sharding, NamedSharding(mesh, PartitionSpec())),
        )
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train.num_steps)
        self.byte_lengths = corpus.tokenizer.byte_lengths()
        self.watched: dict[str, Any] | None = None  # the last entropies seen
        self.evaluation: dict[str, Any] | None = None

    def run(self, state: TrainState, iterator, start: int) -> Result:
        options, signals = self.config.train, _Signals()
        lead = jax.process_index() == 0
        self.writer = MetricsWriter(self.workdir.path, wandb=options.wandb, first_step=start) if lead else None
        self.clock = _Clock(self.config, self.model, start)
        pending, step = None, start
        with signals, jax.set_mesh(self.mesh):
            while step < options.num_steps and not signals.stop(step, options.log_every):
                step += 1
                tokens = self._place(next(iterator)["tokens"])
                watch = step in (1, options.num_steps) or step % options.log_every == 0
                state, metrics = self.train_step(state, tokens, watch)
                if pending:
                    self._report(*pending)
                pending = (step, metrics, watch)
                last = step == options.num_steps
                evaluates, saves = (
                    last or step % options.evaluate_every == 0,
                    last or step % options.checkpoint_every == 0,
                )
                if evaluates or saves:
                    pending = self._report(*pending)  # nothing is saved before its loss is known to be finite
                    with self.clock.paused():
                        if evaluates:
                            self.evaluation = self._evaluate(step, state)
                        if saves:
                            self._save(step, state, iterator)
                self.checkpointer.poll()
            if pending:  # stopped between two checkpoints
                self._report(*pending)
                self._save(step, state, iterator)
        if self.writer:
            self.writer.close()
        variables = state.variables
        if jax.process_count() > 1:
            variables = multihost_utils.process_allgather(variables, tiled=True)
        return Result(step, start, self.model, variables, self.corpus, self.evaluation)

    def _place(self, rows: np.ndarray) -> jax.Array:
        """This process's rows of a batch as part of the whole."""
        return jax.make_array_from_process_local_data(self.batch_sharding, rows)

    def _report(self, step: int, metrics: dict[str, Any], watch: bool) -> None:
        """Checks a step's loss, and writes and prints what was watched."""
        metrics = jax.device_get(metrics)
        not_finite = metrics.pop("not_finite")
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(self._post_mortem(step, loss, norm, not_finite))
        if not watch:
            return
        self.watched = metrics
        metrics |= dict(
            kind="train",
            perplexity=math.exp(min(float(metrics["cross_entropy"]), 700)),
            learning_rate=float(self.learning_rate(step - 1)),
            tokens_per_second=self.clock.tokens_per_second(step),
        )
        if self.writer:
            self.writer.write(step, metrics)
        self.notify(self.clock.line(step, metrics))

    def _post_mortem(self, step: int, loss: float, norm: float, not_finite: np.ndarray) -> str:
        what = "loss" if not math.isfinite(loss) else "gradient"
        layers = np.flatnonzero(not_finite)
        where = f"first in layer {layers[0]}" if layers.size else "with every layer's attention still finite"
        seen = ""
        if self.watched is not None:
            entropy = " ".join(f"{x:.2f}" for x in self.watched["layer_entropy"])
            largest = " ".join(f"{x:.3g}" for x in self.watched["max_logit"])
            seen = f"; before it the mean entropies by layer were {entropy} nats and the largest logits {largest}"
        kept = self.checkpointer.latest_step()
        kept = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint had been saved yet"
        return (
            f"the {what} is not finite at step {step} ({where}){seen}; {kept}; "
            f"lower config.optimizer.learning_rate={self.config.optimizer.learning_rate} or add normalisation"
        )

    def _evaluate(self, step: int, state: TrainState) -> dict[str, Any]:
        options = self.config.train
        batches = data.validation_batches(
            self.corpus,
            batch_size=options.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            max_chunks=options.evaluate_chunks,
        )
        placed = (tuple(map(self._place, batch)) for batch in batches)
        evaluation = evaluate(self.model, state.variables, placed, self.byte_lengths)
        if self.writer:
            self.writer.write(step, {"kind": "evaluate", **evaluation})
        self.notify(
            f"step {step} · held out: perplexity {evaluation['validation_perplexity']:.2f}, "
            f"{evaluation['bits_per_byte']:.3f} bits per byte"
        )
        return {"step": step, **evaluation}

    def _save(self, step: int, state: TrainState, iterator) -> None:
        evaluated = self.evaluation is not None and self.evaluation["step"] == step
        self.checkpointer.save(
            step,
            state,
            iterator,
            meta=dict(config=self.config.to_dict(), corpus=self.corpus.fingerprint),
            validation_loss=self.evaluation["validation_loss"] if evaluated else None,
        )


class _Clock:
    """Tokens per second and time left, not counting evaluation and saving."""

    def __init__(self, config: ConfigDict, model: Transformer, start: int):
        self.num_steps, self.log_every = config.train.num_steps, config.train.log_every
        self.tokens = config.train.batch_size * config.optimizer.accumulate * model.config.context_length
        self.step, self.time, self.rate = start, time.perf_counter(), math.nan

    @contextlib.contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        self.time += time.perf_counter() - begin

    def tokens_per_second(self, step: int) -> float:
        now = time.perf_counter()
        if step > self.step:
            self.rate = (step - self.step) * self.tokens / max(now - self.time, 1e-9)
            self.step, self.time = step, now
        return self.rate

    def line(self, step: int, metrics: dict[str, Any]) -> str:
        left = (self.num_steps - step) * self.tokens / self.rate
        return (
            f"step {step}/{self.num_steps} · loss {metrics['loss']:.3f} · perplexity {metrics['perplexity']:.1f} · "
            f"entropy {np.mean(metrics['head_entropy']):.2f} nats · collapse {metrics['collapse']:.0%} · "
            f"overload {metrics['overload']:.0%} · {self.rate:,.0f} tokens/s · {left // 60:.0f}:{left % 60:02.0f} left"
        )


class _Signals:
    """Turns SIGTERM and Ctrl-C into a wish to stop after the current step; a second one is obeyed at once."""

    def __enter__(self):
        self.wanted = False
        self.previous = {number: signal.signal(number, self._want) for number in (signal.SIGINT, signal.SIGTERM)}

    def _want(self, number, frame):
        self.wanted = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def stop(self, step: int, every: int) -> bool:
        """Whether to stop; processes agree, at steps that log."""
        if jax.process_count() == 1:
            return self.wanted
        return step % every == 0 and bool(np.any(multihost_utils.process_allgather(np.array(self.wanted))))


def _corpus(config: ConfigDict) -> data.Corpus:
    """The prepared corpus; where processes share a disk, the first prepares it and the others find it."""
    if jax.process_count() > 1 and jax.process_index() > 0:
        multihost_utils.sync_global_devices("corpus prepared")
        return data.prepare(config.data, config.model.context_length)
    corpus = data.prepare(config.data, config.model.context_length)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("corpus prepared")
    return corpus


def _iterator(config: ConfigDict, corpus: data.Corpus):
    return data.train_iterator(
        corpus,
        batch_size=config.train.batch_size * config.optimizer.accumulate,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )


def _abstract_state(config: ConfigDict, model: Transformer, mesh: Mesh):
    shape = jax.eval_shape(functools.partial(init_state, config, model))
    return tree_sharding(shape, mesh, config.mesh.rules), shape


def _describe(config: ConfigDict, model: Transformer, corpus: data.Corpus, mesh: Mesh) -> str:
    size = jax.eval_shape(functools.partial(init_state, config, model)).params
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(size))
    return (
        f"{count / 1e6:.2f} M parameters, {corpus.num_train_chunks:,} chunks of {corpus.context_length} tokens from "
        f"{config.data.source}, {'×'.join(map(str, mesh.shape.values()))} devices (data×fsdp×tensor)"
    )
