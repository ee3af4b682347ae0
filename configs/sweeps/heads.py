"""Fewer and wider heads at equal width: the softmax costs as much as there are heads.

jax-entropy sweep heads --jobs=2
"""

from jax_entropy.sweep import SCALES, Sweep, product


def get_sweep(scale: str) -> Sweep:
    heads = {"short": [1, 2, 4], "small": [1, 2, 4, 8], "gpu": [3, 6, 12], "full": [3, 6, 12]}[scale]
    usual = {"short": 2, "small": 4, "gpu": 12, "full": 12}[scale]
    return Sweep(
        title="Fewer and wider heads",
        points=product({"architecture": ["SM+LN+G", "SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)"], "model.num_heads": heads}),
        baselines=[f"SM+LN+G, num_heads={usual}"],
        **SCALES[scale],
    )
