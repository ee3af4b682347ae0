"""What keeps a softmax-only model from collapse at learning rates that are too high for the plain one.

    jax-entropy sweep stabilisers --jobs=2

The rate is the question here: it is not tuned.
"""

from jax_entropy.sweep import SCALES, Sweep, product

NAMES = [
    "SM+LN+G", "SM+ScFuFFN", "SM(t)+ScFuFFN", "EReg(SM(t)+ScFuFFN)", "SM+SReparam(QK)+ScFuFFN", "SM+DyT+ScFuFFN",
    "SM+ScFuFFN+QKN", "SM+ScFuFFN+Cap(30)",
]  # fmt: skip


def get_sweep(scale: str) -> Sweep:
    rates = {"optimizer.learning_rate": [3e-3, 1e-2, 3e-2]}
    clipped = {"architecture": ["SM+ScFuFFN"], "optimizer.qk_clip": [100.0]}
    return Sweep(
        title="Against collapse at high learning rates",
        points=product({"architecture": NAMES} | rates) + product(clipped | rates),
        baselines=["SM+LN+G, learning_rate=0.003"],
        **SCALES[scale] | dict(tuning=None),
    )
