"""Scores cut into tiles, so that what no query sees is neither compared nor exponentiated under secure computation."""

from typing import Any, NamedTuple

import numpy as np

from jax_entropy.architecture import ModelConfig
from jax_entropy.parts import visible_keys


class Tiles(NamedTuple):
    """Rows and columns of scores [T, S] cut into tiles, of which those that no query sees anything in are left out.

    seen: [rows, columns] of which keys each query sees. Columns of slots are filled up to whole tiles.
    """

    height: int
    width: int
    slots: int  # columns that are seen by all
    padding: int  # empty columns after them
    seen: np.ndarray

    @classmethod
    def of(cls, config: ModelConfig, layer: int, num_tokens: int, packed: bool) -> "Tiles":
        """The whole as one tile, or packed: as many as lie on and under the diagonal, within the layer's window."""
        M = config.num_slots
        seen_TxS = visible_keys(config, layer)[:num_tokens, : M + num_tokens]
        if not packed:
            return cls(num_tokens, M + num_tokens, M, 0, seen_TxS)
        edge = _edge(num_tokens, config.windows[layer])
        padding = -M % edge
        nothing_TxP = np.zeros((num_tokens, padding), bool)
        return cls(edge, edge, M, padding, np.concatenate([seen_TxS[:, :M], nothing_TxP, seen_TxS[:, M:]], axis=1))

    def cut(self, x: Any, i: int, j: int) -> Any:
        """Tile j of row i of [..., T, S]."""
        return x[..., i * self.height : (i + 1) * self.height, j * self.width : (j + 1) * self.width]

    @property
    def rows(self) -> list[list[int]]:
        """Of each row the tiles that are seen."""
        T, S = self.seen.shape
        return [[j for j in range(S // self.width) if self.cut(self.seen, i, j).any()] for i in range(T // self.height)]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and column of each tile that is seen, one row after another."""
        return [(i, j) for i, row in enumerate(self.rows) for j in row]


def _edge(num_tokens: int, window: int) -> int:
    """Edge of a tile: eight of them a side where that divides, four a window, and no smaller than 4."""
    edge = next((num_tokens // n for n in (8, 4, 2) if num_tokens % n == 0 and num_tokens // n >= 4), num_tokens)
    while edge > window // 4 and edge % 2 == 0 and edge // 2 >= 4:
        edge //= 2
    return edge
