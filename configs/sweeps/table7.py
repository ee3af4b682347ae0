"""Table 7: Table 3 at a context of 256 tokens.

jax-entropy sweep table7 --jobs=2
"""

from jax_entropy.sweep import SCALES, Published, Sweep, product

PAPER = {
    "SM+LN+G": Published(2.35, 58.51, 16.57),
    "SM+LN+R": Published(2.41, 26.73, 12.59),
    "SM+ScFuFFN": Published(3.03, 20.72, 10.45),
    "EReg(SM(t)+ScFuFFN)": Published(2.92, 20.72, 10.45),
}


def get_sweep(scale: str) -> Sweep:
    batch = {"short": 4, "small": 16, "gpu": 64, "full": 64}[scale]  # as many tokens a step as at 128
    return Sweep(
        title="Table 7: a context of 256 tokens",
        points=product({"architecture": list(PAPER)}),
        fields={"model.context_length": 256, "train.batch_size": batch},
        baselines=["SM+LN+G"],
        published=PAPER,
        **SCALES[scale],
    )
