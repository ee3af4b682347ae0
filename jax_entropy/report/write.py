"""Writes what the report is made of: a workdir's figures and page, and the comparison of several runs."""

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jax_entropy.errors import UserError
from jax_entropy.report.comparison import comparison
from jax_entropy.report.figures import FIGURES
from jax_entropy.report.history import load_run
from jax_entropy.report.page import page


def write_report(workdir: str | Path, notify: Callable[[str], None] = print) -> list[Path]:
    """Draws a run into workdir/figures/*.png and workdir/report.html, and returns these paths, the page last.

    `notify` gets one sentence that says where they are. Raises UserError where `load_run` does, and if the workdir
    cannot be written.
    """
    run = load_run(workdir)
    figures = {draw.__name__: draw(run) for draw in FIGURES}
    pictures = {name: _png(fig) for name, fig in figures.items() if fig is not None}
    paths = [_write(run.workdir / "figures" / f"{name}.png", png) for name, png in pictures.items()]
    if run.private:  # drawn when it was measured
        with contextlib.suppress(OSError):
            pictures["private"] = (run.workdir / "figures" / "private.png").read_bytes()
    paths.append(_write(run.workdir / "report.html", page(run, pictures).encode()))
    notify(f"{len(pictures)} figures are in {run.workdir / 'figures'}, all on one page in {paths[-1]}.")
    return paths


def write_comparison(workdirs: Sequence[str | Path], out: str | Path) -> Path:
    """Draws the runs of several workdirs side by side into the PNG file `out` and returns its path.

    Raises UserError where `load_run` does, without any workdir, and if `out` cannot be written.
    """
    return _write(Path(out), _png(comparison([load_run(workdir) for workdir in workdirs])))


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from None
    return path
