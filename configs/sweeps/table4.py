"""Table 4: the same architectures on books, T=512, after 1.2, 2.4 and 4.8 billion tokens.

    jax-entropy sweep table4 --scale=full --config.data.files=BOOKS/

Smaller scales ask the same of Python code, T=512, after a quarter, a half and all of the scale's tokens.
"""

from jax_entropy.sweep import SCALES, Published, Sweep, product, zipped

PAPER = {
    "SM+LN+G": (25.71, 23.32, 21.29),
    "SM+LN+R": (26.06, 23.55, 21.58),
    "SM+ScFuFFN": (33.77, 30.82, 28.59),
    "EReg(SM(t)+ScFuFFN)": (31.54, 28.70, 26.55),
}
COST = {"SM+LN+G": (145.24, 30.74), "SM+LN+R": (81.71, 23.54)}  # gigabytes, minutes
SOFTMAX_ONLY = (69.68, 19.44)


def get_sweep(scale: str) -> Sweep:
    options = SCALES[scale]
    if scale == "full":  # the books' own recipe; 4.8 billion tokens are twice the batch
        options = options | dict(config="languini")
        lengths = zipped({"train.num_steps": [18_265, 36_529, 36_529], "optimizer.accumulate": [4, 4, 8]})
    else:
        batch, steps = {"short": (2, 1000), "small": (8, 1954), "gpu": (32, 2000)}[scale]
        options = options | dict(fields={"model.context_length": 512, "train.batch_size": batch})
        lengths = product({"train.num_steps": [steps // 4, steps // 2, steps]})

    def label(architecture: str, length: dict[str, int]) -> str:
        return ", ".join([architecture, *(f"{name.rpartition('.')[2]}={value}" for name, value in length.items())])

    return Sweep(
        title="Table 4: longer training at T=512",
        points=[{"architecture": name} | length for length in lengths for name in PAPER],
        baselines=[label("SM+LN+G", length) for length in lengths],
        published={
            label(name, length): Published(perplexity, *COST.get(name, SOFTMAX_ONLY))
            for name, perplexities in PAPER.items()
            for length, perplexity in zip(lengths, perplexities, strict=True)
        },
        **options,
    )
