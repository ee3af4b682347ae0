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
# out of a GPT and softmax alone is left, but then training breaks. How it breaks is seen in one number a head, the
# Shannon entropy of its attention weights:
#
# * **overload**: the head looks at everything alike; its entropy stays at the maximum, and it has not learned what to
#   look at;
# * **collapse**: the head looks at a single token; its entropy is 0, and no gradient tells it where else to look.
#
# This notebook shows both, first in one head, then in a small softmax-only model that fails, and then in the same model
# with its entropy guided ([arXiv 2501.03489](https://arxiv.org/abs/2501.03489)). Three minutes on two CPU cores.

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
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display

import jax_entropy as je
from jax_entropy.data import validation_batches

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
# ## A model that breaks
#
# `SM` is a GPT whose only nonlinearity is softmax. It trains on the source of Python's standard library.
#
# A real run has a guard that goes back to the last good checkpoint after a spike of the loss (`config.guard`). Here it is
# switched off, since what goes wrong is what we want to see.

# %%
STEPS = 250


def config_of(architecture):
    config = je.default_config(architecture)
    config.model.update(num_layers=6, num_heads=4, model_dim=64, init_std=0.08, temperature_init=0.1)
    config.data.vocab_size = 2048
    config.train.update(num_steps=STEPS, batch_size=16, log_every=25, evaluate_every=50, checkpoint_every=STEPS)
    config.optimizer.learning_rate = 3e-3
    config.penalty.update(weight=0.16, reduction="row_mean", threshold_init=0.4)
    config.guard.update(limit=0, zscore=0.0)
    return config


softmax_only = je.train(config_of("SM"), RUNS / "SM")

# %% [markdown]
# One cell is one head. At the first step all of them are overloaded, as in every new model. A healthy one spreads out
# from there. This one falls apart: its first layer never leaves the maximum, its last ones fall to 0.

# %%
figures = je.report(RUNS / "SM")
display(Image(figures["head_entropy"], width=900))

# %% [markdown]
# Why nothing ever comes back from 0: without a norm nothing holds the size of activations, they grow from layer to layer,
# and with them the attention logits (below; mind the scale). Between logits so far apart a softmax has no gradient.

# %%
display(Image(figures["stability"], width=700))

# %% [markdown]
# ## The same model, its entropy guided
#
# `EReg(SM(t)+ScFuFFN)` is the paper's answer, and none of it is a new nonlinearity: the feed-forward is one scaled matrix,
# softmax has a learned temperature for each head and position, and a penalty holds each head's entropy near a threshold
# that it learns. Data, steps and learning rate are those of before.

# %%
guided = je.train(config_of("EReg(SM(t)+ScFuFFN)"), RUNS / "EReg")

# %%
figures = je.report(RUNS / "EReg", against=RUNS / "SM")
display(Image(figures["head_entropy"], width=900))

# %%
display(Image(figures["comparison"], width=900))

# %% [markdown]
# Mind what the shares on the left are of: each run's own largest entropy, as in the paper. The guided heads of the top
# quarter have 2.3 to 3.0 nats; looking at everything alike would be 3.88.
#
# ## What it is worth
#
# Here the shares are of those 3.88 nats for both, on held-out text: *collapse* is the bottom quarter, *overload* the top
# one. The yardstick is a model that knows how often each token occurs in the held-out text, and nothing else.

# %%
tokens = np.concatenate([rows[:, 1:].ravel() for rows, _ in validation_batches(guided.corpus, batch_size=16)])
share = np.unique(tokens, return_counts=True)[1] / tokens.size
print(f"frequencies only  perplexity {np.exp(-share @ np.log(share)):6.1f}")
for name, result in (("SM", softmax_only), ("EReg", guided)):
    collapse, _, _, overload = je.head_bands(result.evaluation["head_entropy"], je.max_entropy(128, "causal"))
    print(
        f"{name:16}  perplexity {result.evaluation['validation_perplexity']:6.1f}   "
        f"collapse {collapse:4.0%}   overload {overload:4.0%}"
    )

# %% [markdown]
# One has learned less than that, and its loss hardly moves. The other is on its way. What each has learned can be read,
# too. Neither is a programmer after a minute of training: one strings the words of Python together, the other its crumbs.

# %%
for name in ("SM", "EReg"):
    prompt = "    def __init__(self"
    print(f"--- {name}")
    print(prompt + je.generate(RUNS / name, prompt, num_tokens=48, temperature=0.6, top_k=20))

# %% [markdown]
# ## Where next
#
# * `jax-entropy train --config=configs/quickstart.py --workdir=runs/quickstart` trains a larger model, with a page about
#   it.
# * `jax-entropy census --architecture="EReg(SM(t)+ScFuFFN)"` counts what a model costs under encryption, and
#   `jax-entropy private generate` pays it.
# * `docs/architectures.md` lists every architecture of the paper and shows how to add one.
