"""Numbers as one compact block of text: what a page carries, and `browser/block.js` reads.

Each array is float32, as differences of bit patterns along its first axis, byte by byte of all its numbers: what moves
slowly is mostly zeros, which deflate takes out.
"""

import base64
import json
import zlib
from typing import Any

import numpy as np

_EXACT = 150_000  # numbers; where there are more, each is rounded to 16 bits, a relative error below 1e-5
_DROPPED_BITS = 7


class Block:
    """Collects arrays; `put` answers with what stands for one in the header."""

    def __init__(self, count: int) -> None:
        self._dropped_bits = _DROPPED_BITS if count > _EXACT else 0
        self._parts: list[bytes] = []
        self._size = 0

    def put(self, array: np.ndarray, *, exact: bool = False) -> dict[str, Any]:
        """Adds an array, of any shape, its slow axis first; `exact` ones are never rounded."""
        values = np.ascontiguousarray(array, np.float32)
        drop = 0 if exact else self._dropped_bits
        bits = _rounded(values, drop).reshape(len(values) or 1, -1)
        change = np.diff(bits.view(np.int32), axis=0, prepend=np.int32(0)).reshape(-1)
        zigzag = (change << 1 ^ change >> 31).view(np.uint32)
        planes = max(1, -(-int(zigzag.max(initial=0)).bit_length() // 8))
        place = dict(at=self._size, shape=list(values.shape), drop=drop, planes=planes)
        for plane in range(planes):
            self._parts.append((zigzag >> np.uint32(8 * plane)).astype(np.uint8).tobytes())
            self._size += zigzag.size
        return place

    def text(self, header: Any) -> str:
        """The header and the arrays, to stand in HTML as it is: letters, digits, + / and =."""
        head = json.dumps(header, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
        content = len(head).to_bytes(4, "little") + head + b"".join(self._parts)
        return base64.b64encode(zlib.compress(content, 9)).decode()


def _rounded(values: np.ndarray, drop: int) -> np.ndarray:
    """The bit patterns without their last bits, as uint32."""
    bits = values.view(np.uint32)
    if not drop:
        return bits
    half = np.where(np.isfinite(values), np.uint32(1 << (drop - 1)), np.uint32(0))
    return (bits + half) >> np.uint32(drop)
