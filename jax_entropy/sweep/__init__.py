"""Many runs, one question: points and seeds trained side by side, put into one table, and drawn as a frontier.

from jax_entropy.sweep import Sweep, product
je.sweep(Sweep(points=product({"architecture": ["SM+LN+G", "SM"]}), baselines=["SM+LN+G"]), "sweeps/mine")
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jax_entropy.sweep.spec import SCALES, Published, Sweep, Tuning, product, zipped

if TYPE_CHECKING:
    from jax_entropy.sweep.table import Row

__all__ = ["SCALES", "Published", "Sweep", "Tuning", "product", "sweep", "zipped"]


def sweep(
    what: Sweep | str | os.PathLike,
    workdir: str | os.PathLike | None = None,
    *,
    scale: str = "small",
    jobs: int = 1,
    fields: Mapping[str, Any] | None = None,
    notify: Callable[[str], None] = print,
) -> "list[Row]":
    """Trains every run of a sweep that is not done yet, and writes and returns its table.

    The learning rate of each point is chosen first, by the sweep's rule. Every run is a workdir like any other, in
    `tuning/` or `runs/`. Stopped or killed, the same call goes on.

    Args:
      what: a sweep, or the path of a file with `get_sweep(scale)`, or the name of one in `configs/sweeps/`.
      workdir: folder of its runs, table and pictures; by default `sweeps/NAME-SCALE` for a file.
      scale: of a file, "short", "small", "gpu" or "full"; what these are is said in it.
      jobs: runs at a time, each on its share of the cores or GPUs.
      fields: of every run's config: {"train.num_steps": 500}; what a point sets itself wins.
      notify: is told, a line at a time, how it goes.
    Returns:
      A row for each point, of the runs that have ended: all of them, unless a signal stopped the sweep.
    Raises:
      UserError: something in it cannot work, or a run failed for another reason than a loss that diverged; the other
        runs and the table are kept.
    """
    from jax_entropy.sweep.run import run  # JAX, matplotlib and more, which the files of sweeps need not wait for

    return run(what, workdir, scale, jobs, {} if fields is None else fields, notify)
