"""Table 3: from the baseline to the softmax-only model, with communication and latency; and the row that it leaves out.

    jax-entropy sweep table3 --jobs=2

SM(t)+ScFuFFN, learned temperatures without the entropy regulariser, is printed nowhere.
"""

from jax_entropy.sweep import SCALES, Published, Sweep, product

PAPER = {
    "SM+LN+G": Published(2.69, 25.32, 8.21),
    "SM+LN+R": Published(2.76, 9.44, 6.06),
    "SM+ScFuFFN": Published(3.48, 6.43, 4.76),
    "SM(t)+ScFuFFN": Published(),
    "EReg(SM(t)+ScFuFFN)": Published(3.21, 6.43, 4.76),
}


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Table 3: perplexity and private cost",
        points=product({"architecture": list(PAPER)}),
        baselines=["SM+LN+G"],
        published=PAPER,
        pictures=["thresholds"],
        **SCALES[scale],
    )
