"""The table of a sweep: a row for each point, its runs put together, and what its private execution would cost."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jax_entropy.architecture import ModelConfig
from jax_entropy.entropy import head_bands
from jax_entropy.errors import UserError
from jax_entropy.private.cost.account import NETWORKS, on_network
from jax_entropy.private.cost.model import predict_total
from jax_entropy.private.cost.paper import paper_cost
from jax_entropy.private.engine.engine import PROTOCOLS, Setting
from jax_entropy.sweep.outcome import Outcome
from jax_entropy.sweep.spec import Published

NETWORK = "wan"  # that seconds are told for
_RESAMPLES = 10_000


class Ratio(NamedTuple):
    """A perplexity divided by a baseline's, and the ends of its 95 % bootstrap interval; NaN where one seed is all."""

    value: float
    low: float
    high: float


class Cost(NamedTuple):
    """Of a forward pass of the optimised export: the busiest party's bytes, rounds, seconds of both on `NETWORK`."""

    bytes: int
    rounds: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A point of a sweep. Perplexities, bands and entropies are of held-out text, means over the seeds that ended.

    Attributes:
      label: the architecture, and fields that differ.
      learning_rate: of its runs; tuning: held-out perplexity by rate, None where a run diverged.
      perplexities: by seed, None where the run diverged or is not done.
      perplexity, spread: mean and standard deviation over seeds; None: no seed ended, less than two did.
      ratios: to each baseline, by label.
      bands: shares of heads in the four quarters of the observed maximum, from collapse to overload.
      layer_entropy: nats, by layer.
      diverged, unfinished: numbers of seeds; diagnosis: of the first that diverged.
      nan_count: row entropies that were not a number; sent_back: times that the guard sent training back.
      tokens, seconds: of training, one run.
      private: predicted cost of a forward pass over the context, by protocol; empty: the model has operations that were
        not measured.
      paper_system: gigabytes and minutes in the paper's system, where its tables cover the size.
      published: what the paper prints.
    """

    label: str
    learning_rate: float | None
    tuning: dict[str, float | None]
    perplexities: dict[str, float | None]
    perplexity: float | None
    spread: float | None
    ratios: dict[str, Ratio]
    bands: list[float]
    layer_entropy: list[float]
    diverged: int
    unfinished: int
    diagnosis: str
    nan_count: int
    sent_back: int
    tokens: int
    seconds: float | None
    private: dict[str, Cost]
    paper_system: Published | None
    published: Published | None

    @property
    def ended(self) -> list[float]:
        """Perplexities of the seeds that ended."""
        return [value for value in self.perplexities.values() if value is not None]


def make_row(
    label: str,
    rate: float | None,
    tuning: dict[float, Outcome],
    outcomes: dict[int, Outcome],
    tokens: int,
    model: ModelConfig,
    published: Published | None,
) -> Row:
    """The row of a point, without its ratios: its runs by seed, those that chose its rate, and its model."""
    complete = [outcome for outcome in outcomes.values() if outcome.state == "complete"]
    values = {str(seed): _perplexity(outcome) for seed, outcome in outcomes.items()}
    ended = [value for value in values.values() if value is not None]
    diverged = [outcome for outcome in outcomes.values() if outcome.state == "diverged"]
    bands = [np.asarray(head_bands(outcome.head_entropy_LxN), float) for outcome in complete]
    entropy = [np.mean(outcome.head_entropy_LxN, axis=1) for outcome in complete]
    return Row(
        label=label,
        learning_rate=rate,
        tuning={repr(float(tried)): _perplexity(outcome) for tried, outcome in tuning.items()},
        perplexities=values,
        perplexity=statistics.fmean(ended) if ended else None,
        spread=statistics.stdev(ended) if len(ended) > 1 else None,
        ratios={},
        bands=np.mean(bands, axis=0).tolist() if complete else [],
        layer_entropy=np.mean(entropy, axis=0).tolist() if complete else [],
        diverged=len(diverged),
        unfinished=len(outcomes) - len(complete) - len(diverged),
        diagnosis=diverged[0].reason if diverged else "",
        nan_count=sum(outcome.nan_count for outcome in outcomes.values()),
        sent_back=sum(outcome.sent_back for outcome in outcomes.values()),
        tokens=tokens,
        seconds=statistics.fmean(outcome.seconds for outcome in complete) if complete else None,
        private=private_costs(model),
        paper_system=_paper_system(model),
        published=published,
    )


def _perplexity(outcome: Outcome) -> float | None:
    return outcome.perplexity if outcome.state == "complete" else None


def with_ratios(rows: Sequence[Row], baselines: Sequence[str]) -> list[Row]:
    """The rows with their ratios to the baselines that ended."""
    ended = {row.label: row.ended for row in rows}
    known = [label for label in baselines if ended[label]]

    def ratios(row: Row) -> dict[str, Ratio]:
        if not row.ended:
            return {}
        of_itself = {row.label: Ratio(1.0, 1.0, 1.0)} if row.label in known else {}
        return {label: ratio(row.ended, ended[label]) for label in known} | of_itself

    return [dataclasses.replace(row, ratios=ratios(row)) for row in rows]


def ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Mean over mean, with a 95 % interval: the percentiles of the ratio where both are drawn anew, with replacement.

    Of three seeds the interval is narrower than it should be: it knows no value between and beyond those three.
    """
    point = statistics.fmean(values) / statistics.fmean(baseline)
    if len(values) < 2 or len(baseline) < 2:
        return Ratio(point, math.nan, math.nan)
    draw = np.random.default_rng(0)
    means = [draw.choice(of, (_RESAMPLES, len(of))).mean(axis=1) for of in (values, baseline)]
    low, high = np.percentile(means[0] / means[1], (2.5, 97.5))
    return Ratio(point, float(low), float(high))


def private_costs(model: ModelConfig) -> dict[str, Cost]:
    """What a forward pass over the model's context costs, by protocol, as the cost model predicts it."""
    costs, network = {}, NETWORKS[NETWORK]
    for protocol in PROTOCOLS:
        try:
            total = predict_total(model, model.context_length, Setting(protocol))
        except UserError:  # an operation that was not measured
            continue
        costs[protocol] = Cost(max(total.bytes), total.rounds, on_network(total._replace(seconds=0.0), network))
    return costs


def _paper_system(model: ModelConfig) -> Published | None:
    try:
        cost = paper_cost(model)
    except UserError:
        return None
    return Published(None, cost.gigabytes, cost.minutes)
