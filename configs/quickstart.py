"""A small language model on Python's standard library, in a few minutes on two cores.

    jax-entropy train --config=configs/quickstart.py --workdir=runs/quickstart
    jax-entropy train --config=configs/quickstart.py:SM+LN+G --workdir=runs/baseline
"""

from jax_entropy.config import default_config


def get_config(architecture: str = "EReg(SM(t)+ScFuFFN)"):
    config = default_config(architecture)
    config.model.update(num_layers=6, num_heads=4, model_dim=128, context_length=128, init_std=0.05, temperature_init=0.1)
    config.data.update(source="stdlib", vocab_size=4096)
    config.train.update(num_steps=600, batch_size=32, log_every=20, evaluate_every=200, checkpoint_every=100)
    config.optimizer.learning_rate = 3e-3
    config.penalty.update(weight=0.16, reduction="row_mean")
    return config
