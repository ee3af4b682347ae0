"""Table 6: what keeps a softmax-only model from collapse: normalised weights or a scaled feed-forward.

    jax-entropy sweep table6 --jobs=2

The paper's scaled feed-forward is probably the fused one; the same authors print 3.50 for the unfused.
"""

from jax_entropy.sweep import SCALES, Published, Sweep, product

PAPER = {"SM+WNorm(FFN)": 3.640, "SM+SNorm(FFN)": 3.624, "SM+ScFFN": 3.50, "SM+ScFuFFN": 3.478}


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Table 6: against collapse without LayerNorm",
        points=product({"architecture": ["SM+LN+G", "SM", *PAPER]}),
        baselines=["SM+LN+G"],
        published={"SM+LN+G": Published(2.69)} | {name: Published(perplexity) for name, perplexity in PAPER.items()},
        pictures=["layer_entropy"],
        **SCALES[scale],
    )
