"""What a run looks like: figures and a page for a workdir, runs side by side, head entropies on the terminal."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from jax_entropy.errors import check_choice
from jax_entropy.paths import local_path, writing
from jax_entropy.report.comparison import comparison
from jax_entropy.report.figures import ITEMS
from jax_entropy.report.history import History, read_history
from jax_entropy.report.numbers import numbers, write_csv
from jax_entropy.report.page import page
from jax_entropy.report.payload import read_sweep
from jax_entropy.report.terminal import print_head_entropy
from jax_entropy.report.watch import watch

__all__ = ["FORMATS", "History", "comparison", "numbers", "print_head_entropy", "read_history", "report", "watch"]

FORMATS = ("png", "svg", "pdf")


def report(
    workdir: str | Path,
    against: str | Path | Sequence[str | Path] = (),
    *,
    figures: str = "png",
    page_file: str | Path | None = None,
    csv_file: str | Path | None = None,
    sweep: str | Path | None = None,
) -> dict[str, Path]:
    """Draws a run into its workdir: the figures that it has data for, and a page on which all of it moves.

    Args:
      workdir: of a finished run or one still in training.
      against: workdirs of other runs, on the same page and drawn beside this one.
      figures: "png", "svg" or "pdf".
      page_file: where the page goes; None: `report.html` in the workdir.
      csv_file: where the numbers of all runs go, one a line, if anywhere; `numbers` returns them.
      sweep: folder of a sweep whose frontier is on the page too.
    Returns:
      Where everything is, by name: the figures ("loss", "head_entropy", …), "comparison" if there is one, "page",
      and "csv" if it was asked for.
    Raises:
      UserError: where `read_history` does, of any of the workdirs, if a file cannot be written, and for other figures.
    """
    check_choice("figures", figures, FORMATS)
    page_file, csv_file = (
        None if given is None else local_path(given, name)
        for name, given in (("page_file", page_file), ("csv_file", csv_file))
    )
    if not isinstance(against, Sequence) or isinstance(against, str):
        against = [against]
    histories = [read_history(path) for path in (workdir, *against)]
    history, found = histories[0], None if sweep is None else read_sweep(sweep)
    drawn = {item.name: figure for item in ITEMS if (figure := item.draw(history)) is not None}
    if len(histories) > 1:
        drawn["comparison"] = comparison(histories)
    folder = history.workdir.figures
    written = {name: _write(folder / f"{name}.{figures}", _file(drawn[name], figures)) for name in drawn}
    text = page(histories, sweep=found).encode("utf-8", "backslashreplace")
    written["page"] = _write(page_file or history.workdir.report, text)
    if csv_file:
        write_csv(csv_file, histories)
        written["csv"] = csv_file
    return written


def _file(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    # letters stay letters in a paper's PDF, and a figure that is drawn again is the same file
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "jax_entropy"}):
        dated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
        figure.savefig(buffer, format=kind, dpi=150, metadata=dated)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> Path:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path
