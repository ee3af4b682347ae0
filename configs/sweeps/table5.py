"""Table 5: weight and spectral normalisation of linear layers in place of LayerNorm.

jax-entropy sweep table5 --jobs=2
"""

from jax_entropy.sweep import SCALES, Published, Sweep, product

# linear layers: weight norm, spectral norm
PAPER = {
    "QK": (3.89, 4.25),
    "FFN": (3.64, 3.63),
    "QK+FFN": (3.88, 4.23),
    "QKV+FFN": (3.93, 4.26),
    "QKVO+FFN": (3.98, 4.34),
}


def get_sweep(scale: str) -> Sweep:
    printed = {
        f"SM+{kind}Norm({layers})": Published(perplexity)
        for layers, both in PAPER.items()
        for kind, perplexity in zip("WS", both, strict=True)
    }
    return Sweep(
        title="Table 5: normalised weights in place of LayerNorm",
        points=product({"architecture": ["SM+LN+G", "SM", *printed]}),
        baselines=["SM+LN+G"],
        published={"SM+LN+G": Published(2.69)} | printed,
        **SCALES[scale],
    )
