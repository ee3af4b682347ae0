"""A sweep from its file to its table: check, prepare the corpus, choose learning rates, train, put together, write."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jax_entropy.config import model_config
from jax_entropy.data import Corpus, prepare
from jax_entropy.errors import UserError, check_choice, nearest
from jax_entropy.paths import local_path, reading, replacing, writing
from jax_entropy.private.engine.engine import PROTOCOLS
from jax_entropy.report import comparison, read_history
from jax_entropy.report.figures import ITEMS
from jax_entropy.sweep import write
from jax_entropy.sweep.frontier import frontier
from jax_entropy.sweep.outcome import Outcome, read_outcome
from jax_entropy.sweep.queue import Place, claim, places, train_all
from jax_entropy.sweep.spec import SCALES, PlannedRun, Point, Sweep, Tuning, load_sweep, points_of
from jax_entropy.sweep.table import Row, make_row, with_ratios

_AS_GOOD = 1.01  # times the best perplexity of a rate: less than what seeds differ by
_DRAW = {item.name: item.draw for item in ITEMS}


class Folder:
    """Where the parts of a sweep lie."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = local_path(path, "workdir")
        self.runs, self.tuning = self.path / "runs", self.path / "tuning"
        self.compiled = self.path / "compiled"
        self.corpora = self.path / "corpora.json"
        self.pictures = self.path / "pictures"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the folder for this process.

        Raises:
          UserError: it cannot be written, or another sweep runs there.
        """
        with writing(self.path, "workdir"):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("ab")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path} is in use: another sweep runs there; choose another workdir") from None
            yield


def run(
    what: Sweep | str | os.PathLike,
    workdir: str | os.PathLike | None,
    scale: str,
    jobs: int,
    fields: Mapping[str, Any],
    notify: Callable[[str], None],
) -> list[Row]:
    """As `jax_entropy.sweep.sweep`."""
    where = places(jobs)
    check_choice("scale", scale, SCALES)
    sweep = what if isinstance(what, Sweep) else load_sweep(os.fspath(local_path(what, "what")), scale)
    points = points_of(sweep, fields)
    for name in sweep.pictures:
        if name not in (known := [*_DRAW, "comparison"]):
            raise UserError(f"the sweep's pictures names {name!r}, which is none{nearest(name, known)}")
    if workdir is None and isinstance(what, Sweep):
        raise UserError("workdir is missing: a sweep that comes from no file needs a folder for its runs")
    folder = Folder(Path("sweeps", f"{Path(what).stem}-{scale}") if workdir is None else workdir)
    with folder.held():
        corpora = _prepare(points, folder, notify)
        trials = {point.label: _trials(point, sweep.tuning, folder) for point in points}
        ends = _train([run for runs in trials.values() for run in runs], where, folder, notify)
        reported = {
            point.label: [point.run(folder.runs, seed, _chosen(trials[point.label])) for seed in sweep.seeds]
            for point in points
            if all(read_outcome(run.path).settled for run in trials[point.label])
        }
        if ends:  # the first seed of every point, then the second of every point
            by_seed = zip(*reported.values(), strict=True)
            ends = _train([run for runs in by_seed for run in runs], where, folder, notify)
        found = [
            _row(point, sweep, corpora[point.label], trials[point.label], reported.get(point.label, []))
            for point in points
        ]
        rows = with_ratios(found, sweep.baselines)
        of_file = {} if isinstance(what, Sweep) else dict(scale=scale)
        _write(folder, sweep, of_file | _facts(sweep, corpora), rows, reported)
        if ends:
            _check_settled([run for runs in (*trials.values(), *reported.values()) for run in runs])
    return rows


def _prepare(points: Sequence[Point], folder: Folder, notify: Callable[[str], None]) -> dict[str, Corpus]:
    """The corpus of every point, by label, prepared before any process asks for it.

    Raises:
      UserError: one cannot be prepared, or is not what it was when the sweep began.
    """
    made: dict[str, Corpus] = {}
    corpora: dict[str, Corpus] = {}
    for label, config, *_ in points:
        key = json.dumps([config.data.to_dict(), config.model.context_length])
        if key not in made:
            made[key] = prepare(config.data, config.model.context_length, notify)
        corpora[label] = made[key]
        model_config(config, corpora[label].tokenizer.vocab_size)  # refused before anything is trained
    with reading(folder.corpora):
        try:
            before = json.loads(folder.corpora.read_text()) if folder.corpora.exists() else {}
        except ValueError as error:
            raise UserError(f"{folder.corpora} is damaged ({error}); choose another workdir, or remove it") from None
    now = {label: corpus.fingerprint for label, corpus in corpora.items()}
    if changed := [label for label in now if before.get(label, now[label]) != now[label]]:
        raise UserError(
            f"the text of {changed[0]} has changed since the sweep in {folder.path} began, so that its runs would not "
            "compare; restore it, or choose another workdir"
        )
    with writing(folder.corpora), replacing(folder.corpora) as file:
        file.write_text(json.dumps(before | now, indent=1) + "\n")
    return corpora


def _trials(point: Point, tuning: Tuning | None, folder: Folder) -> list[PlannedRun]:
    """The runs that choose a point's learning rate; none where it has one."""
    if tuning is None or not point.tuned:
        return []
    return [point.run(folder.tuning, tuning.seed, rate, tuning.share) for rate in tuning.rates]


def _chosen(trials: Sequence[PlannedRun]) -> float | None:
    """The lowest rate whose run ended within a hundredth of the best perplexity, or of all; None without runs."""
    outcomes = {run.rate: read_outcome(run.path) for run in trials}
    ended = {rate: outcome.perplexity for rate, outcome in outcomes.items() if outcome.state == "complete"}
    good = [rate for rate, perplexity in ended.items() if perplexity <= _AS_GOOD * min(ended.values())]
    return min(good or outcomes, default=None)


def _train(runs: Sequence[PlannedRun], where: Sequence[Place], folder: Folder, notify: Callable[[str], None]) -> bool:
    claim(runs)
    return train_all(runs, where, folder.compiled, notify)


def _check_settled(runs: Sequence[PlannedRun]) -> None:
    """Checks that no run failed.

    Raises:
      UserError: some did, for another reason than a loss that diverged.
    """
    failed = [(run, outcome) for run in runs if not (outcome := read_outcome(run.path)).settled]
    if failed:
        run, outcome = failed[0]
        reason = outcome.reason or "its process ended without a word"
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, the first {run} in {run.path} ({reason}; its train.log says "
            "more); the others are kept, and the same sweep tries again"
        )


def _row(
    point: Point, sweep: Sweep, corpus: Corpus, trials: Sequence[PlannedRun], reported: Sequence[PlannedRun]
) -> Row:
    config = reported[0].config if reported else point.config
    outcomes = {run.seed: read_outcome(run.path) for run in reported}
    options = config.train
    return make_row(
        point.label,
        rate=config.optimizer.learning_rate if reported else None,
        tuning={run.rate: read_outcome(run.path) for run in trials},
        outcomes=outcomes or dict.fromkeys(sweep.seeds, Outcome("unfinished")),
        tokens=options.num_steps * options.batch_size * config.optimizer.accumulate * config.model.context_length,
        model=model_config(config, corpus.tokenizer.vocab_size),
        published=sweep.published.get(point.label),
    )


def _facts(sweep: Sweep, corpora: Mapping[str, Corpus]) -> dict[str, str]:
    """How a sweep was run, by topic, in words."""
    facts = dict(seeds=", ".join(map(str, sweep.seeds)))
    if sweep.tuning:
        rates = ", ".join(f"{rate:g}" for rate in sweep.tuning.rates)
        facts["learning rate"] = (
            f"of {rates}, the lowest within 1% of the best held-out perplexity on seed {sweep.tuning.seed} after "
            f"{sweep.tuning.share:.0%} of the steps"
        )
    for corpus in {corpus.fingerprint: corpus for corpus in corpora.values()}.values():
        train, held_out = (
            count * corpus.context_length for count in (corpus.num_train_chunks, corpus.num_validation_chunks)
        )
        facts[f"corpus {corpus.fingerprint}"] = (
            f"{corpus.source}, {train:,} training tokens and {held_out:,} held out in chunks of "
            f"{corpus.context_length}, vocabulary {corpus.tokenizer.vocab_size:,}"
        )
    return facts


def _write(
    folder: Folder,
    sweep: Sweep,
    facts: dict[str, str],
    rows: Sequence[Row],
    reported: Mapping[str, Sequence[PlannedRun]],
) -> None:
    """Writes table.md, table.csv, table.json, the frontiers, and the sweep's own pictures of the runs that are done."""
    title = sweep.title or "Sweep"
    told = "\n".join(f"- {name}: {words}" for name, words in facts.items())
    texts = {
        "md": write.markdown(rows, title, [told]),
        "csv": write.csv_text(rows),
        "json": write.json_text(rows, facts),
    }
    figures: dict[str, Figure | None] = {
        f"frontier-{protocol}": frontier(rows, protocol, title) for protocol in PROTOCOLS
    }
    first = [runs[0] for runs in reported.values() if read_outcome(runs[0].path).state == "complete"]
    histories = {run.path.name: read_history(run.path) for run in first} if sweep.pictures else {}
    for name in sweep.pictures:
        if name == "comparison" and histories:
            figures[name] = comparison(list(histories.values()))
        elif name != "comparison":
            figures |= {f"{name}-{run}": _DRAW[name](history) for run, history in histories.items()}
    with writing(folder.path, "workdir"):
        for ending, text in texts.items():
            (folder.path / f"table.{ending}").write_text(text, encoding="utf-8")
        folder.pictures.mkdir(exist_ok=True)
        for name, figure in figures.items():
            if figure is not None:
                figure.savefig(folder.pictures / f"{name}.png", dpi=150)
