"""Figure 7: shares of heads by quarter of the entropy range, as the regulariser's tolerance grows.

    jax-entropy sweep figure7 --jobs=2

The paper: 0.7 % of the heads in the top quarter up to 0.15, then 2.08, 3.47 and 6.25 % at 0.20, 0.25 and 0.30. The
picture is drawn of the first seed.
"""

from jax_entropy.sweep import SCALES, Sweep, product

TOLERANCES = [0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30]


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Figure 7: the tolerance of the regulariser",
        points=product({"architecture": ["EReg(SM(t)+ScFuFFN)"], "penalty.tolerance": TOLERANCES}),
        baselines=["EReg(SM(t)+ScFuFFN), tolerance=0.2"],
        pictures=["comparison"],
        **SCALES[scale],
    )
