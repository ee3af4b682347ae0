"""The memory that a private run will need, checked before there are any weights."""

from pathlib import Path

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError
from jax_entropy.private.cost.work import SLOTS, Work, blocks, work
from jax_entropy.private.engine.engine import Setting


def check_size(config: ModelConfig, num_tokens: int, setting: Setting, plain: bool) -> None:
    """Checks that a run fits, to be called before variables are made.

    Per party: weights as shares, masks and products, and a dozen arrays of the largest of scores, hidden and one-hot;
    under CHEETAH, the polynomials of its products instead of arrays.

    Raises:
      UserError: the tokens do not fit into the context, or a run into the memory that is free.
    """
    if not 1 <= num_tokens <= config.context_length:
        raise UserError(
            f"num_tokens={num_tokens} must lie between 1 and the model's context_length={config.context_length}"
        )
    T, L, N = num_tokens, config.num_layers, config.num_heads
    matrices = (
        4 + 2 * config.hidden_dim / config.model_dim
    ) * config.model_dim**2 * L + 2 * config.vocab_size * config.model_dim
    needed = setting.num_parties * 8 * 4 * matrices
    if setting.protocol == "cheetah":
        needed += 1.7e9 + ciphertext_memory(work(config, T, plain))
    else:
        copies = {"semi2k": 16, "aby3": 24}[setting.protocol]
        needed += setting.num_parties * 8 * copies * max(N * T * T, T * config.hidden_dim, T * config.vocab_size)
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = 1024 * int(next(line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return
    if needed > free:
        raise UserError(
            f"{config} on {T} tokens under {setting.protocol} needs some {needed / 1e9:.0f} GB, and "
            f"{free / 1e9:.0f} GB are free; take fewer tokens, layers or entries of the vocabulary"
        )


def ciphertext_memory(found: dict[str, Work]) -> float:
    """Bytes that CHEETAH's two parties hold at their peak, roughly, beside what they hold of any model.

    The largest product's factors and results as polynomials, and some 16 kB for each number of the largest nonlinear
    operation.
    """
    polynomial = 3 * 8 * SLOTS  # three moduli
    most = max((max((*of.elements, of.multiplied), default=0) for of in found.values()), default=0)
    return max(map(_polynomials, {shape for of in found.values() for shape in of.products})) * polynomial + 16e3 * most


def _polynomials(shape: tuple[int, int, int]) -> int:
    rows, inner, columns = blocks(shape)
    return rows * inner + inner * columns + rows * columns
