"""Figure 3: the entropy of every head, as nonlinearities are taken out.

    jax-entropy sweep figure3 --jobs=2

The pictures are drawn of the first seed.
"""

from jax_entropy.sweep import SCALES, Sweep, product


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Figure 3: head entropies",
        points=product({"architecture": ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R", "SM"]}),
        baselines=["SM+LN+G"],
        pictures=["head_entropy"],
        **SCALES[scale],
    )
