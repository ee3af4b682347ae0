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
# # Entropy in your own Flax model
#
# `je.attention_fn` goes where Flax takes an `attention_fn`. A layer then computes what it computed before, and shows the
# entropy of every head; gradients go through it. Ten lines log it, add the paper's penalty to the loss, and cut queries and
# keys back where logits grow too large (QK-clip). First in Linen, then in NNX. Two minutes on two CPU cores.

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
import argparse
import itertools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import jax_entropy as je

STEPS = 200
L, N, D, T, B, V = 4, 4, 64, 64, 16, 256  # layers, heads, width, context, batch, vocabulary
print(jax.devices())

# %% [markdown]
# ## A model that is not ours
#
# A small transformer without LayerNorm, as somebody writes it who wants to run it under encryption, on the bytes of a Python
# file. Lines marked `# new` are what is added.

# %%
LAYERS = [f"attention_{i}" for i in range(L)]


class YourModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(V, D)(tokens) + nn.Embed(T, D)(jnp.arange(T))
        for name in LAYERS:
            attention = nn.MultiHeadDotProductAttention(
                num_heads=N,
                name=name,
                attention_fn=je.attention_fn,  # new
            )
            x = x + attention(
                x,
                sow_weights=True,  # new
            )
            x = x + nn.Dense(D)(nn.gelu(nn.Dense(4 * D)(x)))
        return nn.Dense(V)(x)


text = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8)


def batch_of(step):
    starts_Bx1 = np.random.default_rng(step).integers(len(text) - T, size=(B, 1))
    return jnp.asarray(text[starts_Bx1 + np.arange(T + 1)], jnp.int32)


# %% [markdown]
# ## Its training step
#
# The penalty is in the loss, with a threshold for each head among the parameters; QK-clip comes after the update. `weight=0`
# and `limit=inf` are the step as it was, with the entropies logged.

# %%
model, optimizer = YourModel(), optax.adamw(3e-3)


def loss_fn(params, tokens, weight):
    logits, kept = model.apply({"params": params["model"]}, tokens[:, :-1], mutable=["intermediates"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    layers = [kept["intermediates"][name]["attention_stats"][0] for name in LAYERS]  # new
    stats = jax.tree.map(lambda *x: jnp.stack(x), *layers)  # new: .entropy and .max_logit, [L, B, N, T]
    penalty = je.entropy_penalty(stats.entropy, params["threshold"], tolerance=0.1, reduction="row_mean")  # new
    return loss + weight * penalty, (loss, stats)


@jax.jit
def train_step(params, opt_state, tokens, weight, limit):
    gradients, (loss, stats) = jax.grad(loss_fn, has_aux=True)(params, tokens, weight)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    root_LxN = jnp.sqrt(jnp.minimum(1, limit / stats.max_logit.max((1, 3))))  # new: 1 below the limit
    for (name, root_N), side in itertools.product(zip(LAYERS, root_LxN, strict=True), ("query", "key")):  # new
        linear = params["model"][name][side]  # new: kernel [D, N, H], bias [N, H]
        linear |= {key: w * root_N[:, None] for key, w in linear.items()}  # new
    return params, opt_state, loss, je.head_entropy(stats.entropy), stats.max_logit.max((1, 3))


def train(weight, limit):
    params = {"model": model.init(jax.random.key(0), batch_of(0)[:, :-1])["params"]}
    params["threshold"] = jnp.full((L, N), 0.5)  # new: as a share of log T
    opt_state, logged = optimizer.init(params), []
    for step in range(STEPS):
        params, opt_state, *measured = train_step(params, opt_state, batch_of(step), weight, limit)
        logged.append(jax.device_get(measured))
    return [np.stack(values) for values in zip(*logged, strict=True)]  # loss [E], entropy and logit [E, L, N]


# %% [markdown]
# ## As it was, and guided
#
# Clipping matters where logits grow past 100, in large models and long runs. Here the limit is 10, so that it is seen to act.

# %%
runs = {"as it was": train(0.0, jnp.inf), "penalty and QK-clip": train(0.3, 10.0)}

figure, axes = plt.subplots(2, 3, figsize=(12, 5.5), dpi=75, layout="constrained", sharex=True)
for (name, (loss_E, entropy_ExLxN, logit_ExLxN)), row in zip(runs.items(), axes, strict=True):
    row[0].set_ylabel(name)
    maximum = je.max_entropy(T, "causal")
    row[0].imshow(entropy_ExLxN.reshape(STEPS, L * N).T, vmin=0, vmax=maximum, aspect="auto", interpolation="nearest")
    row[0].set(title="entropy of each head: dark 0, light the maximum", yticks=np.arange(L) * N, yticklabels=range(L))
    row[1].plot(entropy_ExLxN.mean(2), label=[f"layer {i}" for i in range(L)])
    row[1].set(title="entropy of each layer, nats", ylim=(0, 1.05 * maximum))
    row[2].semilogy(logit_ExLxN.max(2), label=[f"layer {i}" for i in range(L)])
    row[2].set(title="largest logit of each layer", ylim=(0.1, 100))
    collapse, _, _, overload = je.head_bands(entropy_ExLxN[-1], maximum)
    print(
        f"{name:20}  loss {loss_E[-20:].mean():.3f}   overload {overload:4.0%}   largest logit {logit_ExLxN.max():.1f}"
    )
axes[0, 1].legend()
for ax in axes[1]:
    ax.set_xlabel("step")

# %% [markdown]
# As it was, the first layers look at everything alike to the end, and the logits of the last grow. With the penalty heads come
# into their band one layer after the other, and no logit passes the limit by much: a head is cut back in the step after.
#
# ## The same in NNX
#
# `nnx.capture` gives the statistics that layers keep. The thresholds are a parameter of the model.


# %%
class YourNnxModel(nnx.Module):
    def __init__(self, rngs):
        self.tokens, self.positions = nnx.Embed(V, D, rngs=rngs), nnx.Embed(T, D, rngs=rngs)
        sizes = dict(num_heads=N, in_features=D, decode=False, rngs=rngs)
        self.attentions = nnx.List(
            nnx.MultiHeadAttention(**sizes, attention_fn=je.attention_fn)  # new
            for _ in range(L)
        )
        self.wide = nnx.List(nnx.Linear(D, 4 * D, rngs=rngs) for _ in range(L))
        self.narrow = nnx.List(nnx.Linear(4 * D, D, rngs=rngs) for _ in range(L))
        self.head = nnx.Linear(D, V, rngs=rngs)
        self.threshold = nnx.Param(jnp.full((L, N), 0.5))  # new

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(T))
        for attention, wide, narrow in zip(self.attentions, self.wide, self.narrow, strict=True):
            x = x + attention(x, is_causal=True, sow_weights=True)  # new
            x = x + narrow(nnx.gelu(wide(x)))
        return self.head(x)


def nnx_loss_fn(model, tokens):
    logits, kept = nnx.capture(YourNnxModel.__call__, nnx.Intermediate)(model, tokens[:, :-1])  # new
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    stats = jax.tree.map(
        lambda *x: jnp.stack(x), *(kept["attentions"][i]["attention_stats"][0] for i in range(L))
    )  # new
    penalty = je.entropy_penalty(stats.entropy, model.threshold[...], tolerance=0.1, reduction="row_mean")  # new
    return loss + 0.3 * penalty, (loss, stats)


@nnx.jit
def nnx_step(model, optimizer, tokens):
    gradients, (loss, stats) = nnx.grad(nnx_loss_fn, has_aux=True)(model, tokens)
    optimizer.update(model, gradients)
    root_LxN = jnp.sqrt(jnp.minimum(1, 10.0 / stats.max_logit.max((1, 3))))  # new
    for attention, root_N in zip(model.attentions, root_LxN, strict=True):  # new
        for linear in (attention.query, attention.key):  # new
            linear.kernel[...], linear.bias[...] = linear.kernel * root_N[:, None], linear.bias * root_N[:, None]  # new
    return loss, stats


nnx_model = YourNnxModel(nnx.Rngs(0))
nnx_optimizer = nnx.Optimizer(nnx_model, optax.adamw(3e-3), wrt=nnx.Param)
for step in range(STEPS):
    loss, stats = nnx_step(nnx_model, nnx_optimizer, batch_of(step))
print("loss", f"{loss:.3f}", "largest logit", f"{stats.max_logit.max():.1f}", "nats of each head:")
print(np.array_str(np.asarray(je.head_entropy(stats.entropy)), precision=2))

# %% [markdown]
# ## Where next
#
# * *Your own Flax model* in the documentation says what your layer may be: masks, shared keys, dropout.
# * Your own attention without Flax's layers: `out, stats = je.attention(q, k, v)`, each `[B, T, N, H]`.
# * What λ, thresholds and tolerance mean is in *Mathematics*; `reduction="row_mean"` makes λ independent of batch and context.
