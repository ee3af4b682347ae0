"""The paper's own communication and latency (Tables 3, 4, 7, 8; BumbleBee) from an architecture alone.

Coefficients are least squares over the published rows; they describe that system, not the engine measured here.
"""

from typing import NamedTuple

from jax_entropy.architecture import ModelConfig
from jax_entropy.census import census
from jax_entropy.errors import UserError


class PaperCost(NamedTuple):
    """Gigabytes (1e9) in both directions, minutes on the paper's network."""

    gigabytes: float
    minutes: float


# Kilobytes per element. Only GELU − ReLU is identified by the rows; ReLU's part of it is taken from BumbleBee's own.
_SOFTMAX, _LAYER_NORM, _GELU, _RELU = 1.675, 0.845, 3.470, 0.104
# Megabytes per token and layer of the linear layers at D=768, kilobytes per token and entry of the vocabulary.
_FFN_FULL, _FFN_FUSED, _ATTENTION, _VOCABULARY, _TOKEN = 0.486, 0.147, 0.432, 0.199, 2.39
_COVERED = {"softmax", "LayerNorm", "GELU", "GELU (tanh)", "ReLU"}


def paper_cost(config: ModelConfig) -> PaperCost:
    """What the paper's system would report for one token after a prompt of `context_length` tokens.

    Raises:
      UserError: what its tables do not cover: other sizes than D=768 with 12 heads, other norms, activations or parts.
    """
    parts = config.conv_width, config.rotary, config.value_residual, config.value_embedding, config.num_slots
    names = {operation.name for operation in census(config).operations}
    if (config.model_dim, config.num_heads) != (768, 12) or not names <= _COVERED or any(parts):
        raise UserError(
            "the paper's tables are for model_dim=768 and num_heads=12 with LayerNorm, GELU or ReLU and no other part, "
            f"not for {config} at model_dim={config.model_dim}, num_heads={config.num_heads}"
        )
    T, D, F, L, N = config.context_length, config.model_dim, config.hidden_dim, config.num_layers, config.num_heads
    V, with_ffn = config.vocab_size, L - config.ffn_free_layers
    fused, gelu, relu = config.ffn == "fused", config.activation.startswith("gelu"), config.activation == "relu"
    norms = (L + with_ffn) if config.norm == "layer" else 0
    pairs = T * sum(window + config.num_slots for window in config.windows)  # of queries and keys in all layers
    kilobytes = _SOFTMAX * N * pairs + _LAYER_NORM * norms * T * D
    kilobytes += (_GELU * gelu + _RELU * relu) * with_ffn * T * F + _VOCABULARY * T * V
    megabytes = T * (with_ffn * (_FFN_FUSED if fused else _FFN_FULL) + L * _ATTENTION + _TOKEN)
    minutes = 3.33e-6 * pairs + with_ffn * T * (1.55e-3 * gelu + 2.9e-4 * relu) + 6.25e-4 * L * T
    minutes += (0.0336 + 2.64e-4 * T if fused else 0.0704 + 5.34e-4 * T) * with_ffn + 0.372 * T * V / 1e6
    return PaperCost(kilobytes / 1e6 + megabytes / 1e3, minutes)
