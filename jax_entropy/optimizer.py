"""The paper's optimiser (§6 settings) as an Optax chain: clipping, AdamW with a decay mask, warm-up and decay.

QK-clip comes after the update, and is no part of the chain: it looks at logits, not at gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jax_entropy.config import warmup_steps
from jax_entropy.errors import UserError, nearest
from jax_entropy.sharding import path_name

# Only matrices and embeddings decay; norms and biases are exempt as in the published code, temperatures, thresholds,
# α, β and slopes by our choice.
_DECAYED = ("kernel", "token_embedding", "position_embedding", "value_embedding", "head")


def learning_rate_schedule(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then linear or cosine decay to `end_learning_rate` at `num_steps`.

    `config` is config.optimizer; its `warmup` is a share of the steps below 1, a number of steps from 1 on.

    Raises:
      UserError: a schedule that does not exist, or a warm-up that leaves no step after it.
    """
    peak, end = config.learning_rate, config.end_learning_rate
    warmup = warmup_steps(config, num_steps)
    decays = {
        "linear": lambda: optax.linear_schedule(peak, end, num_steps - warmup),
        "cosine": lambda: optax.cosine_decay_schedule(peak, num_steps - warmup, alpha=end / peak),
        "constant": lambda: optax.constant_schedule(peak),
    }
    if config.schedule not in decays:
        raise UserError(f"config.optimizer.schedule={config.schedule!r} is not known{nearest(config.schedule, decays)}")
    decay = decays[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(0, peak, warmup), decay], [warmup]) if warmup else decay


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay acts on."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).split("/")[-1] in _DECAYED, params)


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """AdamW after global-norm clipping (clip_norm 0: none); `config` is config.optimizer."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate_schedule(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
            mu_dtype=config.moments,
        ),
    )


def qk_clip(params: Any, max_logit_LxN: jax.Array, limit: float) -> tuple[Any, jax.Array]:
    """QK-clip (MuonClip, arXiv 2507.20534): W_q and W_k of a head whose logits passed a limit, each times √(limit/max).

    With QK-norm, the scalar of such a head times limit/max.

    Args:
      params: of the model, after the optimiser's update.
      max_logit_LxN: largest logit of each head in this step's batch, divided by temperatures as the softmax sees it.
      limit: τ.
    Returns:
      The parameters, and what each head's logits were multiplied by [L, N]: 1 where they were below the limit.
    """
    factor_LxN = limit / jnp.maximum(max_logit_LxN, limit)
    clipped, first = dict(params), 0
    for stack in ("blocks", "blocks_without_ffn"):
        if stack in params:
            attention = params[stack]["attention"]
            last = first + attention["query"]["kernel"].shape[0]
            scaled = _clipped(attention, factor_LxN[first:last])
            clipped[stack], first = params[stack] | {"attention": attention | scaled}, last
    return clipped, factor_LxN


def _clipped(attention: dict[str, Any], factor_LxN: jax.Array) -> dict[str, Any]:
    """Those parameters of attention by which the logits of a head are multiplied by a factor."""
    if "qk_gain" in attention:  # its norm undoes what is done to the matrices
        return {"qk_gain": attention["qk_gain"] * factor_LxN}
    root_LxN = jnp.sqrt(factor_LxN)
    scaled = {side: _scale_heads(attention[side], root_LxN) for side in ("query", "key")}
    if "slot_key" in attention:  # learned keys are keys too
        scaled["slot_key"] = attention["slot_key"] * root_LxN[:, None, :, None]
    return scaled


def _scale_heads(linear: dict[str, jax.Array], factor_LxN: jax.Array) -> dict[str, jax.Array]:
    """A layer to the heads whose outputs are multiplied by a factor; weight normalisation keeps it in the gain."""
    names = ("gain" if "gain" in linear else "kernel", "bias")
    scaled = {name: linear[name] for name in names if name in linear}
    return linear | {
        name: x * jnp.expand_dims(factor_LxN, (*range(1, x.ndim - 2), x.ndim - 1)) for name, x in scaled.items()
    }
