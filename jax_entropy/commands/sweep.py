"""`jax-entropy sweep`."""

import shlex
from argparse import Namespace
from pathlib import Path

from jax_entropy.commands.console import console, table, write_json
from jax_entropy.commands.parse import JSON, Fields, Flag, Names, command
from jax_entropy.errors import UserError

_WIDEST = 1000  # characters: a line of a table is wrapped by a narrow terminal rather than cut


@command(
    Names("files", "file with get_sweep(scale), or a name of configs/sweeps: table2, table3, …"),
    Flag(
        "scale",
        "small",
        "how large: two cores for an hour, or for days, one GPU, or as the paper",
        choices=("short", "small", "gpu", "full"),
    ),
    Flag("jobs", 1, "runs at a time, each on its share of the cores or GPUs"),
    Flag("workdir", None, "folder of the runs and the table; left out: sweeps/NAME-SCALE", kind=Path),
    JSON,
    Fields("one field of every run's config; what a point of the sweep sets itself wins"),
    examples=[
        "sweep configs/sweeps/table2.py --jobs=2",
        "sweep table3 --scale=gpu --config.data.files='/data/python/**/*.py'",
    ],
)
def sweep(values: Namespace) -> None:
    """Trains all runs of a sweep side by side, and puts them into one table; started again, it goes on."""
    if len(values.files) != 1:
        given = f", not {len(values.files)}" if values.files else ""
        raise UserError(f"sweep takes one file, or a name of configs/sweeps like table2{given}")
    (name,) = values.files
    from jax_entropy.sweep import sweep as run
    from jax_entropy.sweep import write

    out = console(values.json)
    rows = run(name, values.workdir, scale=values.scale, jobs=values.jobs, fields=values.fields, notify=out.print)
    for columns, cells in (write.quality(rows), write.private(rows)):
        headings = [name.replace(": ", "\n").replace("÷ ", "÷\n") for name in columns]
        out.print(table(headings, cells), crop=False, width=_WIDEST)
    folder = values.workdir or Path("sweeps", f"{Path(name).stem}-{values.scale}")
    out.print(f"table     {folder}/table.md, .csv, .json\npictures  {folder}/pictures")
    if unfinished := sum(row.unfinished for row in rows):
        again = shlex.join(["jax-entropy", "sweep", *values.arguments])
        out.print(f"stopped with {unfinished} reported runs still to do; to go on:\n  {again}")
    write_json(values.json, rows)
