"""The memory that a private run will need, checked before there are any weights."""

import math
import re
from pathlib import Path

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


def check_size(
    config: ModelConfig, num_tokens: int, setting: Setting, plain: bool, *, limit: float, logits: str = "every",
    embedding: str = "shared",
) -> None:  # fmt: skip
    """Checks that a run fits, to be called before variables are made.

    Per party: weights as shares, masks and products, and a dozen arrays of the largest of scores, hidden, one-hot and
    logits; under CHEETAH, the polynomials of its products instead of arrays.

    Args:
      limit: bytes that the engine may take.
      logits, embedding: as `profile`.
    Raises:
      UserError: the tokens do not fit into the context, or a run into the limit.
    """
    if not 1 <= num_tokens <= config.context_length:
        raise UserError(
            f"num_tokens={num_tokens} must lie between 1 and the model's context_length={config.context_length}"
        )
    T, L, N, D, V = num_tokens, config.num_layers, config.num_heads, config.model_dim, config.vocab_size
    is_shared = embedding == "shared"
    matrices = (4 + 2 * config.hidden_dim / D) * D**2 * L + (2 if is_shared else 1) * V * D
    needed = setting.num_parties * 8 * 4 * matrices
    if setting.protocol == "cheetah":
        needed += 1.7e9 + ciphertext_memory(work(config, T, plain, setting.protocol, logits))
    else:
        copies = {"semi2k": 16, "aby3": 24}[setting.protocol]
        rows = T if is_shared or logits == "every" else 1
        needed += setting.num_parties * 8 * copies * max(N * T * T, T * config.hidden_dim, rows * V)
    if needed > limit:
        hints = [
            *(["one token's logits (logits=last)"] if logits == "every" else []),
            *(["a table that is given away (embedding=public)"] if is_shared else []),
        ]
        raise UserError(
            f"{config} on {T} tokens under {setting.protocol} needs some {needed / 1e9:.0f} GB, and "
            f"{limit / 1e9:.0f} GB are free; take fewer tokens, layers or entries of the vocabulary"
            + "".join(f", or {hint}" for hint in hints)
        )


def ciphertext_memory(found: dict[str, list[Work]]) -> float:
    """Bytes that CHEETAH's two parties hold at their peak, roughly, beside what they hold of any model.

    The largest product's factors and results as polynomials, and some 16 kB for each number of the largest nonlinear
    operation.
    """
    polynomial = 3 * 8 * SLOTS  # three moduli
    parts = [of for parts in found.values() for of in parts]
    most = max((max((*of.elements, *of.multiplied), default=0) for of in parts), default=0)
    return max(map(_polynomials, {shape for of in parts for shape in of.products})) * polynomial + 16e3 * most


def _polynomials(shape: tuple[int, int, int]) -> int:
    rows, inner, columns = blocks(shape)
    return rows * inner + inner * columns + rows * columns
