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
# # Private inference on your laptop
#
# Somebody has a prompt, somebody else has a model. Under *secure computation* the model answers although neither sees what the
# other has. Here you train a small model without LayerNorm and GELU, run it so with all parties on this machine, and count what
# they send to each other. Three minutes on two CPU cores, the engine's installation not counted.

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

import jax
import matplotlib.pyplot as plt
import numpy as np

import jax_entropy as je
from jax_entropy.census import GROUPS, KINDS
from jax_entropy.private.cost.account import NETWORKS, add, on_network
from jax_entropy.private.cost.model import predict
from jax_entropy.private.engine import environment
from jax_entropy.private.engine.engine import Engine, Setting
from jax_entropy.private.program.export import export
from jax_entropy.private.session.inference import PrivateModel, generate, sampler

STEPS, NEW_TOKENS = 300, 12
WORKDIR = Path(tempfile.mkdtemp()) / "private"
print(jax.devices())

# %% [markdown]
# ## The engine
#
# [SecretFlow SPU](https://github.com/secretflow/spu) is installed into an environment of its own, once, 730 MB. Its wheel is for
# CPython 3.11 on Linux with an x86-64 processor. Where this notebook runs on another Python, `uv` brings that one along.

# %%
if sys.version_info[:2] != (3, 11) and shutil.which("python3.11") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv"], check=True)
    subprocess.run([sys.executable, "-m", "uv", "python", "install", "3.11"], check=True)
    os.environ["PATH"] += f"{os.pathsep}{Path.home() / '.local/bin'}"
engine = environment.setup(print)["engine"]
print(f"SPU {engine} is ready")

# %% [markdown]
# ## What a share is
#
# A number is split into two that add up to it, modulo $2^{64}$. Each of them alone is noise: the one is drawn at random, and
# the other is the number less that. Additions of shared numbers are free, each party adds what it has. A product takes a
# message. What is neither, a softmax, takes very many.

# %%
secret = np.array([3.25, -1.5, 0.0])
whole = np.round(secret * 2**18).astype(np.int64)  # fixed point: 18 bits behind the point
share_0 = np.random.default_rng().integers(-(2**63), 2**63, size=3)
share_1 = whole - share_0  # wraps around, as it should
print("one party has  ", share_0)
print("the other has  ", share_1)
print("together       ", (share_0 + share_1) / 2**18)

# %% [markdown]
# ## A model without LayerNorm and GELU

# %%
config = je.default_config("EReg(SM(t)+ScFuFFN)")
config.model.update(num_layers=2, num_heads=4, model_dim=64, context_length=64, init_std=0.07, temperature_init=0.1)
config.data.vocab_size = 1024
config.train.update(num_steps=STEPS, batch_size=32, log_every=50, evaluate_every=STEPS, checkpoint_every=STEPS)
config.optimizer.learning_rate = 3e-3
config.penalty.update(weight=0.16, reduction="row_mean")
trained = je.train(config, WORKDIR)

# %% [markdown]
# ## The same text, without seeing the prompt
#
# First in the clear. Then the model is exported: the same function, rewritten so that it sends little. Its weights are shared, the
# prompt too, and each new token's logits are put together for the client only, who draws from them. Both times the same random
# numbers are drawn, so that the texts can be compared.

# %%
PROMPT = "    def __init__(self"
run = je.load_run(WORKDIR)
clear = je.generate(run, PROMPT, num_tokens=NEW_TOKENS, temperature=0.7, top_k=20, seed=1)
print("in the clear:", repr(clear))

setting = Setting(protocol="semi2k")
exported = export(run.model.config, run.variables, setting=setting)
with Engine(setting) as engine:
    model = PrivateModel.of(engine, exported)
    choose = sampler(run.tokenizer, NEW_TOKENS, temperature=0.7, top_k=20, seed=1)
    new = generate(
        model, run.tokenizer.encode(PROMPT), NEW_TOKENS, choose=choose, end_of_text=run.tokenizer.end_of_text
    )
private = run.tokenizer.decode(new)
print("privately:   ", repr(private))
print("the same:    ", private == clear)

# %% [markdown]
# What that took, program by program: the prompt is read at once, then each step computes one token from caches that nobody sees.
# The time on a network is that of the paper's, 100 Mbit/s with 80 ms to and fro.

# %%
for name, account in (*model.accounts[:3], model.accounts[-1]):
    seconds = on_network(account, NETWORKS["wan"])
    print(
        f"{name:14} {max(account.bytes) / 1e6:6.2f} MB   {account.rounds:4} rounds   {account.seconds:5.2f} s here   {seconds:5.1f} s on the network"
    )

# %% [markdown]
# `semi2k` measures with a dealer of random numbers that both trust. `protocol="aby3"` has a third machine in its place,
# `"cheetah"` nobody: `docs/private.md` says what each protects.
#
# ## What the nonlinearities would have cost
#
# Counts of a forward pass over 128 tokens at GPT-2's size (12 layers, 12 heads, width 768), predicted from coefficients that were
# measured on small models. *plain* is a model as it is written, *optimised* the same function rewritten.

# %%
SIZES = dict(num_layers=12, num_heads=12, model_dim=768, vocab_size=50257)
bars = {}
for name in ("SM+LN+G", "SM+LN+R", "EReg(SM(t)+ScFuFFN)"):
    for plain in (True, False):
        label = f"{name}, {'plain' if plain else 'optimised'}"
        bars[label] = predict(je.architecture(name, **SIZES), 128, setting, plain)
        total = add(bars[label].values())
        print(f"{label:32} {max(total.bytes) / 1e9:6.2f} GB   {total.rounds:5,} rounds")

figure, ax = plt.subplots(figsize=(9, 3.5), dpi=75, layout="constrained")
group_of = {kind.name: kind.group for kind in KINDS}
left = np.zeros(len(bars))
for group in GROUPS:
    width = np.array(
        [sum(max(cost.bytes) for kind, cost in costs.items() if group_of[kind] == group) for costs in bars.values()]
    )
    ax.barh(list(bars), width / 1e9, left=left / 1e9, label=group)
    left += width
ax.set(xlabel="GB that the busier party sends")
ax.legend()
ax.invert_yaxis()

# %% [markdown]
# ## On two machines, or three
#
# ```
# jax-entropy private serve runs/quickstart --protocol=aby3 --listen=0.0.0.0:9500 --keys=server
# jax-entropy private assist --server=A:9500 --listen=0.0.0.0:9700 --keys=assistant
# jax-entropy private ask --server=A:9500 --assistant=B:9700 --prompt="def " --keys=client
# ```
#
# Keys come from `jax-entropy private keys`; all of it is in `docs/private.md`.
