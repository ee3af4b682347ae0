"""Figure 2: heads by quarter of the entropy range, and the loss over training, as nonlinearities are taken out.

    jax-entropy sweep figure2 --jobs=2

The pictures are drawn of the first seed.
"""

from jax_entropy.sweep import SCALES, Sweep, product


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Figure 2: heads by quarter, and the loss",
        points=product({"architecture": ["SM+LN+G", "SM+LN+R", "SM+LN", "SM+G", "SM+R", "SM"]}),
        baselines=["SM+LN+G"],
        pictures=["comparison"],
        **SCALES[scale],
    )
