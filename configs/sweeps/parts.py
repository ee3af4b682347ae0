"""What each part without a nonlinearity brings, alone and together, to the softmax-only model and to the baseline.

jax-entropy sweep parts --jobs=2
"""

from jax_entropy.architecture import PARTS
from jax_entropy.sweep import SCALES, Sweep, product

TOGETHER = "Conv4+RoPE+VRes"
BASELINES = ["SM+LN+G", f"SM+LN+G+{TOGETHER}"]


def get_sweep(scale: str) -> Sweep:
    names = [f"{body}{part and '+' + part}" for body in ("SM+ScFuFFN", "SM+LN+G") for part in ("", *PARTS, TOGETHER)]
    regularised = ["EReg(SM(t)+ScFuFFN)", f"EReg(SM(t)+ScFuFFN+{TOGETHER})"]
    return Sweep(
        title="Parts without a nonlinearity",
        points=product({"architecture": [*names, *regularised]}),
        baselines=BASELINES,
        **SCALES[scale],
    )
