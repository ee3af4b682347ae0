"""What a person reads: one way to print lines and tables, in a terminal and into a file."""

import sys

from rich.console import Console


def console() -> Console:
    """Standard output; where that is no terminal, tables are as wide as they need to be."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
