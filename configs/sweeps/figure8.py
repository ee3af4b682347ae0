"""Figure 8: mean entropy of each layer over training, of the softmax-only models with and without the regulariser.

    jax-entropy sweep figure8 --jobs=2

The pictures are drawn of the first seed.
"""

from jax_entropy.sweep import SCALES, Sweep, product


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Figure 8: layer entropies over training, softmax-only",
        points=product({"architecture": ["SM+LN+G", "SM+ScFuFFN", "SM(t)+ScFuFFN", "EReg(SM(t)+ScFuFFN)"]}),
        baselines=["SM+LN+G"],
        pictures=["layer_entropy"],
        **SCALES[scale],
    )
