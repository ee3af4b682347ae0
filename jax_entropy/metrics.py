"""What a run watches, as jitted pure functions of `Aux`, parameters and gradients; [L, N] arrays and scalars.

Only steps that log call them, so that they cost nothing on the others.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_entropy.entropy import head_bands, head_entropy, max_entropy
from jax_entropy.model import Aux
from jax_entropy.sharding import path_name

_GROUPS = (
    ("embedding", r"embedding$|head$"),
    ("temperature", r"temperature$"),
    ("threshold", r"threshold$"),
    ("scale", r"alpha$|beta$|gamma$|negative_slope$|value_mix$|value_embedding_scale$|log_scale$|shift$|qk_gain$"),
    ("norm", r"norm\d?/|final_norm/"),
    ("attention", r"attention/"),
    ("feed_forward", r"ffn/"),
)


@jax.jit
def entropy_metrics(aux: Aux) -> dict[str, jax.Array]:
    """Entropies of heads and layers in nats, their bands, largest logits, counts of NaN and Inf, what was learned."""
    entropy_LxN = head_entropy(aux.stats.entropy)
    T = aux.stats.entropy.shape[-1]
    bands, context, causal = head_bands(entropy_LxN), max_entropy(T), max_entropy(T, "causal")
    if aux.maximum is not None:
        context, causal = jnp.max(aux.maximum, axis=1)[:, None], jnp.mean(aux.maximum, axis=1)[:, None]
    metrics = dict(
        head_entropy=entropy_LxN,
        layer_entropy=jnp.mean(entropy_LxN, axis=1),
        bands_observed=bands,
        bands_context=head_bands(entropy_LxN, context),
        bands_causal=head_bands(entropy_LxN, causal),
        collapse=bands[0],
        overload=bands[3],
        max_logit=jnp.max(aux.stats.max_logit, axis=(1, 2, 3)),
        head_max_logit=jnp.max(aux.stats.max_logit, axis=(1, 3)),
        nan_count=jnp.sum(jnp.isnan(aux.stats.entropy), axis=(1, 2, 3)),
        inf_count=jnp.sum(jnp.isinf(aux.stats.logsumexp), axis=(1, 2, 3)),
    )
    if aux.maximum is not None:
        metrics |= dict(maximum_context=context[:, 0], maximum_causal=causal[:, 0])
    if aux.threshold is not None:
        metrics |= dict(
            threshold=aux.threshold,
            threshold_mean=jnp.mean(aux.threshold, axis=1),
            threshold_variance=jnp.var(aux.threshold, axis=1),
        )
    if aux.temperature is not None:
        of_layers = {name: getattr(jnp, name)(aux.temperature, axis=(1, 2)) for name in ("mean", "min", "max")}
        metrics["temperature"] = of_layers
    return metrics


def gradient_norms(gradients: Any) -> dict[str, jax.Array]:
    """Norm of the gradient by parameter group."""
    groups: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        groups.setdefault(_group(path_name(path)), []).append(leaf)
    return {name: optax.global_norm(leaves) for name, leaves in groups.items()}


def _group(parameter: str) -> str:
    for group, pattern in _GROUPS:
        if re.search(pattern, parameter):
            return group
    raise LookupError(f"metrics._GROUPS has no group for the parameter {parameter!r}")
