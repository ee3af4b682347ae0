"""Figure 5: mean entropy of each layer over training, with what is to keep a softmax-only model from collapse.

    jax-entropy sweep figure5 --jobs=2

The pictures are drawn of the first seed.
"""

from jax_entropy.sweep import SCALES, Sweep, product


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Figure 5: layer entropies over training",
        points=product({"architecture": ["SM+LN+G", "SM", "SM+WNorm(FFN)", "SM+SNorm(FFN)", "SM+ScFFN"]}),
        baselines=["SM+LN+G"],
        pictures=["layer_entropy"],
        **SCALES[scale],
    )
