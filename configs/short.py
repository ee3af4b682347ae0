"""The paper's experiments in little time: 4 layers, width 64, 1 million tokens of real Python; minutes on a core.

    jax-entropy train --config=short:SM+LN+G --workdir=runs/short
    jax-entropy sweep frontier --scale=short

Text as of configs/small.py: the Python files of the packages that are installed beside this one;
--config.data.files='FOLDER/**/*.py' names others. What it took, and what came out, is in docs/reproduction.md.
"""

import sysconfig

from jax_entropy.config import default_config


def get_config(architecture: str = "EReg(SM(t)+ScFuFFN)"):
    config = default_config(architecture)
    config.model.update(
        num_layers=4, num_heads=2, model_dim=64, context_length=128, init_std=0.07, temperature_init=0.1, scan_unroll=1
    )
    config.data.update(source="files", files=f"{sysconfig.get_path('purelib')}/**/*.py", vocab_size=8192)
    config.train.update(
        num_steps=1000, batch_size=8, log_every=50, evaluate_every=500, evaluate_chunks=512, checkpoint_every=500
    )
    config.optimizer.update(learning_rate=3e-3, warmup=50)  # steps, also where a rate is chosen on fewer
    config.penalty.update(weight=0.16, reduction="row_mean")  # 0.16: the paper's 1e-5 of the sum, per row
    return config
