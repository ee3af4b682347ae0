"""Models without normalisation as TransformerLens has them: what HookedTransformer's `load_state_dict` takes.

It has neither linear feed-forwards nor scales on the stream. The first become x = relu(x) − relu(−x), in two halves of
the hidden width; the second go into the matrices, since nothing normalises what they scale.
"""

import os
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError
from jax_entropy.huggingface.folder import write_folder
from jax_entropy.notation import written_fields
from jax_entropy.paths import local_path

# Of what the notation writes, what it can express, whatever the value is; it has no place for the rest.
_EXPRESSED = (
    "activation", "negative_slope", "slope", "ffn", "scaled", "ffn_free_layers", "entropy_regularizer",
)  # fmt: skip
_FIXED = {name: value for name, value in written_fields("SM").items() if name not in _EXPRESSED}
_FIXED |= dict(final_norm="none", learned_positions=True)
_BENT = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}  # what a linear one or a leaky ReLU is made of: relu


def check_expressible(config: ModelConfig) -> None:
    """Checks that HookedTransformer can express a config.

    Raises:
      UserError: names the first field that has no place there.
    """
    for name, value in _FIXED.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{name}={getattr(config, name)!r} of {config} has no place in HookedTransformer, only {value!r} has; "
                "safetensors have a place for every model"
            )
    if config.ffn == "bilinear":
        raise UserError(
            f"ffn='bilinear' of {config} has no place in HookedTransformer; safetensors have a place for every model"
        )


def to_transformer_lens(config: ModelConfig, variables: dict[str, Any], directory: str | os.PathLike) -> None:
    """Writes config.json for HookedTransformerConfig and model.safetensors for `HookedTransformer.load_state_dict`.

    Args:
      variables: {"params": …} of `Transformer(config)`.
      directory: made if it is not there; holds no config.json yet.
    Raises:
      UserError: HookedTransformer cannot express the config, a scale is 0 or not finite, or the folder is something
        else's or cannot be written.
    """
    check_expressible(config)
    tensors = state_dict(config, variables)
    settings = dict(
        n_layers=config.num_layers, d_model=config.model_dim, n_ctx=config.context_length, n_heads=config.num_heads,
        d_head=config.head_dim, d_vocab=config.vocab_size, normalization_type=None, default_prepend_bos=False,
        model_name="jax_entropy",
    )  # fmt: skip
    if config.ffn_free_layers == config.num_layers:
        settings |= dict(attn_only=True)
    else:
        act_fn = _BENT.get(config.activation, "relu")
        settings |= dict(d_mlp=tensors["blocks.0.mlp.b_in"].size, act_fn=act_fn)
    write_folder(local_path(directory, "directory"), settings, tensors)


def state_dict(config: ModelConfig, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors by their names in HookedTransformer.

    Raises:
      UserError: a scale is 0 or not finite.
    """
    params = {name: np.asarray(value, np.float64) for name, value in flatten_dict(variables["params"], sep="/").items()}
    L, N, H, D, T = config.num_layers, config.num_heads, config.head_dim, config.model_dim, config.context_length
    tensors = {
        "embed.W_E": params["token_embedding"] * config.embedding_scale,
        "pos_embed.W_pos": params["position_embedding"],
    }
    scale = 1.0  # our stream is so many times theirs
    for stack, layers in config.stacks.items():
        for i, layer in enumerate(layers):
            of_block = {
                name.removeprefix(f"{stack}/"): p[i] for name, p in params.items() if name.startswith(f"{stack}/")
            }
            block = _attention(of_block, scale, N, H, D)
            if config.ffn_free_layers < L:
                of_ffn, scale = _feed_forward(config, of_block, params.get("negative_slope"), scale)
                block |= of_ffn
            tensors |= {f"blocks.{layer}.{name}": value for name, value in block.items()}
    tensors |= {"unembed.W_U": scale * params.get("head", params["token_embedding"]).T}
    tensors |= {"unembed.b_U": np.zeros(config.vocab_size)}
    found = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    # Two constants that are part of its state.
    constants = dict(mask=np.tril(np.ones((T, T), bool)), IGNORE=np.array(-np.inf, np.float32))
    return found | {f"blocks.{layer}.attn.{name}": value for layer in range(L) for name, value in constants.items()}


def _attention(block: dict[str, np.ndarray], scale: float, N: int, H: int, D: int) -> dict[str, np.ndarray]:
    found = {}
    for theirs, ours in (("Q", "query"), ("K", "key"), ("V", "value")):
        found[f"attn.W_{theirs}"] = scale * block[f"attention/{ours}/kernel"].swapaxes(0, 1)
        found[f"attn.b_{theirs}"] = block.get(f"attention/{ours}/bias", np.zeros((N, H)))
    found["attn.W_O"] = block["attention/out/kernel"] / scale
    found["attn.b_O"] = block.get("attention/out/bias", np.zeros(D)) / scale
    return found


def _feed_forward(
    config: ModelConfig, block: dict[str, np.ndarray], slope: np.ndarray | None, scale: float
) -> tuple[dict[str, np.ndarray], float]:
    """The tensors of a block's feed-forward, zeros where it has none; and the scale of the stream behind it."""
    D, F = config.model_dim, config.model_dim if config.ffn == "fused" else config.hidden_dim
    if "ffn/fused/kernel" in block:
        into, bias_F = block["ffn/fused/kernel"], block.get("ffn/fused/bias", np.zeros(F))
        out, bias_D = np.eye(D), np.zeros(D)
    elif "ffn/up/kernel" in block:
        into, bias_F = block["ffn/up/kernel"], block.get("ffn/up/bias", np.zeros(F))
        out, bias_D = block["ffn/down/kernel"], block.get("ffn/down/bias", np.zeros(D))
    else:
        into, bias_F, out, bias_D = np.zeros((D, F)), np.zeros(F), np.zeros((F, D)), np.zeros(D)
    if config.activation not in _BENT:  # f(x) = relu(x) − slope·relu(−x)
        slope = block.get("ffn/negative_slope", config.negative_slope if slope is None else slope)
        slope = 1.0 if config.activation == "identity" else slope
        into, bias_F, out = np.hstack([into, -into]), np.hstack([bias_F, -bias_F]), np.vstack([out, -slope * out])
    behind = scale * float(block.get("beta", 1.0))
    shrink = float(block.get("alpha", 1.0)) * behind
    if not (np.isfinite(shrink) and shrink):
        raise UserError(f"the scales of {config} are not finite or 0 in a layer, and no matrix can take them in")
    found = {"W_in": scale * into, "b_in": bias_F, "W_out": out / shrink, "b_out": bias_D / shrink}
    return {f"mlp.{name}": value for name, value in found.items()}, behind
