"""What fixed point can hold: values of a forward pass that would leave its range are found before anything is shared.

With f fraction bits of 64, a product carries 2f of them, and the exponential's Taylor form only holds above −2ⁿ⁺¹.
"""

from collections.abc import Sequence

import jax
import numpy as np

from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.program.export import Export, one_hot
from jax_entropy.private.program.forward import forward
from jax_entropy.private.program.stage import TOKENS, external_inputs, run_stage


def largest_value(setting: Setting) -> float:
    """Largest magnitude whose products stay in the ring, one bit left for their sums."""
    return 2.0 ** (62 - 2 * setting.fraction_bits)


def lowest_exponent(setting: Setting) -> float:
    """Lowest difference from a row's largest score that the exponential takes to 0."""
    return -1.9 * 2.0**setting.exponent_iterations if setting.exponent == "taylor" else -np.inf


def check_range(exported: Export, tokens: Sequence[int], setting: Setting) -> dict[str, float]:
    """Runs a model in float32 on tokens and returns the largest magnitude of every kind of stage.

    Raises UserError naming the layer and the value that fixed point would not hold.
    """
    shape, stages = exported.shape, forward(exported.shape, len(tokens))
    entered = one_hot(tokens, shape.vocab_size) if shape.steps.one_hot else np.asarray(tokens, np.int32)
    known = {name: (exported.weights | {TOKENS: entered})[name] for name in external_inputs(stages)}
    for name, value in exported.weights.items():
        _check(f"the weight {name}", float(np.abs(value).max()), setting)
    largest: dict[str, float] = {}
    for stage in stages:
        where = stage.kind if stage.layer is None else f"{stage.kind} of layer {stage.layer}"
        if stage.kind in ("LayerNorm", "RMSNorm"):  # it sums squares
            x = np.asarray(known["x"], np.float64)
            _check(
                f"a sum of squares in {where}", float(np.square(x - x.mean(-1, keepdims=True)).sum(-1).max()), setting
            )
        if stage.kind == "softmax":
            _check_scores(np.asarray(known["scores"]), where, setting)
        results = run_stage(stage, known)
        for value in results:
            size = float(np.abs(np.asarray(value)).max())
            _check(f"a value in {where}", size, setting)
            largest[stage.kind] = max(largest.get(stage.kind, 0.0), size)
        known |= zip(stage.outputs, results, strict=True)
    return largest


def _check(what: str, value: float, setting: Setting) -> None:
    if not value <= (limit := largest_value(setting)):
        raise UserError(
            f"{what} reaches {value:.4g}, and with --fraction_bits={setting.fraction_bits} fixed point holds "
            f"{limit:.4g}; fewer fraction bits hold more"
        )


def _check_scores(scores_NxTxT: np.ndarray, where: str, setting: Setting) -> None:
    seen_TxT = np.tril(np.ones(scores_NxTxT.shape[1:], bool))
    lowest = np.where(seen_TxT, scores_NxTxT, np.inf).min(-1) - np.where(seen_TxT, scores_NxTxT, -np.inf).max(-1)
    if (value := float(lowest.min())) < (limit := lowest_exponent(setting)):
        raise UserError(
            f"a score in the {where} lies {-value:.4g} below its row's largest, and the exponential with "
            f"--exponent_iterations={setting.exponent_iterations} holds down to {limit:.4g}; raise them, or take "
            "--exponent=pade"
        )


def random_tokens(vocab_size: int, num_tokens: int) -> list[int]:
    """Tokens to try a model on where there is no text."""
    return jax.device_get(jax.random.randint(jax.random.key(0), (num_tokens,), 0, vocab_size)).tolist()
