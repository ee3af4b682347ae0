# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Entropy-guided attention in five minutes
#
# We take LayerNorm and GELU out of a small language model, watch the entropy of its attention heads go wrong, and repair
# it as in [Entropy-Guided Attention for Private LLMs](https://arxiv.org/abs/2501.03489). CPU, GPU and TPU runtimes all do.

# %%
REPOSITORY = "https://github.com/OWNER/jax_entropy.git"  # the address of your clone

import importlib.util, os, subprocess, sys

sys.path.append(os.path.abspath("../.."))  # the package, if this notebook was opened inside a clone
if importlib.util.find_spec("jax_entropy") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"git+{REPOSITORY}"], check=True)

# %% [markdown]
# ## What goes wrong
#
# A row of attention weights is a distribution over earlier tokens. Its entropy is 0 nats if the query looks at one token
# only, and log i if it looks at i tokens alike; the mean over a row's T positions, then over a head, says how a head works.
#
# Under encryption linear layers are cheap and nonlinearities are what costs, so one would like to keep softmax only. But
# then training fails in two ways. **Entropic overload**: heads of early layers stay near the maximum, look at everything
# alike and learn nothing. **Entropy collapse**: heads of deep layers drop to 0, logits grow, and the loss may become NaN.
# Below, the same queries and keys at three temperatures.
