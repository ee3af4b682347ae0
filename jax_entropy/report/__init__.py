"""What a run looks like: figures and a page for a workdir, runs side by side, head entropies on the terminal."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jax_entropy.paths import writing
from jax_entropy.report.comparison import comparison
from jax_entropy.report.figures import ITEMS
from jax_entropy.report.history import History, read_history
from jax_entropy.report.page import page
from jax_entropy.report.terminal import print_head_entropy

__all__ = ["History", "comparison", "print_head_entropy", "read_history", "report"]


def report(workdir: str | Path, against: str | Path | Sequence[str | Path] = ()) -> dict[str, Path]:
    """Draws a run into its workdir: the figures that it has data for, and a page that shows them all.

    Args:
      workdir: of a finished run or one still in training.
      against: workdirs of other runs, drawn beside this one.
    Returns:
      Where everything is, by name: the figures ("loss", "head_entropy", …), "comparison" if there is one, "page".
    Raises:
      UserError: where `read_history` does, of any of the workdirs, and if this one cannot be written.
    """
    against = [against] if isinstance(against, (str, Path)) else against
    history, *others = map(read_history, [workdir, *against])
    figures = history.workdir.figures
    drawn = {item: figure for item in ITEMS if (figure := item.draw(history)) is not None}
    pictures = [(item, _png(figure)) for item, figure in drawn.items()]
    written = {item.name: _write(figures / f"{item.name}.png", png) for item, png in pictures}
    if others:
        written["comparison"] = _write(figures / "comparison.png", _png(comparison([history, *others])))
    text = page(history, pictures).encode("utf-8", "backslashreplace")
    written["page"] = _write(history.workdir.report, text)
    return written


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> Path:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path
