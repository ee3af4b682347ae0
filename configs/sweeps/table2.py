"""Table 2: what taking out LayerNorm and the activation costs in perplexity.

jax-entropy sweep table2 --jobs=2
"""

from jax_entropy.sweep import SCALES, Published, Sweep, product

PAPER = {"SM+LN+G": 2.69, "SM+LN+R": 2.76, "SM+LN": 3.38, "SM+G": 3.20, "SM+R": 2.94, "SM": None}  # SM: NaN


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Table 2: LayerNorm and activation taken out",
        points=product({"architecture": list(PAPER)}),
        baselines=["SM+LN+G"],
        published={name: Published(perplexity) for name, perplexity in PAPER.items()},
        **SCALES[scale],
    )
