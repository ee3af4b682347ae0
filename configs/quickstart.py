"""A small language model on Python's standard library, in a few minutes on two cores.

    jax-entropy train --config=configs/quickstart.py --workdir=runs/quickstart
    jax-entropy train --config=configs/quickstart.py:SM+LN+G --workdir=runs/baseline

Any architecture of the notation goes behind the colon. One epoch of 2.3 M tokens; run time and scores are in
docs/benchmarks/quickstart.md.
"""

from jax_entropy.config import default_config


def get_config(architecture: str = "EReg(SM(t)+ScFuFFN)"):
    config = default_config(architecture)
    config.model.update(
        num_layers=6, num_heads=4, model_dim=128, context_length=128, init_std=0.05, temperature_init=0.1, scan_unroll=6
    )
    config.data.update(source="stdlib", vocab_size=4096)
    config.train.update(num_steps=560, batch_size=32, log_every=20, evaluate_every=140, checkpoint_every=70)
    config.optimizer.learning_rate = 3e-3
    config.penalty.update(weight=0.16, reduction="row_mean")  # 0.16: the paper's 1e-5 of the sum, per row
    return config
