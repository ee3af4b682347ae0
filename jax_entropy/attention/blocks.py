"""Sizes of the kernels' tiles, as data: the first row of blocks.json that fits device, type, head width and length.

Rows were chosen by the assembler's report (docs/benchmarks/kernels.md); `jax-entropy bench blocks` measures them.
"""

import functools
import json
from pathlib import Path
from typing import Any

from jax_entropy.errors import UserError

_FILE = Path(__file__).with_name("blocks.json")


@functools.cache
def _rows(implementation: str) -> list[dict[str, Any]]:
    return json.loads(_FILE.read_text())[implementation]


def blocks_for(implementation: str, device_kind: str, dtype: Any, head_dim: int, length: int) -> dict[str, Any]:
    """The tiles of each kernel, forward, dq and dkv, as its file reads them; None of one that is not used.

    Args:
      device_kind: as JAX names the device, "NVIDIA H100 80GB HBM3".
      length: T, or S where that is more.
    Raises:
      UserError: no row fits.
    """
    for row in _rows(implementation):
        if (
            device_kind.startswith(row["device"])
            and str(dtype) in row["types"]
            and head_dim <= row["width"]
            and length <= (row["longest"] or length)
        ):
            return {kernel: row[kernel] for kernel in ("forward", "dq", "dkv")}
    widest = max(row["width"] for row in _rows(implementation))
    types = dict.fromkeys(name for row in _rows(implementation) for name in row["types"])
    raise UserError(
        f"attention {implementation!r} takes heads of up to {widest} in {', '.join(types)}, not {head_dim} in {dtype}"
    )
