"""A few hundred tokens of held-out text as a run read them: each token's loss, and every head's entropy at it.

The same tokens at up to nine evaluations of a run, one file each in the workdir's folder `text`.
"""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from jax_entropy.paths import replacing, writing

TOKENS = 256  # about so many are kept
_PARTS = 8  # of a run; the newest evaluation of each is kept, and that of the last step


class Reading(NamedTuple):
    """R pieces of T tokens, the first of the held-out text.

    Attributes:
      tokens: what is read and, one later, predicted, [R, T+1].
      loss: nats, [R, T].
      entropy: nats, [L, N, R, T].
      temperature: divisors by position, [L, N, T]; None without SM(t).
      step: of the run, where there is one.
    """

    tokens: np.ndarray
    loss: np.ndarray
    entropy: np.ndarray
    temperature: np.ndarray | None = None
    step: int | None = None

    def save(self, folder: Path, num_steps: int) -> None:
        """Keeps it in `folder`, in place of an earlier one of the same eighth of a run of `num_steps`.

        Raises:
          UserError: the disk is full.
        """
        with writing(folder, "workdir"):
            folder.mkdir(parents=True, exist_ok=True)
            arrays = {name: value for name, value in self._asdict().items() if value is not None}
            with replacing(folder / f"{_PARTS * self.step // num_steps}.npz") as partial, partial.open("wb") as file:
                np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Inverse of `save`; None where the file is not whole."""
        try:
            with np.load(path) as arrays:
                parts = {name: arrays[name] for name in arrays.files}
            return cls(**parts | dict(step=int(parts["step"])))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            return None


def read_text(folder: Path) -> list[Reading]:
    """What is kept of a run, by step."""
    found = [Reading.load(path) for path in folder.glob("*.npz")]
    return sorted((reading for reading in found if reading), key=lambda reading: reading.step)
