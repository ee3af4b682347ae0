"""What each part without a nonlinearity brings, alone and together, to the softmax-only model and to the baseline.

    jax-entropy sweep parts --jobs=2

Both ratios are told: to the plain baseline, and to the one with the same parts.
"""

from jax_entropy.sweep import SCALES, Sweep, product

FREE = ["Conv4", "RoPE", "VRes"]
TOGETHER = "Conv4+RoPE+VRes"


def get_sweep(scale: str) -> Sweep:
    names = [f"{body}+{part}" for body in ("SM+ScFuFFN", "SM+LN+G") for part in (*FREE, TOGETHER)]
    more = ["EReg(SM(t)+ScFuFFN)", f"EReg(SM(t)+ScFuFFN+{TOGETHER})", f"SM+BiFFN+{TOGETHER}"]
    return Sweep(
        title="Parts without a nonlinearity",
        points=product({"architecture": ["SM+LN+G", "SM+ScFuFFN", *names, *more]}),
        baselines=["SM+LN+G", f"SM+LN+G+{TOGETHER}"],
        **SCALES[scale],
    )
