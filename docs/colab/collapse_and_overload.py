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
# # Collapse and overload, seen live
#
# Under encryption the linear parts of a language model are cheap and the nonlinear ones are not. Take LayerNorm and GELU
# out of a GPT and softmax alone is left, but then training breaks. How it breaks is seen in one number a head, the
# Shannon entropy of its attention weights:
#
# * **overload**: the head looks at everything alike; its entropy stays at the maximum, and it has not learned what to
#   look at;
# * **collapse**: the head looks at a single token; its entropy is 0, and no gradient tells it where else to look.
#
# This notebook shows both, first in one head, then in three small models on one slider: a GPT as one knows it, the same
# with softmax alone, which fails, and that one with its entropy guided
# ([arXiv 2501.03489](https://arxiv.org/abs/2501.03489)). Three minutes on two CPU cores.

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
import html
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

import jax_entropy as je
from jax_entropy.data import validation_batches

STEPS = 200
RUNS = Path(tempfile.mkdtemp())
print(jax.devices())

# %% [markdown]
# ## Entropy is an output of attention
#
# `je.attention` returns the entropy of every row of its weights beside its result, in nats, without keeping the weights.
# A row is what one token sees of itself and of those before it. Divide the logits by a large temperature and every row is
# flat; divide them by a small one and each row is a single point:

# %%
T = 32
q_BxTxNxH, k_BxTxNxH, v_BxTxNxH = jax.random.normal(jax.random.key(3), (3, 1, T, 1, 16))
logits_TxT = jnp.einsum("bqnh,bknh->qk", q_BxTxNxH, k_BxTxNxH) / 16**0.5

figure, axes = plt.subplots(1, 3, figsize=(9, 3.5), dpi=75, layout="constrained")
for ax, (name, temperature) in zip(axes, {"overload": 20.0, "in between": 1.0, "collapse": 0.02}.items(), strict=True):
    _, stats = je.attention(q_BxTxNxH, k_BxTxNxH, v_BxTxNxH, jnp.full((1, T), temperature))
    ax.imshow(jax.nn.softmax(logits_TxT / temperature, where=jnp.tri(T, dtype=bool)), vmin=0, vmax=0.5)
    ax.set(title=f"{name}: {stats.entropy.mean():.2f} nats", xlabel="looks at token", xticks=[], yticks=[])
axes[0].set_ylabel("token")
print(f"the most that {T} tokens can have: {je.max_entropy(T, 'causal'):.2f} nats")

# %% [markdown]
# Gradients flow through it, so entropy can be part of a loss:

# %%
gradient = jax.grad(lambda q: je.attention(q, k_BxTxNxH, v_BxTxNxH)[1].entropy.mean())(q_BxTxNxH)
print("largest gradient of the mean entropy to a query:", f"{jnp.abs(gradient).max():.5f}")

# %% [markdown]
# ## Three architectures
#
# * `SM+LN+G`: softmax, LayerNorm and GELU, as in GPT-2.
# * `SM`: softmax is the only nonlinearity.
# * `EReg(SM(t)+ScFuFFN)`: the paper's answer, and none of it is a new nonlinearity. The feed-forward is one scaled matrix,
#   softmax has a learned temperature for each head and position, and a penalty holds each head's entropy near a threshold
#   that it learns.
#
# They train on the source of Python's standard library, with the same data, steps and learning rate. A real run has a guard
# that goes back to the last good checkpoint after a spike of the loss (`config.guard`). Here it is switched off, since what
# goes wrong is what we want to see.


# %%
def config_of(architecture):
    config = je.default_config(architecture)
    config.model.update(num_layers=6, num_heads=4, model_dim=64, init_std=0.08, temperature_init=0.1)
    config.data.vocab_size = 2048
    config.train.update(num_steps=STEPS, batch_size=16, log_every=5, evaluate_every=STEPS, checkpoint_every=STEPS)
    config.optimizer.learning_rate = 3e-3
    config.penalty.update(weight=0.16, reduction="row_mean", threshold_init=0.4)
    config.guard.update(limit=0, zscore=0.0)
    return config


def say(line):
    if "held out" in line:
        print(line)


trained = {}
for name, architecture in {"GPT": "SM+LN+G", "SM": "SM", "EReg": "EReg(SM(t)+ScFuFFN)"}.items():
    print(f"--- {name}")
    trained[name] = je.train(config_of(architecture), RUNS / name, say)

# %% [markdown]
# ## All of it on one slider
#
# The page of the three runs, whole: the file that `jax-entropy report` writes, which needs no network. **Drag the slider, or
# press ▶**: every picture follows. Choose another run on top; press a head to see its curve. One cell is one head, dark where
# it looks at one token, light where it looks at all alike.
#
# At the first step the heads of all three look at everything alike, as in every new model. Those of `EReg` spread out from
# there. Watch `SM` fall apart: its first layers never leave the maximum, its last ones fall to 0.


# %%
def show(page):
    display(
        HTML(f'<div><iframe srcdoc="{html.escape(page)}" width="100%" height="900" style="border:0"></iframe></div>')
    )


reported = je.report(RUNS / "SM", against=[RUNS / "GPT", RUNS / "EReg"])
show(reported["page"].read_text())

# %% [markdown]
# Why nothing ever comes back from 0: without a norm nothing holds the size of activations, they grow from layer to layer,
# and with them the attention logits (choose `SM` and look at *largest logits*; mind the scale). Between logits so far apart a
# softmax has no gradient.
#
# Mind `GPT`, too: after so few steps its heads still look at nearly everything, and it learns all the same. A high entropy is
# where every model begins; overload is where it stays.
#
# ## What it is worth
#
# On held-out text: *collapse* is the share of heads in the bottom quarter of what causal attention can have, *overload* in
# the top one. The yardstick is a model that knows how often each token occurs in the held-out text, and nothing else.

# %%
corpus = trained["SM"].corpus
tokens = np.concatenate([rows[:, 1:].ravel() for rows, _ in validation_batches(corpus, batch_size=16)])
share = np.unique(tokens, return_counts=True)[1] / tokens.size
print(f"frequencies only  perplexity {np.exp(-share @ np.log(share)):6.1f}")
for name, result in trained.items():
    collapse, _, _, overload = je.head_bands(result.evaluation["head_entropy"], je.max_entropy(128, "causal"))
    print(
        f"{name:16}  perplexity {result.evaluation['validation_perplexity']:6.1f}   "
        f"collapse {collapse:4.0%}   overload {overload:4.0%}"
    )

# %% [markdown]
# `SM` has learned less than that, and its loss hardly moves. The guided model is on its way without any nonlinearity but
# softmax; what `GPT` is ahead by is what privacy costs here. What each has learned can be read, too. None is a programmer after
# a minute of training.

# %%
for name in trained:
    prompt = "    def __init__(self"
    print(f"--- {name}")
    print(prompt + je.generate(RUNS / name, prompt, num_tokens=48, temperature=0.6, top_k=20))

# %% [markdown]
# ## Where next
#
# * `jax-entropy train --config=configs/quickstart.py --workdir=runs/quickstart` trains a larger model, with a page about
#   it; `jax-entropy watch runs/quickstart` shows that page while it trains.
# * *Entropy in your own Flax model* takes the penalty and QK-clip to a model that is not ours.
# * *Private inference on your laptop* pays what a model costs under encryption.
