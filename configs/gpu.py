"""The paper's experiments at the scale of one GPU: its model, 12 layers of width 768, on fewer tokens of Python.

    jax-entropy train --config=gpu:SM+LN+G --workdir=runs/gpu
    jax-entropy sweep table3 --scale=gpu

Text: the Python files of the packages that are installed beside this one; --config.data.files='FOLDER/**/*.py' names
others. 33 million tokens; we have not run it yet.
"""

import sysconfig

from jax_entropy.config import default_config


def get_config(architecture: str = "EReg(SM(t)+ScFuFFN)"):
    config = default_config(architecture)
    config.model.temperature_init = 1e-2
    config.data.update(source="files", files=f"{sysconfig.get_path('purelib')}/**/*.py", vocab_size=16_384)
    config.train.update(
        num_steps=2000, batch_size=128, dtype="bfloat16", log_every=50, evaluate_every=500, evaluate_chunks=4096,
        checkpoint_every=500,
    )  # fmt: skip
    config.penalty.update(weight=0.16, reduction="row_mean")  # 0.16: the paper's 1e-5 of the sum, per row
    return config
