"""The deepest feed-forwards dropped, with and without the regulariser (AERO, arXiv 2410.13060v2).

jax-entropy sweep pruned --jobs=2
"""

from jax_entropy.sweep import SCALES, Published, Sweep, product


def get_sweep(scale: str) -> Sweep:
    few, half = {"short": (1, 2), "small": (1, 3), "gpu": (2, 6), "full": (2, 6)}[scale]
    bodies = ["ScFuFFN", f"ScFuFFN^{few}", f"ScFuFFN^{half}"]
    paper = {"SM+ScFuFFN": Published(3.48, 6.43, 4.76), "EReg(SM(t)+ScFuFFN)": Published(3.21, 6.43, 4.76)}
    paper |= {
        f"SM+ScFuFFN^{half}": Published(3.54, 6.29, 4.23),
        f"EReg(SM(t)+ScFuFFN^{half})": Published(3.25, 6.29, 4.23),
    }
    names = [f"SM+{body}" for body in bodies] + [f"EReg(SM(t)+{body})" for body in bodies]
    return Sweep(
        title="Feed-forwards of the deepest layers dropped",
        points=product({"architecture": ["SM+LN+G", *names]}),
        baselines=["SM+LN+G"],
        published={"SM+LN+G": Published(2.69, 25.32, 8.21)} | paper,
        **SCALES[scale],
    )
