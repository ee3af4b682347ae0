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
# # Quickstart
#
# Train a small language model whose only nonlinearity is softmax, watch the entropy of every attention head while it
# learns, and use what came out. Two minutes on two CPU cores; a GPU or TPU is taken where there is one.
#
# Everything here is a function that a command of the shell calls too: `je.train` is `jax-entropy train`, and so on.

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
import tempfile
from pathlib import Path

import jax
import numpy as np
from IPython.display import Image, display

import jax_entropy as je
from jax_entropy.census import census

STEPS = 200
WORKDIR = Path(tempfile.mkdtemp()) / "quickstart"
print(jax.devices())

# %% [markdown]
# ## A configuration
#
# An architecture is a line in the paper's notation. `EReg(SM(t)+ScFuFFN)` has no LayerNorm and no activation: softmax with
# a learned temperature (`SM(t)`), a feed-forward that is one scaled matrix (`ScFuFFN`), and a penalty that holds each head's
# entropy near a threshold that it learns (`EReg`). The text is the source of Python's standard library, which is on every
# machine.

# %%
config = je.default_config("EReg(SM(t)+ScFuFFN)")
config.model.update(num_layers=6, num_heads=4, model_dim=128, init_std=0.05, temperature_init=0.1, scan_unroll=6)
config.data.vocab_size = 4096
config.train.update(num_steps=STEPS, batch_size=32, log_every=10, evaluate_every=50, checkpoint_every=50)
config.optimizer.learning_rate = 3e-3
config.penalty.update(weight=0.16, reduction="row_mean")

# %% [markdown]
# ## Train
#
# Interrupt the cell when you like: run again, it goes on where its last checkpoint left it.

# %%
trained = je.train(config, WORKDIR)

# %% [markdown]
# ## Look at the heads
#
# A cell is a head. Dark: it looks at one token; light: at all of them alike. At the first step all heads are the same, and
# they learn to differ.

# %%
written = je.report(WORKDIR)
display(Image(written["head_entropy"], width=900))

# %% [markdown]
# `written["page"]` is one HTML file with everything on a slider, which the next notebook shows.
#
# ## Measure
#
# On held-out text. Bits per byte compare models whose tokenizers differ; entropies are in nats, one row a layer.

# %%
run = je.load_run(WORKDIR)  # the newest good checkpoint, once for all that follows
measured = je.evaluate(run)
print(f"perplexity {measured['validation_perplexity']:.1f}, {measured['bits_per_byte']:.3f} bits per byte")
print(np.array_str(np.asarray(measured["head_entropy"]), precision=2))
collapse, *_, overload = je.head_bands(measured["head_entropy"], je.max_entropy(128, "causal"))
print(
    f"collapse {collapse:.0%}, overload {overload:.0%} of heads: in the bottom and the top quarter of what a head can have"
)

# %% [markdown]
# ## Write
#
# A minute of training makes no programmer; the words are Python's.

# %%
print("    def __init__(self" + je.generate(run, "    def __init__(self", num_tokens=48, temperature=0.6, top_k=20))

# %% [markdown]
# ## What it costs under encryption
#
# Linear parts are cheap there, nonlinear ones are not. The census counts those of a forward pass, beside the same model
# with LayerNorm and GELU:

# %%
for name in ("SM+LN+G", "EReg(SM(t)+ScFuFFN)"):
    sizes = dict(num_layers=6, num_heads=4, model_dim=128, vocab_size=4096)
    counted = census(je.architecture(name, **sizes))
    operations = ", ".join(f"{op.name} {op.elements:,}" for op in counted.operations)
    print(f"{name}: {counted.parameters:,} parameters; elements of {operations}")

# %% [markdown]
# ## One call of the operator
#
# All of this rests on an attention that returns the entropy of its rows beside its result, and lets gradients through it:

# %%
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 64))  # [B, T, N, H]
out, stats = je.attention(q, k, v)
gradient = jax.grad(lambda q: je.attention(q, k, v)[1].entropy.mean())(q)
print(stats.entropy.shape, "nats, a row each; heads:", je.head_entropy(stats.entropy), "gradient", gradient.shape)

# %% [markdown]
# ## Where next
#
# * *Collapse and overload, seen live*: three architectures on one slider.
# * *Entropy in your own Flax model*: the penalty and QK-clip in a model that is not ours.
# * *Private inference on your laptop*: the trained model answers without seeing the prompt.
# * *Reproduce a table*: many models, several seeds, one table.
