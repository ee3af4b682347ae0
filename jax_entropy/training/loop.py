"""The steps of a run, from a restored or fresh state to the last step, a signal, or a loss that cannot be trained on.

A step never waits for its metrics: those of step n−1 are fetched after step n was launched. Nor for its batch: that of
step n is read, and on its way to the devices, while step n−1 runs.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from jax_entropy import data
from jax_entropy.census import census
from jax_entropy.errors import Diverged
from jax_entropy.evaluate import evaluate_batches
from jax_entropy.sharding import batch_sharding
from jax_entropy.state import TrainState, jit_train_step
from jax_entropy.training.clock import StepClock
from jax_entropy.training.guard import Anomaly, Guard, diagnose
from jax_entropy.training.signals import Signals
from jax_entropy.training.start import Setup, Start, find_start
from jax_entropy.training.writer import MetricsWriter

_PROFILE_AFTER = 10  # steps, so that compilation is over


class End(NamedTuple):
    """Where training stopped, and whether nothing is left to do."""

    step: int
    state: TrainState
    complete: bool
    evaluation: dict[str, Any] | None  # the last one, None if there was none yet


class _BrokenOff(Exception):
    """A signal came during an evaluation."""


class Loop:
    """Trains one run.

    Args:
      profile: steps to trace, 0: none.
    """

    def __init__(self, setup: Setup, profile: int = 0) -> None:
        self.setup, self.config, self.notify = setup, setup.config, setup.notify
        model = setup.model.config
        tokens = self.config.train.batch_size * self.config.optimizer.accumulate * model.context_length
        token_flops = 3 * census(model).forward_flops / model.context_length
        self.clock = StepClock(self.config.train.num_steps, tokens, token_flops)
        self.guard = Guard(self.config.guard)
        self.trace = _Trace(setup.workdir.profile, profile, setup.notify)
        self.train_steps: dict[float, Callable] = {}  # by the guard's factor: going back does not compile again
        self.byte_lengths = setup.corpus.tokenizer.byte_lengths()
        self.signals = Signals()
        self.writer: MetricsWriter | None = None  # of process 0 while it trains
        self.watched: dict[str, Any] | None = None  # the last entropies seen
        self.evaluation: dict[str, Any] | None = None  # the last one
        self.read = 0  # the last step whose data was read

    def run(self, start: Start, iterator: grain.DatasetIterator) -> End:
        """Trains to the last step or a signal.

        Raises:
          Diverged: it cannot go on.
        """
        with self.signals, jax.set_mesh(self.setup.mesh):
            while start.step < self.config.train.num_steps or start.evaluation_due:
                try:
                    with self._writing(start.step), self.trace:
                        return self._advance(start, iterator)
                except Anomaly as anomaly:
                    start = self._go_back(anomaly)
        return End(start.step, start.state, complete=True, evaluation=None)

    def _advance(self, start: Start, iterator: grain.DatasetIterator) -> End:
        options, step, state = self.config.train, start.step, start.state
        self.guard.restore(start.guard)
        if start.evaluation_due:
            if not self._evaluate(step, state):
                return self._end(step, state, complete=False)
            self._save(step, state, iterator)
        train_step = self._train_step()
        self.clock.restart()
        pending, saved = None, step
        while step < options.num_steps and not self.signals.stop(step % options.log_every == 0):
            step += 1
            self.trace.begin(step - start.step)
            with self.clock.spending("data_wait"):
                batch = self._place(next(iterator)["tokens"])
            self.read = step
            watch = step in (1, options.num_steps) or step % options.log_every == 0
            state, metrics = train_step(state, batch, watch)
            if pending:
                self._report(*pending)
            self.clock.tick()
            pending = (step, metrics, watch)
            last = step == options.num_steps
            evaluates = last or step % options.evaluate_every == 0
            saves = last or step % options.checkpoint_every == 0
            if evaluates or saves:
                self._report(*pending)  # nothing is saved before its loss is known to be finite
                pending = None
                with self.clock.paused():
                    due = evaluates and not self._evaluate(step, state)
                    if saves or due:
                        self._save(step, state, iterator, evaluation_due=due)
                        saved = step
                if due:
                    return self._end(step, state, complete=False)
            self.setup.checkpointer.poll()
        if pending:
            self._report(*pending)
        if saved < step:  # stopped between two checkpoints
            self._save(step, state, iterator)
        return self._end(step, state, complete=step == options.num_steps)

    def _end(self, step: int, state: TrainState, *, complete: bool) -> End:
        return End(step, state, complete, self.evaluation)

    @contextlib.contextmanager
    def _writing(self, first_step: int) -> Iterator[None]:
        """Metrics go to the workdir from a step on; process 0 alone writes."""
        if jax.process_index() > 0:
            yield
            return
        wandb = self.config.to_dict() if self.config.train.wandb else None
        with MetricsWriter(self.setup.workdir.path, wandb=wandb, first_step=first_step) as writer:
            self.writer = writer
            try:
                yield
            finally:
                self.writer = None

    def _train_step(self) -> Callable:
        """The step at the learning rate that the guard allows; jit compiles it when it is first called."""
        scale = self.guard.learning_rate_scale
        if scale not in self.train_steps:
            config = self.config.copy_and_resolve_references()
            config.optimizer.learning_rate *= scale
            self.train_steps[scale] = jit_train_step(
                config, self.setup.model, self.setup.mesh, self.setup.state_sharding
            )
        return self.train_steps[scale]

    def _place(self, rows: np.ndarray) -> jax.Array:
        """This process's rows of a batch as part of the whole."""
        return jax.make_array_from_process_local_data(batch_sharding(self.setup.mesh), rows)

    def _report(self, step: int, metrics: dict[str, Any], watch: bool) -> None:
        """Checks a step's loss, and writes and prints what was watched.

        Raises:
          Anomaly: as the guard's `check` does.
        """
        metrics = jax.device_get(metrics)
        with self.clock.spending("monitoring"):
            self.guard.check(step, metrics)
            if watch:
                self._write(step, metrics)

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        line = {name: value for name, value in metrics.items() if name != "not_finite"}
        line |= dict(kind="train", perplexity=math.exp(min(float(metrics["cross_entropy"]), 700)), **self.clock.read())
        self.watched = line
        if self.writer:
            self.writer.write(step, line)
            self.setup.workdir.write_status("training", step, self.config.train.num_steps)
        self.notify(self.clock.line(step, line))

    def _go_back(self, anomaly: Anomaly) -> Start:
        """To the last good state, with the data that comes next: what led to the anomaly is not read again."""
        attempt, options = self.guard.attempts + 1, self.config.guard
        what = f"{anomaly.what} ({diagnose(anomaly, self.watched, self.setup.model.config.context_length)})"
        if attempt > options.limit:
            kept = self.setup.checkpointer.latest_step()
            kept = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint had been saved yet"
            tried = f"; training was sent back {options.limit} times" if options.limit else ""
            raise Diverged(
                f"{what}{tried}; {kept}; "
                f"lower config.optimizer.learning_rate={self.config.optimizer.learning_rate} or add normalisation"
            )
        start = find_start(self.setup, None)
        guard = (start.guard or {"losses": []}) | {"attempts": attempt}
        self.notify(
            f"{what}; back to step {start.step}, without the data of steps {start.step + 1} to {self.read}, "
            f"learning rate ×{options.learning_rate_factor**attempt:.3g} (attempt {attempt} of {options.limit})"
        )
        if jax.process_index() == 0:
            self.setup.workdir.add_incident(
                dict(step=anomaly.step, what=what, attempt=attempt, back_to=start.step, before=self.watched)
            )
        return start._replace(guard=guard)

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Evaluates, writes and prints; False if a signal broke it off, and then nothing was written."""
        try:
            batches, readings = self._validation_batches(), []
            evaluation = evaluate_batches(
                self.setup.model, state.variables, batches, self.byte_lengths, read=readings.append
            )
        except _BrokenOff:
            return False
        if self.writer:
            self.writer.write(step, {"kind": "evaluate", **evaluation})
            for reading in readings:
                reading._replace(step=step).save(self.setup.workdir.text, self.config.train.num_steps)
        self.notify(
            f"step {step} · held out: perplexity {evaluation['validation_perplexity']:.2f}, "
            f"{evaluation['bits_per_byte']:.3f} bits per byte"
        )
        self.evaluation = {"step": step, **evaluation}
        return True

    def _validation_batches(self) -> Iterator[tuple[jax.Array, ...]]:
        batches = data.validation_batches(
            self.setup.corpus,
            batch_size=self.config.train.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            max_chunks=self.config.train.evaluate_chunks,
        )
        for batch in batches:
            if self.signals.stop():
                raise _BrokenOff
            yield tuple(map(self._place, batch))

    def _save(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator, *, evaluation_due: bool = False
    ) -> None:
        evaluated = self.evaluation is not None and self.evaluation["step"] == step
        meta = dict(config=self.config.to_dict(), corpus=self.setup.corpus.fingerprint, guard=self.guard.state())
        self.setup.checkpointer.save(
            step,
            state,
            iterator,
            meta=meta | dict(evaluation_due=evaluation_due),
            validation_loss=self.evaluation["validation_loss"] if evaluated else None,
        )


class _Trace:
    """Traces `steps` steps into a folder; entered, it ends with what it is around."""

    def __init__(self, folder: Any, steps: int, notify: Callable[[str], None]) -> None:
        self.folder, self.steps, self.notify = folder, steps, notify
        self.tracing = self.traced = False

    def begin(self, step: int) -> None:
        """Before each step, counted from where training went on."""
        if self.steps and step == _PROFILE_AFTER:
            jax.profiler.start_trace(self.folder)
            self.tracing = True
        if step == _PROFILE_AFTER + self.steps:
            self._stop()

    def _stop(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
            self.tracing, self.traced = False, True
            self.notify(f"traced in {self.folder}")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self.steps and not self.traced:
            self.notify(f"nothing was traced: it begins with step {_PROFILE_AFTER} from where training went on")
