"""What a run looks like: figures and a page for a workdir, runs side by side, head entropies on the terminal."""

from jax_entropy.report.history import Run, load_run
from jax_entropy.report.terminal import print_head_entropy
from jax_entropy.report.write import write_comparison, write_report

__all__ = ["Run", "load_run", "print_head_entropy", "write_comparison", "write_report"]
