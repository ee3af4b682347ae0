"""Figure 6: the thresholds that the regulariser learns, by layer and head.

    jax-entropy sweep figure6 --jobs=2

The pictures are drawn of the first seed.
"""

from jax_entropy.sweep import SCALES, Sweep, product


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Figure 6: learned thresholds",
        points=product({"architecture": ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"]}),
        baselines=["SM+LN+G"],
        pictures=["thresholds"],
        **SCALES[scale],
    )
