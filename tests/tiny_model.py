"""Models of two layers with arrays to go with them, shared by the tests of what a model is made of."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.config import default_config
from jax_entropy.model import Transformer
from jax_entropy.notation import TARGETS

# Every notation of the paper, and mixtures that meet what none of them does.
ARCHITECTURES = (
    "SM+LN+G", "SM+LN+R", "SM+LN", "SM+G", "SM+R", "SM", "SM+RN+G", "SM+LR(0.01)", "SM+LR(layer)", "SM+LR(global)",
    *(f"SM+{kind}Norm({target})" for kind in "WS" for target in TARGETS),
    "SM+ScFFN", "SM+ScFuFFN", "SM+ScFuFFN^1", "SM(t)+ScFuFFN", "EReg(SM(t)+ScFuFFN)", "EReg(SM(t)+ScFuFFN^1)",
    "EReg(SM(t)+LN+LR(global)+SNorm(QKVO+FFN)+ScFFN^1)", "EReg(SM+RN+LR(layer)+WNorm(QKVO+FFN)+ScFFN^2)",
    "EReg(SM(t)+ScFuFFN+Conv4+RoPE+VRes^1)", "SM(t)+DyT+G+RoPE+Cap(5)",
    "EReg(PSM(6)+FN+SReparam(QKV+FFN)+BiFFN+Conv4+QKN^1)", "EReg(SM(log)+LN+R+Conv2+VRes+VEmb+Mem3+Win(LS,5))",
)  # fmt: skip
# A few of them that go through every line of the model.
VARIED = ("SM+LN+G", "SM+WNorm(QKVO+FFN)", "EReg(SM(t)+ScFuFFN^1)", *ARCHITECTURES[-6:-3], ARCHITECTURES[-1])


def assert_gradients(function, *arguments, step: float = 1e-6, rtol: float = 1e-6) -> None:
    """The gradients' products with random directions are central differences; for float64 arguments."""
    rng, value = np.random.default_rng(0), jax.jit(function)
    gradients = jax.jit(jax.grad(function, tuple(range(len(arguments)))))(*arguments)
    for i, gradient in enumerate(gradients):
        along = jax.tree.map(lambda leaf: rng.standard_normal(np.shape(leaf)), arguments[i])

        def at(distance, i=i, along=along):
            moved = jax.tree.map(lambda leaf, direction: leaf + distance * direction, arguments[i], along)
            return value(*arguments[:i], moved, *arguments[i + 1 :])

        slope = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(along), strict=True))
        assert slope != 0
        np.testing.assert_allclose(slope, (at(step) - at(-step)) / (2 * step), rtol=rtol)


def changed(params: Any, path: str, change) -> Any:
    """Parameters with one of them changed."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(flat | {path: change(flat[path])}, sep="/")


def tiny(name: str, **overrides: Any) -> ModelConfig:
    size = dict(num_layers=2, num_heads=2, model_dim=16, context_length=16, vocab_size=61)
    return architecture(name, **(size | dict(init_std=0.15, temperature_init=0.5) | overrides))


def run_config(architecture_name: str, **fields: Any) -> ConfigDict:
    """The config of a run of such a model; `fields` as {"train.num_steps": 20}."""
    config = default_config(architecture_name)
    config.model.update(num_layers=2, num_heads=2, model_dim=16, context_length=16, init_std=0.15, temperature_init=0.5)
    config.train.update(num_steps=20, batch_size=8)
    # gradients that are zero but for rounding stay next to zero
    config.optimizer.update(learning_rate=1e-2, warmup=0.0, schedule="constant", epsilon=1e-3)
    config.penalty.update(weight=0.3, reduction="row_mean", tolerance=0.05)
    config.update_from_flattened_dict(fields)
    return config


def random_tokens(batch_size: int, length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, (batch_size, length)), jnp.int32)


@functools.cache
def shapes(config: ModelConfig) -> dict[str, Any]:
    """The model's variables as shapes."""
    return dict(jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


@functools.cache
def initial(config: ModelConfig) -> dict[str, Any]:
    """The variables that a run starts from."""
    return dict(jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


@functools.cache
def scattered(config: ModelConfig) -> dict[str, Any]:
    """Variables none of which is at its initial value: scales and temperatures around 1, all others around 0."""
    rng = np.random.default_rng(1)

    def one(path, leaf):
        centered = ("scale", "alpha", "beta", "gamma", "gain", "qk_gain", "temperature", "value_mix", "log_scale")
        centered += ("value_embedding_scale",)
        center = 1.0 if path[-1] in centered else 4.0 if path[-1] == "shift" else 0.0
        return center + 0.25 * rng.standard_normal(leaf.shape)

    params = {path: one(path, leaf) for path, leaf in flatten_dict(shapes(config)["params"]).items()}
    variables = {"params": unflatten_dict(params)}
    if "spectral" in shapes(config):
        vectors = {path: _singular_vectors(params[*path[:-1], "kernel"], leaf, rng)
                   for path, leaf in flatten_dict(shapes(config)["spectral"]).items()}  # fmt: skip
        variables["spectral"] = unflatten_dict(vectors)
    with jax.ensure_compile_time_eval():
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)


def _singular_vectors(kernel, shapes, rng):
    """Singular vectors of a matrix near the kernel's, layer by layer."""
    left, right = (shape.shape[-1] for shape in shapes)
    matrix = kernel.reshape(-1, left, right) + 0.05 * rng.standard_normal((left, right))
    u, _, v = np.linalg.svd(matrix)
    return u[:, :, 0], v[:, 0, :]
