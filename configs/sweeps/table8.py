"""Table 8: Table 3 with half as many layers again.

jax-entropy sweep table8 --jobs=2
"""

from jax_entropy.sweep import SCALES, Published, Sweep, product

PAPER = {
    "SM+LN+G": Published(2.56, 37.17, 10.77),
    "SM+LN+R": Published(2.63, 13.34, 8.04),
    "SM+ScFuFFN": Published(3.24, 8.83, 6.07),
    "EReg(SM(t)+ScFuFFN)": Published(3.13, 8.83, 6.07),
}


def get_sweep(scale: str) -> Sweep:
    layers = {"short": 6, "small": 9, "gpu": 18, "full": 18}[scale]
    return Sweep(
        title=f"Table 8: {layers} layers",
        points=product({"architecture": list(PAPER)}),
        fields={"model.num_layers": layers},
        baselines=["SM+LN+G"],
        published=PAPER,
        **SCALES[scale],
    )
