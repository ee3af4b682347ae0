"""The whole model once more, in NumPy and float64: what tests compare with."""

import math

import numpy as np

from jax_entropy.architecture import ModelConfig

erf = np.vectorize(math.erf)


def forward(config: ModelConfig, variables, tokens_BxT):
    """(logits [B, T, V], entropy, logsumexp and largest logit [L, B, N, T])."""
    params, vectors = to_float64(variables["params"]), to_float64(variables.get("spectral", {}))
    embedding, T = params["token_embedding"], tokens_BxT.shape[1]
    x = embedding[np.asarray(tokens_BxT)] * config.embedding_scale
    x = x + params["position_embedding"][:T] if config.learned_positions else x
    stats, shared = [], {}
    if config.value_embedding:
        shared["values"] = params["value_embedding"][np.asarray(tokens_BxT)]
    for layer in range(config.num_layers):
        shallow = config.num_layers - config.ffn_free_layers
        stack, index = ("blocks", layer) if layer < shallow else ("blocks_without_ffn", layer - shallow)
        block = [at(tree.get(stack, {}), index) for tree in (params, vectors)]
        shared["layer"] = layer
        x, stats_of_layer = apply_block(config, *block, x, shared, params.get("negative_slope"))
        stats.append(stats_of_layer)
    x = normalise(config, config.final_norm, params.get("final_norm"), x)
    head = embedding if config.tied_head else params["head"]
    return x @ head.T, *map(np.stack, zip(*stats, strict=True))


def apply_block(config, params, vectors, x, shared, slope):
    attended, stats = attend(
        config,
        params["attention"],
        vectors.get("attention", {}),
        normalise(config, config.norm, params.get("norm1"), x),
        shared,
    )
    x = x + attended
    if "ffn" in params:
        normed = normalise(config, config.norm, params.get("norm2"), x)
        hidden = feed_forward(config, params["ffn"], vectors.get("ffn", {}), normed, slope)
        x = x + hidden if not config.scaled else params["beta"] * x + hidden / params["alpha"]  # Eq. 8
    return x, stats


def attend(config, params, vectors, x, shared):
    """Multi-head attention, with entropies by their definition; `shared` is what a layer leaves for those after it."""
    T, names = x.shape[1], ("query", "key", "value")
    q, k, v = (linear(params[name], vectors.get(name), x) for name in names)
    if config.conv_width:
        q, k, v = (convolve(params[f"{name}_convolution"]["taps"], x) for name, x in zip(names, (q, k, v), strict=True))
    if config.value_residual:
        v = v + params["value_mix"] * (shared.setdefault("first value", v) - v)
    if config.qk_norm:
        q, k = (x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) for x in (q, k))
        q = q * params["qk_gain"][:, None]
    if config.rotary:
        q, k = rotate(config, q), rotate(config, k)
    if config.value_embedding and config.embedded_values[shared["layer"]]:
        v = v + params["value_embedding_scale"] * shared["values"].reshape(v.shape)
    if config.num_slots:
        k, v = (
            np.concatenate([np.broadcast_to(params[f"slot_{name}"], (len(x), *params[f"slot_{name}"].shape)), x], 1)
            for name, x in (("key", k), ("value", v))
        )
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(config.head_dim)
    if config.learnable_temperature:
        t = params["temperature"][:, :T]
        t = np.exp(t) if config.temperature_parameter == "log" else np.sqrt(t**2 + 1e-8)
        scores = scores / t[None, :, :, None]
    window = config.windows[shared.get("layer", 0)]
    visible = np.tril(np.ones((T, T), bool)) & ~np.tril(np.ones((T, T), bool), -window)
    visible = np.concatenate([np.ones((T, config.num_slots), bool), visible], axis=1)
    if config.log_scale:
        scores = scores * np.multiply.outer(params["log_scale"], np.log(visible.sum(1)))[..., None]
    largest = np.where(visible, scores, -np.inf).max(-1)
    if config.logit_cap:
        scores = config.logit_cap * np.tanh(scores / config.logit_cap)
    if config.power:
        shift = np.sqrt(params["shift"] ** 2 + 1e-8)[:, None, None]
        scores = np.log((1 + scores / shift) ** config.power)
    seen = np.where(visible, scores, -np.inf).max(-1)
    weights = np.where(visible, np.exp(np.where(visible, scores, 0) - seen[..., None]), 0)
    logsumexp = np.log(weights.sum(-1)) + seen
    weights = weights / weights.sum(-1, keepdims=True)
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)
    out = np.einsum("BNTS,BSNH->BTNH", weights, v)
    return linear(params["out"], vectors.get("out"), out, in_axes=2), (entropy, logsumexp, largest)


def convolve(taps, x):
    """Each position its own sum of what stands at it and before it."""
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(min(len(taps), t + 1)):
            y[:, t] += taps[j] * x[:, t - j]
    return y


def rotate(config, x):
    """Pairs of features, one of each half of a head, as complex numbers."""
    half = config.head_dim // 2
    frequencies = config.rotary_base ** (-np.arange(half) / half)
    turns = np.exp(1j * np.arange(x.shape[1])[:, None, None] * frequencies)
    turned = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([turned.real, turned.imag], axis=-1)


def feed_forward(config, params, vectors, x, slope):
    if config.ffn == "fused":
        return linear(params["fused"], vectors.get("fused"), x)
    if config.ffn == "bilinear":
        x = linear(params["up"], vectors.get("up"), x) * linear(params["gate"], vectors.get("gate"), x)
        return linear(params["down"], vectors.get("down"), x)
    x = linear(params["up"], vectors.get("up"), x)
    slope = params.get("negative_slope", config.negative_slope if slope is None else slope)
    activations = {
        "identity": lambda x: x,
        "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": lambda x: np.maximum(x, 0),
        "leaky_relu": lambda x: np.where(x < 0, slope * x, x),
    }
    return linear(params["down"], vectors.get("down"), activations[config.activation](x))


def linear(params, vectors, x, in_axes=1):
    kernel = params["kernel"]
    matrix = kernel.reshape(math.prod(kernel.shape[:in_axes]), -1)
    if "gain" in params:
        matrix = params["gain"].ravel() * matrix / np.sqrt((matrix**2).sum(0))
    if vectors:
        left, right = vectors["singular_vectors"]
        matrix = matrix / (left @ matrix @ right) * params.get("gamma", 1)
    y = x.reshape(*x.shape[: x.ndim - in_axes], -1) @ matrix
    return y.reshape(*y.shape[:-1], *kernel.shape[in_axes:]) + params.get("bias", 0)


def normalise(config, kind, params, x):
    if kind == "none":
        return x
    if kind == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * params["scale"]
    if kind == "tanh":
        return np.tanh(params["alpha"] * x) * params["scale"] + params["bias"]
    centered = x - x.mean(-1, keepdims=True)
    if kind == "frozen":
        return centered * params["scale"] + params["bias"]
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return centered / deviation * params["scale"] + params["bias"]


def to_float64(tree):
    if isinstance(tree, dict):
        return {name: to_float64(value) for name, value in tree.items()}
    return tuple(map(to_float64, tree)) if isinstance(tree, tuple) else np.asarray(tree, np.float64)


def at(tree, layer):
    """One layer of a stack."""
    if isinstance(tree, dict):
        return {name: at(value, layer) for name, value in tree.items()}
    return tuple(at(value, layer) for value in tree) if isinstance(tree, tuple) else tree[layer]
