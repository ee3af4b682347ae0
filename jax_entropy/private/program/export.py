"""From a trained model to what is executed privately: flat numpy weights with everything folded that is free, and HLO.

The exported program equals the model in float32 arithmetic for every architecture and every set of rewrites.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jax_entropy.architecture import ModelConfig
from jax_entropy.layers import positive, temperature
from jax_entropy.linear import effective_matrix
from jax_entropy.parts import log_factors
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.program.blueprint import Blueprint, Rewrites

_FOLDABLE = 16.0  # products of β beyond this, or below its inverse, would cost precision in fixed point


@dataclasses.dataclass(frozen=True)
class Export:
    """A model as it is executed: its blueprint, which both parties know, and its weights by name, float32."""

    blueprint: Blueprint
    weights: dict[str, np.ndarray]

    def enter(self, tokens: Sequence[int]) -> np.ndarray:
        """Tokens as they enter the program."""
        return self.blueprint.enter(tokens, self.weights["embedding"])

    def under(self, setting: Setting) -> "Export":
        """The same program, with the exponential of another setting."""
        squarings = setting.bent_squarings(self.blueprint.config.num_layers)
        blueprint = dataclasses.replace(self.blueprint, squarings=squarings)
        return dataclasses.replace(self, blueprint=blueprint)


def export(
    config: ModelConfig, variables: Any, rewrites: Rewrites = Rewrites(), setting: Setting = Setting(), *,
    embedding: str = "shared", piece: int = 0,
) -> Export:  # fmt: skip
    """The exported form of a model.

    Args:
      config: of the model; its dtype and its attention implementation do not matter here.
      variables: of `Transformer(config)`.
      rewrites: what makes it cheaper at equal function.
      embedding: "shared", or "public": the table is given away, and with it a tied head.
      piece: of how many weights a product is at most; 0: all are whole.
      setting: that it will run under, whose exponential it calls, and whose protocol says how many heads go together.
    """
    layers = [_layer(config, variables, layer) for layer in range(config.num_layers)]
    params = variables["params"]
    table = np.asarray(params["token_embedding"], np.float64)
    head = table if config.tied_head else np.asarray(params["head"], np.float64)
    weights = {"embedding": table * config.embedding_scale, "head.kernel": head.T}
    if config.value_embedding:
        values = np.asarray(params["value_embedding"], np.float64)
        weights["embedding"] = np.concatenate([weights["embedding"], values], axis=1)
    if config.learned_positions:
        weights["positions"] = np.asarray(params["position_embedding"], np.float64)
    if config.final_norm != "none":
        weights |= _norm("final_norm", params["final_norm"], variables.get("annealing", {}).get("final_norm"))
    first = 1.0
    for number, layer in enumerate(layers):
        taken = _values(layer, first)
        first = first if number else taken
        _heads(layer, config, rewrites, log_factors(config, number))
        linear = config.activation == "identity" or layer.get("amount") == 1
        if rewrites.merged and linear and config.ffn == "full" and "up.kernel" in layer:
            layer.pop("amount", None)
            _merge(layer)
    if rewrites.folded:
        _fold(config, layers, weights)
    for layer in layers:
        for name in "qkv" if config.conv_width else "":
            _convolve(layer, name)
        if rewrites.qkv:
            _side_by_side(layer, "qkv", "qkv")
            if "gate.kernel" in layer:
                _side_by_side(layer, ("up", "gate"), "branches")
    if rewrites.joined and config.norm in ("none", "frozen") and not config.conv_width:
        _join(layers)
    for number, layer in enumerate(layers):
        weights |= {f"{number}.{name}": value for name, value in layer.items()}
    weights = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    shapes = {name: value.shape for name, value in weights.items()}
    together = setting.heads_at_once(config.num_heads) if rewrites.heads else 1
    squarings = setting.bent_squarings(config.num_layers)
    # each shift costs as many exponentials, of which CHEETAH's fill ciphertexts
    shifted = rewrites.shifts and rewrites.denominator and not config.power and setting.protocol != "cheetah"
    return Export(Blueprint(config, rewrites, shapes, squarings, together, shifted, embedding, piece), weights)


def _layer(config: ModelConfig, variables: Any, layer: int) -> dict[str, np.ndarray]:
    """One block's parameters by short names, kernels as effective matrices [in, out], float64."""
    stack, index = next((name, layers.index(layer)) for name, layers in config.stacks.items() if layer in layers)
    read = lambda tree: {  # noqa: E731
        "/".join(path): np.asarray(leaf[index], np.float64) for path, leaf in flatten_dict(dict(tree)).items()
    }
    params = read(variables["params"][stack])
    vectors = {
        "/".join(path[:-1]): tuple(np.asarray(vector[index], np.float64) for vector in pair)
        for path, pair in flatten_dict(dict(variables.get("spectral", {}).get(stack, {}))).items()
    }
    names = {"attention/query": "q", "attention/key": "k", "attention/value": "v", "attention/out": "out"}
    names |= {f"ffn/{name}": name for name in ("up", "gate", "down", "fused")}
    block = {}
    for path, name in names.items():
        if f"{path}/kernel" in params:
            kernel = params[f"{path}/kernel"]
            inputs = config.model_dim if name != "down" else config.hidden_dim
            block[f"{name}.kernel"] = effective_matrix(
                kernel.reshape(inputs, -1), params.get(f"{path}/gain", params.get(f"{path}/gamma")), vectors.get(path)
            )
        if f"{path}/bias" in params:
            block[f"{name}.bias"] = params[f"{path}/bias"].reshape(-1)
        if f"{path}_convolution/taps" in params:
            taps_KxNxH = params[f"{path}_convolution/taps"]
            block[f"{name}.taps"] = taps_KxNxH.reshape(len(taps_KxNxH), -1)
    annealing = read(variables.get("annealing", {}).get(stack, {}))
    for name in ("norm1", "norm2"):
        parts = {part: params[f"{name}/{part}"] for part in ("scale", "bias", "alpha") if f"{name}/{part}" in params}
        on_the_way = {part: annealing[f"{name}/{part}"] for part in ("amount", "rate") if f"{name}/{part}" in annealing}
        block |= _norm(name, parts, on_the_way)
    if annealing.get("ffn/amount"):
        block["amount"] = annealing["ffn/amount"].reshape(1)
    block |= {name: params[name].reshape(1) for name in ("alpha", "beta") if name in params}
    if config.activation == "leaky_relu" and stack == "blocks" and config.slope != "fixed":
        slope = params["ffn/negative_slope"] if config.slope == "layer" else variables["params"]["negative_slope"]
        block["slope"] = np.asarray(slope, np.float64).reshape(1)
    if config.learnable_temperature:
        block["temperature"] = np.asarray(
            temperature(jnp.asarray(params["attention/temperature"], jnp.float32), config), np.float64
        )
    if config.power:
        block["shift"] = np.asarray(positive(jnp.asarray(params["attention/shift"], jnp.float32)), np.float64)
    if config.qk_norm:
        block["qk_gain"] = params["attention/qk_gain"]
    if config.value_residual and layer > 0:
        block["value_mix"] = params["attention/value_mix"].reshape(1)
    if config.log_scale:
        block["log_scale"] = params["attention/log_scale"]
    if config.embedded_values[layer]:
        block["value_scale"] = params["attention/value_embedding_scale"].reshape(1)
    for name in ("key", "value") if config.num_slots else ():
        block[f"slots.{name[0]}"] = params[f"attention/slot_{name}"]
    return block


def _convolve(layer: dict[str, np.ndarray], name: str) -> None:
    """A convolution into the matrix before it, which then reads the last K positions, the newest first.

    The bias has a row for each of the first positions, where fewer taps find something, and one for all others.
    """
    taps_KxO, kernel_IxO = layer.pop(f"{name}.taps"), layer[f"{name}.kernel"]
    layer[f"{name}.kernel"] = np.concatenate([kernel_IxO * taps_O[None] for taps_O in taps_KxO])
    if f"{name}.bias" in layer:
        layer[f"{name}.bias"] = np.cumsum(layer[f"{name}.bias"] * taps_KxO, axis=0)


def _values(layer: dict[str, np.ndarray], first: float) -> float:
    """(1 − λ)·v + λ·v₀ + s·e: 1 − λ goes into the matrix of v; λ, or else s, is taken out and put behind attention.

    Args:
      first: what was taken out of layer 0, whose v₀ comes without it.
    Returns:
      What was taken out.
    """
    factors = [name for name in ("value_mix", "value_scale") if name in layer]
    if "value_mix" in layer:
        _scale(layer, "v", 1 - float(layer["value_mix"][0]))
        layer["value_mix"] = layer["value_mix"] * first
    if not factors or not 1 / _FOLDABLE <= abs(taken := float(layer[factors[0]][0])) <= _FOLDABLE:
        return 1.0
    _scale(layer, "v", 1 / taken)
    layer["out.kernel"] = layer["out.kernel"] * taken
    if "slots.v" in layer:
        layer["slots.v"] = layer["slots.v"] / taken
    for name in factors[1:]:
        layer[name] = layer[name] / taken
    del layer[factors[0]]
    return taken


def _norm(name: str, params: Any, annealing: Any = None) -> dict[str, np.ndarray]:
    """A norm's parameters by short names; of a LayerNorm that is being frozen, the share of statistics that is left."""
    found = {part: np.asarray(value, np.float64) for part, value in params.items()}
    if "alpha" in found:
        found["alpha"] = found["alpha"].reshape(1)
    if annealing:
        amount, rate = (np.asarray(annealing[part], np.float64).reshape(1) for part in ("amount", "rate"))
        found |= dict(scale=found["scale"] * rate) if amount == 1 else dict(left=1 - amount, rate=amount * rate)
    return {f"{name}.{part}": value for part, value in found.items()}


def _heads(
    layer: dict[str, np.ndarray], config: ModelConfig, rewrites: Rewrites, log_factors: np.ndarray | float
) -> None:
    """1/(t·√H) into the queries: into their kernel what is the same for all positions, beside it what is not.

    So are the shift of power softmax, 1/c, and the s of SM(log); where queries are normalised, it all goes into the
    scalar behind that.
    """
    ones_N, root = np.ones(config.num_heads), np.sqrt(config.head_dim)
    factor_N = layer.pop("log_scale", ones_N) / layer.pop("shift", ones_N)
    if rewrites.temperature:
        if "temperature" in layer:
            layer["inverse_temperature"] = log_factors / (layer.pop("temperature") * root)
        else:
            factor_N = factor_N / root
    if "qk_gain" in layer:
        layer["qk_gain"] = layer["qk_gain"] * factor_N
    else:
        _scale(layer, "q", np.repeat(factor_N, config.head_dim))


def _merge(layer: dict[str, np.ndarray]) -> None:
    """Two matrices with nothing between them as one."""
    up, down = layer.pop("up.kernel"), layer.pop("down.kernel")
    layer["fused.kernel"] = up @ down
    bias = (
        layer.pop("up.bias", 0) @ down + layer.pop("down.bias", 0)
        if "up.bias" in layer
        else layer.pop("down.bias", None)
    )
    if bias is not None:
        layer["fused.bias"] = bias


def _fold(config: ModelConfig, layers: list[dict[str, np.ndarray]], model: dict[str, np.ndarray]) -> None:
    """Scales and biases of norms, α, β and biases into the matrices beside them.

    The residual stream is kept divided by the product of the β before it, so that no β is multiplied at run time;
    behind a norm only its epsilon notices. With norms, the stream is also brought to the size of 1, which fixed point
    represents best.
    """
    products = np.cumprod([1.0, *(float(layer["beta"][0]) for layer in layers if "beta" in layer)])
    foldable = bool(np.all((np.abs(products) <= _FOLDABLE) & (np.abs(products) >= 1 / _FOLDABLE)))
    added = [model["embedding"][:, : config.model_dim], *([model["positions"]] if "positions" in model else [])]
    size = float(np.sqrt(sum(np.mean(table**2) for table in added))) or 1.0
    scale = start = size if config.norm in ("layer", "rms", "tanh") else 1.0
    for table in added:
        table /= start
    for layer in layers:
        _fold_reading(layer, config, "norm1", ("q", "k", "v"), scale)
        differ = config.conv_width or config.num_slots  # biases of one key or value and another
        moved = differ or config.rotary or config.qk_norm or config.power or config.logit_cap
        if "k.bias" in layer and not moved:  # where it adds the same to the logits of all keys
            del layer["k.bias"]  # the softmax does not notice
        if "v.bias" in layer and not (differ or config.value_residual):  # the same for all values
            bias = layer.pop("v.bias")  # weights of attention sum to 1
            layer["out.bias"] = layer.get("out.bias", 0) + bias @ layer["out.kernel"]
        _scale(layer, "out", 1 / scale)
        readers = [name for name in ("up", "gate", "fused") if f"{name}.kernel" in layer]
        if not readers:
            continue
        _fold_reading(layer, config, "norm2", readers, scale)
        writer = "down" if "down.kernel" in layer else "fused"
        if "alpha" in layer:
            _scale(layer, writer, 1 / float(layer.pop("alpha")[0]))
        if "beta" in layer and foldable:
            scale *= float(layer.pop("beta")[0])
        _scale(layer, writer, 1 / scale)
    _fold_reading(model, config, "final_norm", ("head",), scale)


def _scale(weights: dict[str, np.ndarray], name: str, factor: float | np.ndarray) -> None:
    """A matrix's outputs times a factor, or one each."""
    for part in ("kernel", "bias"):
        if f"{name}.{part}" in weights:
            weights[f"{name}.{part}"] = weights[f"{name}.{part}"] * factor


def _fold_reading(
    weights: dict[str, np.ndarray], config: ModelConfig, norm: str, readers: Sequence[str], scale: float
) -> None:
    """Lets matrices that read the stream through a norm, or directly, do what the norm's scale and bias did."""
    kind = config.final_norm if norm == "final_norm" else config.norm
    if kind == "none":
        for reader in readers:
            weights[f"{reader}.kernel"] = weights[f"{reader}.kernel"] * scale
        return
    linear = kind == "frozen" and f"{norm}.left" not in weights
    sign = {"tanh": 1.0}.get(kind, scale if linear else np.sign(scale))
    gain, bias = weights.pop(f"{norm}.scale") * sign, weights.pop(f"{norm}.bias", None)
    for reader in readers:
        kernel = weights[f"{reader}.kernel"]
        if bias is not None:
            weights[f"{reader}.bias"] = weights.get(f"{reader}.bias", 0) + bias @ kernel
        kernel = gain[:, None] * kernel
        weights[f"{reader}.kernel"] = kernel - kernel.mean(0) if linear else kernel  # which takes the mean off
    if kind == "tanh":
        weights[f"{norm}.alpha"] = weights[f"{norm}.alpha"] * scale
    elif scale != 1 and not linear:  # the norm of a smaller stream has a larger epsilon
        weights[f"{norm}.epsilon"] = np.array([config.norm_epsilon / scale**2])
        if kind == "frozen":
            weights[f"{norm}.rate"] = weights[f"{norm}.rate"] * abs(scale)


def _side_by_side(layer: dict[str, np.ndarray], names: Sequence[str], joined: str) -> None:
    """Matrices that read the same as one."""
    biases = [layer.pop(f"{name}.bias", None) for name in names]
    layer[f"{joined}.kernel"] = np.concatenate([layer.pop(f"{name}.kernel") for name in names], axis=1)
    if found := [bias for bias in biases if bias is not None]:
        layer[f"{joined}.bias"] = np.concatenate([np.zeros_like(found[0]) if b is None else b for b in biases], axis=-1)


_JOINABLE = {f"{name}.{part}" for name in ("qkv", "out", "fused") for part in ("kernel", "bias")}
_INSIDE = {"inverse_temperature", "qk_gain", "slots.k", "slots.v", "value_mix", "value_scale"}  # of attention


def _join(layers: list[dict[str, np.ndarray]]) -> None:
    """All that is linear between two attentions as one matrix, which reads the stream beside what attention mixed.

    With W the output projection and F the feed-forward, the stream x grows by x·F + mixed·W(1 + F), and what the next
    projections read is that sum. Where a layer holds anything else, all stay as they are.
    """
    if any({*layer} - _JOINABLE - _INSIDE or "qkv.kernel" not in layer for layer in layers):
        return
    for layer, following in zip(layers, [*layers[1:], {}], strict=True):
        out = layer.pop("out.kernel")
        feed = layer.pop("fused.kernel", np.zeros_like(out))
        bias = layer.pop("out.bias", np.zeros(len(out))) @ (np.eye(len(out)) + feed)
        bias = bias + layer.pop("fused.bias", 0)
        grown = np.concatenate([feed, out + out @ feed])
        kernels, biases = [grown], [bias]
        if following:
            stream = grown + np.eye(*grown.shape)
            kernels.append(stream @ following["qkv.kernel"])
            biases.append(bias @ following.pop("qkv.kernel") + following.pop("qkv.bias", 0))
        layer["joined.kernel"], bias = np.concatenate(kernels, axis=1), np.concatenate(biases)
        if np.any(bias):
            layer["joined.bias"] = bias
