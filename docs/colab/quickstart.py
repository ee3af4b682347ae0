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
# # Attention entropy, watched and steered
#
# Under encryption the linear parts of a language model are cheap and the nonlinear ones are not. Take LayerNorm and GELU
# out of a GPT and only softmax is left, but training breaks, in two ways that the Shannon entropy of attention shows:
#
# * **overload**: heads attend to everything alike, their entropy stays at its maximum, and they learn nothing;
# * **collapse**: heads look at one token only, their entropy falls to 0, and gradients vanish or explode.
#
# This notebook trains a softmax-only model that shows both, then one whose entropy is regularised
# ([arXiv 2501.03489](https://arxiv.org/abs/2501.03489)). It takes about two minutes on two CPU cores.

# %%
REPOSITORY = "https://github.com/jax-entropy/jax_entropy"  # where to clone from; change it if yours lives elsewhere

import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jax_entropy") is None:
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "jax_entropy_clone"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "./jax_entropy_clone"], check=True)

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from IPython.display import Image, display

import jax_entropy as je
from jax_entropy import report
from jax_entropy.config import default_config
from jax_entropy.generate import generate
from jax_entropy.training.train import train

RUNS = Path(tempfile.mkdtemp())
print(jax.devices())

# %% [markdown]
# ## Entropy is an output of attention
#
# `je.attention` returns the entropy of every row of weights beside its result, in nats, and gradients flow through it.
# A temperature below 1 sharpens the rows, one above 1 flattens them. The most that row $i$ can reach is $\log i$.

# %%
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 128, 4, 16))
for t in (0.01, 0.1, 1.0, 10.0):
    _, stats = je.attention(q, k, v, jnp.full((4, 128), t))
    print(f"t = {t:5}: mean entropy {stats.entropy.mean():.2f} of at most {je.max_entropy(128, 'causal'):.2f} nats")

gradient = jax.grad(lambda q: je.attention(q, k, v)[1].entropy.mean())(q)
print("the entropy's gradient reaches the queries:", float(jnp.abs(gradient).max()) > 0)

# %% [markdown]
# ## Two small models
#
# `SM` has softmax as its only nonlinearity. `EReg(SM(t)+ScFuFFN)` is the paper's answer: the feed-forward is one scaled
# matrix, softmax has a learned temperature for each head and position, and a penalty keeps each head's entropy near a
# learned threshold. Both train on the source of Python's standard library.


# %%
def config_of(architecture):
    config = default_config(architecture)
    config.model.update(num_layers=6, num_heads=4, model_dim=64, init_std=0.04, temperature_init=0.1)
    config.data.vocab_size = 2048
    config.train.update(num_steps=250, batch_size=16, log_every=25, evaluate_every=50, checkpoint_every=250)
    config.optimizer.learning_rate = 3e-3
    config.penalty.update(weight=0.16, reduction="row_mean", threshold_init=0.35)
    return config


softmax_only = train(config_of("SM"), RUNS / "SM")

# %%
regularised = train(config_of("EReg(SM(t)+ScFuFFN)"), RUNS / "EReg")

# %% [markdown]
# ## Before, during and after
#
# One cell is one head. Without the regulariser the first layers stay at the maximum and the last ones fall to 0.

# %%
for name in ("SM", "EReg"):
    report.write_report(RUNS / name, notify=lambda line: None)
    display(Image(RUNS / name / "figures" / "head_entropy.png", width=900))

# %%
display(Image(report.write_comparison([RUNS / "SM", RUNS / "EReg"], RUNS / "comparison.png"), width=900))

# %%
for name, result in (("SM", softmax_only), ("EReg", regularised)):
    print(f"{name:5} held-out perplexity {result.evaluation['validation_perplexity']:.1f}")

# %% [markdown]
# ## Some text
#
# A quarter of a million parameters and a minute of training do not make a programmer; they know what Python looks like.

# %%
run = regularised
print(generate(run.model, run.variables, run.corpus.tokenizer, "def", num_tokens=60, temperature=0.7, top_k=20))

# %% [markdown]
# ## Where next
#
# * `jax-entropy train --config=configs/quickstart.py --workdir=runs/quickstart` trains a larger model, with a report.
# * `jax-entropy census --architecture="SM+LN+G"` counts what a model would cost under encryption.
# * `docs/architectures.md` lists every architecture of the paper and shows how to add one.
