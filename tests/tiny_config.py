"""A run of seconds on one package of the standard library; tests override what they need."""

import asyncio
from pathlib import Path

from jax_entropy.config import default_config


def get_config(architecture: str = "EReg(SM(t)+ScFuFFN)"):
    config = default_config(architecture)
    config.model.update(num_layers=2, num_heads=2, model_dim=32, context_length=32, init_std=0.1, temperature_init=0.1)
    config.data.update(source="files", files=str(Path(asyncio.__file__).parent), vocab_size=512)
    config.train.update(
        num_steps=24, batch_size=8, log_every=4, evaluate_every=8, evaluate_chunks=16, checkpoint_every=6
    )
    config.optimizer.learning_rate = 3e-3
    config.penalty.update(weight=0.1, reduction="row_mean")
    return config
