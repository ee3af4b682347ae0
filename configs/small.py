"""The paper's experiments at the scale of two CPU cores: 6 layers, width 128, 8 million tokens of real Python.

    jax-entropy train --config=small:SM+LN+G --workdir=runs/small
    jax-entropy sweep table2 --scale=small --jobs=2

Text: the Python files of the packages that are installed beside this one; --config.data.files='FOLDER/**/*.py' names
others. What it took, and what came out, is in docs/reproduction.md.
"""

import sysconfig

from jax_entropy.config import default_config


def get_config(architecture: str = "EReg(SM(t)+ScFuFFN)"):
    config = default_config(architecture)
    config.model.update(
        num_layers=6, num_heads=4, model_dim=128, context_length=128, init_std=0.05, temperature_init=0.1, scan_unroll=6
    )
    config.data.update(source="files", files=f"{sysconfig.get_path('purelib')}/**/*.py", vocab_size=8192)
    config.train.update(
        num_steps=1954, batch_size=32, dtype="bfloat16", log_every=50, evaluate_every=500, evaluate_chunks=1024,
        checkpoint_every=250,
    )  # fmt: skip
    config.optimizer.update(learning_rate=3e-3, warmup=100)  # steps, also where a rate is chosen on fewer
    config.penalty.update(weight=0.16, reduction="row_mean")  # 0.16: the paper's 1e-5 of the sum, per row
    return config
