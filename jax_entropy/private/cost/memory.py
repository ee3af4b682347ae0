"""The memory that a private run will need, and how it is laid out to fit, known before there are any weights."""

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError
from jax_entropy.private.cost.work import SLOTS, Work, blocks, work
from jax_entropy.private.engine.engine import Setting


def read_memory(text: str) -> float:
    """Bytes of "16GB", of "800MB", or of "": what is free on this machine.

    Raises:
      UserError: it is none of these.
    """
    if not text:
        return _free_memory()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])B", text)
    if not found:
        raise UserError(f"memory={text!r} must be like 16GB or 800MB")
    return min(float(found[1]) * {"M": 1e6, "G": 1e9}[found[2]], _free_memory())


def _free_memory() -> float:
    try:
        meminfo = Path("/proc/meminfo").read_text()
        return 1024 * int(next(line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return math.inf


class Layout(NamedTuple):
    """How a run is laid out in memory.

    piece: of how many weights a product is at most; 0: all are whole. streamed: weights are shared a layer at a time.
    """

    piece: int = 0
    streamed: bool = False

    def __str__(self) -> str:
        parts = [f"products of {self.piece / 1e6:.2g} million weights at most"] if self.piece else []
        return ", ".join([*parts, *(["weights a layer at a time"] if self.streamed else [])])


def layout(
    config: ModelConfig, num_tokens: int, setting: Setting, plain: bool, *, limit: float, logits: str = "every",
    embedding: str = "shared", streamable: bool = False,
) -> Layout:  # fmt: skip
    """The simplest layout in which a run fits, to be called before variables are made.

    Args:
      limit: bytes that the engine may take.
      logits, embedding: as `profile`.
      streamable: whether a weight is needed for one stage only; not where more tokens follow.
    Raises:
      UserError: the tokens do not fit into the context, or a run into the limit.
    """
    if not 1 <= num_tokens <= config.context_length:
        raise UserError(
            f"num_tokens={num_tokens} must lie between 1 and the model's context_length={config.context_length}"
        )
    # Elsewhere than under CHEETAH each piece would be opened anew.
    cuts = [0, *(1 << power for power in range(24, 17, -1))] if setting.protocol == "cheetah" else [0]
    layouts = [Layout(*of) for of in itertools.product(cuts, (False, True)[: 1 + streamable])]
    seen = num_tokens + config.num_slots
    scores = 8.0 * setting.num_parties * config.num_heads * num_tokens * seen  # the least, known without counting
    memory = {Layout(): scores}
    if scores <= limit:
        memory = {of: needed(config, num_tokens, setting, plain, logits, embedding, of) for of in layouts}
    found = next((of for of, bytes_needed in memory.items() if bytes_needed <= limit), None)
    if found is None:
        hints = [
            *(["one token's logits (logits=last)"] if logits == "every" else []),
            *(["a table that is given away (embedding=public)"] if embedding == "shared" else []),
        ]
        raise UserError(
            f"{config} on {num_tokens} tokens under {setting.protocol} needs some {min(memory.values()) / 1e9:.2g} GB "
            f"of memory, and may take {limit / 1e9:.2g} GB; take fewer tokens, layers or entries of the vocabulary"
            + "".join(f", or {hint}" for hint in hints)
        )
    return found


def needed(
    config: ModelConfig, num_tokens: int, setting: Setting, plain: bool, logits: str, embedding: str, of: Layout
) -> float:
    """Bytes of all parties together, some tenth above what was measured.

    Each has weights as shares, and opened ones; the factors and the result of the largest product several times over;
    and a dozen arrays of the largest of scores and hidden. Under CHEETAH, the polynomials of its products instead.
    """
    T, L, N, D, V = num_tokens, config.num_layers, config.num_heads, config.model_dim, config.vocab_size
    found, is_cheetah = work(config, T, plain, setting.protocol, logits, embedding), setting.protocol == "cheetah"
    private = {kind: [part for part in parts if part.private and part.products] for kind, parts in found.items()}
    once = [size for kind in ("embedding", "vocabulary") for part in private.pop(kind, []) for size in _weights(part)]
    inside = sum(part.parts * size for parts in private.values() for part in parts for size in _weights(part))
    if embedding == "public":
        once += [V * D] if is_cheetah else [V * D, V * D]
    matrices = max(*once, inside / L) if of.streamed else sum(once) + inside
    if is_cheetah:
        return setting.num_parties * 8 * 4 * matrices + 1.7e9 + ciphertext_memory(found, of.piece)
    shapes = [shape for parts in found.values() for part in parts for shape in part.products]
    largest = max(rows * inner + inner * columns + rows * columns for rows, inner, columns in shapes)
    activations = max(N * T * (T + config.num_slots), T * config.hidden_dim)
    held, multiplied, copies = _ARRAYS[setting.protocol]
    return _ENGINE + setting.num_parties * 8 * (held * matrices + multiplied * largest + copies * activations)


_ENGINE = 0.3e9  # before there is any model
# Of 8 bytes, in each party: of every weight, of every number of the largest product, and of one operation's.
_ARRAYS = {"semi2k": (2, 6, 16), "aby3": (2, 3, 24)}


def _weights(part: Work) -> list[int]:
    return [inner * columns for _, inner, columns in part.products]


def ciphertext_memory(found: dict[str, list[Work]], piece: int = 0) -> float:
    """Bytes that CHEETAH's two parties hold at their peak, roughly, beside what they hold of any model.

    The largest product's factors and results as polynomials, and some 16 kB for each number of the largest nonlinear
    operation.

    Args:
      piece: of how many weights a product is at most.
    """
    polynomial, largest = 3 * 8 * SLOTS, 0  # three moduli
    for kind, parts in found.items():
        for of in parts:
            for rows, inner, columns in of.products:
                count = math.ceil(inner * columns / piece) if piece and of.private else 1
                cut = (
                    (math.ceil(inner / count), columns) if kind == "embedding" else (inner, math.ceil(columns / count))
                )
                largest = max(largest, _polynomials((rows, *cut)))
    parts = [of for kind, parts in found.items() if kind != "vocabulary" for of in parts]
    most = max((max((*of.elements, *of.multiplied), default=0) for of in parts), default=0)
    return largest * polynomial + 16e3 * most


def _polynomials(shape: tuple[int, int, int]) -> int:
    rows, inner, columns = blocks(shape)
    return rows * inner + inner * columns + rows * columns
