# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reproduce a table
#
# Table 3 of the [paper](https://arxiv.org/abs/2501.03489) beside ours, small: four architectures from GPT-2's to one whose only
# nonlinearity is softmax, two seeds each, held-out perplexity beside what private execution costs. A sweep trains them, each run
# in a process of its own, and puts them into one table. A few minutes on two CPU cores.

# %%
REPOSITORY = "https://github.com/jax-entropy/jax_entropy"  # where to clone from; change it if yours lives elsewhere

import importlib.util
import shutil
import subprocess
import sys

if importlib.util.find_spec("jax_entropy") is None:
    # with JAX for the accelerator that this runtime has: plain JAX would leave it idle
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if importlib.util.find_spec("libtpu") else ""
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "jax_entropy_clone"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"./jax_entropy_clone{extra}"], check=True)

# %%
import os
import tempfile
from pathlib import Path

from IPython.display import Image, Markdown, display

import jax_entropy as je
from jax_entropy.sweep import Published, Sweep, product

STEPS, SEEDS = 120, (1, 2)
WORKDIR = Path(tempfile.mkdtemp()) / "table3"

# %% [markdown]
# ## What is compared
#
# A point differs from the configuration in some fields, here in its architecture. Beside each stands what the paper prints of it:
# perplexity, gigabytes, minutes.

# %%
PAPER = {
    "SM+LN+G": Published(2.69, 25.32, 8.21),
    "SM+LN+R": Published(2.76, 9.44, 6.06),
    "SM+ScFuFFN": Published(3.48, 6.43, 4.76),
    "EReg(SM(t)+ScFuFFN)": Published(3.21, 6.43, 4.76),
}
config = je.default_config("SM+LN+G")
config.model.update(num_layers=4, num_heads=2, model_dim=64, init_std=0.07, temperature_init=0.1)
config.data.vocab_size = 1024
config.train.update(num_steps=STEPS, batch_size=16, log_every=20, evaluate_every=STEPS, checkpoint_every=STEPS)
config.train.evaluate_chunks = 256
config.optimizer.learning_rate = 3e-3
config.penalty.update(weight=0.16, reduction="row_mean")
table = Sweep(
    title="Table 3, small",
    config=config,
    points=product({"architecture": list(PAPER)}),
    seeds=SEEDS,
    baselines=["SM+LN+G"],
    published=PAPER,
)

# %% [markdown]
# ## Train
#
# Eight runs. Stopped or killed, the same cell goes on where they were; what is done is not done again. A sweep for a paper chooses
# the learning rate of each point first (`tuning=Tuning((1e-3, 3e-3, 1e-2))`), since one rate for all compares nothing: here that
# would take three times as long. On GPUs `jobs` is their number.

# %%
accelerator = shutil.which("nvidia-smi") or importlib.util.find_spec("libtpu")  # JAX here would take it from the runs
rows = je.sweep(table, WORKDIR, jobs=1 if accelerator else min(2, os.cpu_count()))

# %% [markdown]
# ## The table
#
# Perplexity is the mean over seeds ± their standard deviation, and the ratio to the baseline has the paper's beside it. Megabytes
# and rounds of a private forward pass are predicted at this size.

# %%
display(Markdown((WORKDIR / "table.md").read_text()))

# %% [markdown]
# Perplexities of so few steps are not the paper's, and neither is the distance between architectures. The cost is exact, and so is
# the order of it: what LayerNorm and GELU cost is the same however long one trains.
#
# ## Quality beside cost
#
# What nothing else beats in both is joined by a line.

# %%
display(Image(WORKDIR / "pictures" / "frontier-semi2k.png", width=900))

# %% [markdown]
# ## Where next
#
# * `jax-entropy sweep table3 --scale=short --jobs=2` is this table with three seeds and chosen learning rates, in about an hour on
#   two cores; `small`, `gpu` and `full` are larger. Each table and figure of the paper has its file in `configs/sweeps/`; what
#   came out is in `docs/reproduction.md`.
# * Every run is a workdir like any other: `je.report`, `je.evaluate` and `je.generate` work on `WORKDIR / "runs" / …`.
