"""Twelve architectures, the paper's and those with free parts, beside their private cost: the table of README.md.

jax-entropy sweep frontier --scale=short
"""

from jax_entropy.sweep import SCALES, Published, Sweep, product

PARTS = "+Conv4+RoPE+VRes"
CHEAPER = f"{PARTS}+Win(SSSL,64)"  # sends less than the model without parts
PAPER = {
    "SM+LN+G": Published(2.69, 25.32, 8.21),
    "SM+LN+R": Published(2.76, 9.44, 6.06),
    "SM": Published(),
    "SM+ScFuFFN": Published(3.48, 6.43, 4.76),
    "SM(t)+ScFuFFN": Published(),
    "EReg(SM(t)+ScFuFFN)": Published(3.21, 6.43, 4.76),
    f"SM+ScFuFFN{PARTS}": Published(),
    f"PSM(4)+ScFuFFN{PARTS}": Published(),
    f"EReg(SM(t)+ScFuFFN{PARTS})": Published(),
    f"EReg(SM(t)+ScFuFFN{CHEAPER})": Published(),
    f"SM+LN+G{PARTS}": Published(),
    f"SM+LN+G{CHEAPER}": Published(),
}


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Twelve architectures",
        points=product({"architecture": list(PAPER)}),
        baselines=["SM+LN+G", f"SM+LN+G{PARTS}", f"SM+LN+G{CHEAPER}"],
        published=PAPER,
        pictures=["comparison"],
        **SCALES[scale],
    )
