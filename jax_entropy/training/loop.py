"""The steps of a run, from a restored or fresh state to the last step, a signal, or a loss that cannot be trained on.

A step never waits for its metrics: those of step n−1 are fetched after step n was launched.
"""

import math
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_entropy import data
from jax_entropy.census import census
from jax_entropy.errors import UserError
from jax_entropy.evaluate import evaluate
from jax_entropy.model import Transformer
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.workdir import Workdir
from jax_entropy.sharding import batch_sharding
from jax_entropy.state import TrainState, jit_train_step
from jax_entropy.training.clock import Clock
from jax_entropy.training.guard import Anomaly, Guard, diagnose
from jax_entropy.training.writer import MetricsWriter

_PROFILE_AFTER = 10  # steps, so that compilation is over


class Start(NamedTuple):
    """What training goes on from: the state after a step, and what the guard had seen by then."""

    step: int
    state: TrainState
    guard: dict[str, Any] | None


class Loop:
    """Trains one run.

    Args:
      restore: gives the newest good checkpoint, or the state before the first step; the data stays where it is.
      profile: steps to trace, 0: none.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Workdir,
        corpus: data.Corpus,
        model: Transformer,
        mesh: Mesh,
        state_sharding: Any,
        checkpointer: Checkpointer,
        restore: Callable[[], Start],
        notify: Callable[[str], None],
        profile: int,
    ):
        self.config, self.workdir, self.corpus, self.model, self.mesh = config, workdir, corpus, model, mesh
        self.state_sharding, self.checkpointer, self.restore = state_sharding, checkpointer, restore
        self.notify, self.profile = notify, profile
        self.lead = jax.process_index() == 0
        self.batch_sharding = batch_sharding(mesh)
        self.byte_lengths = corpus.tokenizer.byte_lengths()
        self.guard = Guard(config.guard)
        self.watched: dict[str, Any] | None = None  # the last entropies seen
        self.evaluation: dict[str, Any] | None = None

    def run(self, start: Start, iterator) -> tuple[int, TrainState]:
        """Trains to the last step or a signal; returns where it stopped. Raises UserError if it cannot go on."""
        tokens = self.config.train.batch_size * self.config.optimizer.accumulate * self.model.config.context_length
        token_flops = 3 * census(self.model.config).forward_flops / self.model.config.context_length
        self.clock = Clock(self.config.train.num_steps, tokens, token_flops, start.step)
        with _Signals() as signals, jax.set_mesh(self.mesh):
            while True:
                try:
                    return self._advance(start, iterator, signals)
                except Anomaly as anomaly:
                    start = self._go_back(anomaly)

    def _advance(self, start: Start, iterator, signals: "_Signals") -> tuple[int, TrainState]:
        options, (step, state, seen) = self.config.train, start
        if step == options.num_steps:
            return step, state
        self.guard.restore(seen)
        self._compile()
        self.writer = MetricsWriter(self.workdir.path, wandb=options.wandb, first_step=step) if self.lead else None
        self.clock.restart(step)
        pending = None
        self.tracing = False
        while step < options.num_steps and not signals.stop(step, options.log_every):
            step += 1
            self._trace(step - start.step)
            with self.clock.spending("data_wait"):
                rows = next(iterator)["tokens"]
            watch = step in (1, options.num_steps) or step % options.log_every == 0
            state, metrics = self.train_step(state, self._place(rows), watch)
            if pending:
                self._report(*pending)
            self.clock.tick()
            pending = (step, metrics, watch)
            last = step == options.num_steps
            evaluates = last or step % options.evaluate_every == 0
            saves = last or step % options.checkpoint_every == 0
            if evaluates or saves:
                pending = self._report(*pending)  # nothing is saved before its loss is known to be finite
                with self.clock.paused():
                    if evaluates:
                        self.evaluation = self._evaluate(step, state)
                    if saves:
                        self._save(step, state, iterator)
            self.checkpointer.poll()
        self._stop_trace()
        if pending:  # stopped between two checkpoints
            self._report(*pending)
            self._save(step, state, iterator)
        if self.writer:
            self.writer.close()
        return step, state

    def _compile(self) -> None:
        """The step at the learning rate that the guard allows; jit compiles it when it is first called."""
        config = self.config.copy_and_resolve_references()
        config.optimizer.learning_rate *= self.guard.learning_rate_scale
        self.train_step = jit_train_step(config, self.model, self.mesh, self.state_sharding)

    def _trace(self, steps: int) -> None:
        """Traces the steps that were asked for."""
        if self.profile and steps == _PROFILE_AFTER:
            jax.profiler.start_trace(self.workdir.profile)
            self.tracing = True
        if self.tracing and steps == _PROFILE_AFTER + self.profile:
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False
            self.notify(f"traced in {self.workdir.profile}")

    def _place(self, rows: np.ndarray) -> jax.Array:
        """This process's rows of a batch as part of the whole."""
        return jax.make_array_from_process_local_data(self.batch_sharding, rows)

    def _report(self, step: int, metrics: dict[str, Any], watch: bool) -> None:
        """Checks a step's loss, and writes and prints what was watched. Raises Anomaly."""
        metrics = jax.device_get(metrics)
        with self.clock.spending("monitoring"):
            self.guard.check(step, metrics)
            if watch:
                self._write(step, metrics)

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        del metrics["not_finite"]
        self.watched = metrics
        metrics |= dict(
            kind="train",
            perplexity=math.exp(min(float(metrics["cross_entropy"]), 700)),
            **self.clock.read(step),
        )
        if self.writer:
            self.writer.write(step, metrics)
            self.workdir.write_status("training", step, self.config.train.num_steps)
        self.notify(self.clock.line(step, metrics))

    def _go_back(self, anomaly: Anomaly) -> Start:
        """To the last good state, with the data that comes next: what led to the anomaly is not read again."""
        self._stop_trace()
        if self.writer:
            self.writer.close()
        attempt, options = self.guard.attempts + 1, self.config.guard
        what = f"{anomaly.what} ({diagnose(anomaly, self.watched, self.model.config.context_length)})"
        if attempt > options.limit:
            kept = self.checkpointer.latest_step()
            kept = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint had been saved yet"
            tried = f"; training was sent back {options.limit} times" if options.limit else ""
            raise UserError(
                f"{what}{tried}; {kept}; "
                f"lower config.optimizer.learning_rate={self.config.optimizer.learning_rate} or add normalisation"
            )
        start = self.restore()
        guard = (start.guard or {"losses": []}) | {"attempts": attempt}
        self.notify(
            f"{what}; back to step {start.step}, without the data of steps {start.step + 1} to {anomaly.step}, "
            f"learning rate ×{options.learning_rate_factor**attempt:.3g} (attempt {attempt} of {options.limit})"
        )
        if self.lead:
            self.workdir.add_incident(
                dict(step=anomaly.step, what=what, attempt=attempt, back_to=start.step, before=self.watched)
            )
        return start._replace(guard=guard)

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
            meta=dict(config=self.config.to_dict(), corpus=self.corpus.fingerprint, guard=self.guard.state()),
            validation_loss=self.evaluation["validation_loss"] if evaluated else None,
        )


class _Signals:
    """Turns SIGTERM and Ctrl-C into a wish to stop after the current step; a second one is obeyed at once."""

    def __enter__(self):
        self.wanted = False
        self.previous = {number: signal.signal(number, self._want) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

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
