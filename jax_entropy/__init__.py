"""Entropy-guided attention for private language models: train, watch, repair and privately run them."""

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.attention import AttentionStats, attention
from jax_entropy.entropy import entropy_penalty, head_bands, head_entropy, max_entropy, row_entropy
from jax_entropy.huggingface.folder import from_huggingface, to_huggingface
from jax_entropy.loss import loss_fn
from jax_entropy.model import Aux, Transformer

__all__ = [
    "AttentionStats",
    "Aux",
    "ModelConfig",
    "Transformer",
    "architecture",
    "attention",
    "entropy_penalty",
    "from_huggingface",
    "head_bands",
    "head_entropy",
    "loss_fn",
    "max_entropy",
    "row_entropy",
    "to_huggingface",
]
