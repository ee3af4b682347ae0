"""The tests mirror the package's tree; what they share is beside them in `helpers.py`."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
GOLDEN = REPOSITORY / "tests" / "golden"  # arrays from the published code
