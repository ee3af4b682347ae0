"""What watching a run costs: the metrics of a watched step, and what the host does with them."""

import statistics
import tempfile
import time

import jax
from ml_collections import ConfigDict

from jax_entropy.bench.data import started
from jax_entropy.runs.metrics import read_metrics
from jax_entropy.runs.workdir import Workdir
from jax_entropy.training.train import train

_LINES = 5


def bench_monitoring(config: ConfigDict, *, rounds: int = 20) -> dict[str, float]:
    """Milliseconds of a step and of a watched one, medians of turns; the host's share in a real run; and their sum.

    The sum is of a step as `config.train.log_every` has it: one in so many is watched, and each is looked at.
    """
    _, state, train_step, batches = started(config)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for watch in (False, True) * (rounds + 1):
        tokens = next(batches)["tokens"]
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train_step(state, tokens, watch))
        seconds[watch].append(time.perf_counter() - start)
    plain, watched = (statistics.median(seconds[watch][1:]) for watch in (False, True))

    every = config.train.log_every
    never = (_LINES + 2) * every
    config.update_from_flattened_dict(
        {"train.num_steps": never - every, "train.evaluate_every": never, "train.checkpoint_every": never}
    )
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder, notify=lambda line: None)
        lines = read_metrics(Workdir(folder).metrics)
    shares = [line["performance"]["monitoring"] for line in lines if line["kind"] == "train"]
    host = statistics.median(shares[2:])  # the first line has the compilation
    return {
        "step, ms": 1e3 * plain,
        "watched, ms": 1e3 * watched,
        "host, share": host,
        "monitoring, share": host + (watched - plain) / plain / every,
    }
