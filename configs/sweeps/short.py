"""Eight architectures in little time, the paper's and those with free parts: the table of README.md.

    jax-entropy sweep short

4 layers of width 64 on 1.6 million tokens, three seeds, learning rates chosen after a quarter of the steps. Smaller
than the other sweeps' `small`, whose text it reads; the other scales are theirs.
"""

from jax_entropy.sweep import SCALES, Published, Sweep, Tuning, product

PARTS = "+Conv4+RoPE+VRes"
PAPER = {
    "SM+LN+G": Published(2.69, 25.32, 8.21),
    "EReg(SM(t)+ScFuFFN)": Published(3.21, 6.43, 4.76),
    "SM+ScFuFFN": Published(3.48, 6.43, 4.76),
    f"SM+ScFuFFN{PARTS}": Published(),
    f"SM+LN+G{PARTS}": Published(),
    "SM+LN+R": Published(2.76, 9.44, 6.06),
    "SM(t)+ScFuFFN": Published(),
    "SM": Published(),
}
LITTLE = dict(
    fields={
        "model.num_layers": 4, "model.num_heads": 2, "model.model_dim": 64, "model.init_std": 0.07,
        "model.scan_unroll": 1, "train.batch_size": 16, "train.num_steps": 800, "train.evaluate_chunks": 512,
    },
    tuning=Tuning((1e-3, 3e-3, 1e-2), share=0.25),
)  # fmt: skip


def get_sweep(scale: str) -> Sweep:
    return Sweep(
        title="Perplexity beside private cost",
        points=product({"architecture": list(PAPER)}),
        baselines=["SM+LN+G", f"SM+LN+G{PARTS}"],
        published=PAPER,
        pictures=["comparison"],
        **SCALES[scale] | (LITTLE if scale == "small" else {}),
    )
