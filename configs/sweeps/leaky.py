"""Leaky ReLU without LayerNorm, its slope fixed or learned (ReLU's Revival, arXiv 2410.09637).

jax-entropy sweep leaky --jobs=2
"""

from jax_entropy.sweep import SCALES, Sweep, product

ARCHITECTURES = ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R", "SM+LR(0.01)", "SM+LR(0.1)", "SM+LR(layer)", "SM+LR(global)"]


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Leaky ReLU without LayerNorm",
        points=product({"architecture": ARCHITECTURES}),
        baselines=["SM+LN+G"],
        **SCALES[scale],
    )
