"""One operator, several implementations: causal softmax attention that also returns each row's entropy.

All implementations give the same numbers and the same gradients, through the output, the entropy and the logsumexp.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_entropy.attention.blockwise import blockwise_attention
from jax_entropy.attention.dense import dense_attention
from jax_entropy.errors import UserError, nearest

IMPLEMENTATIONS = {"dense": dense_attention, "blockwise": blockwise_attention}


class AttentionStats(NamedTuple):
    """What a row of weights looked like, in nats: [B, N, T] each, float32 (float64 for float64 inputs)."""

    entropy: jax.Array
    logsumexp: jax.Array
    max_logit: jax.Array


def attention(
    q_BxTxNxH: jax.Array,
    k_BxSxNxH: jax.Array,
    v_BxSxNxH: jax.Array,
    temperature_NxT: jax.Array | None = None,
    *,
    implementation: str = "auto",
) -> tuple[jax.Array, AttentionStats]:
    """Computes softmax(q_i·k_j / (t_i·√H))·v_j and the entropy of every row of weights (paper §2, App. A).

    Causal with S ≥ T: the last T keys stand at the queries' positions, so query i sees the keys up to i + S − T.
    Differentiable in q, k, v and temperature through out, entropy and logsumexp; max_logit is for watching.

    Args:
      q_BxTxNxH: queries.
      k_BxSxNxH, v_BxSxNxH: keys and values.
      temperature_NxT: positive divisor t of the scaled logits by head and query position; None is 1.
      implementation: "dense" keeps every weight; "blockwise" none of them, in reverse mode only (no jvp, no second
        derivative); "auto" takes the faster one, see `choose`.

    Returns:
      out [B, T, N, H] in the type of q, and AttentionStats.

    Raises:
      UserError: shapes that do not fit together, or an implementation that this device lacks.
    """
    _check_shapes(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, temperature_NxT)
    (_, T, N, H), S = q_BxTxNxH.shape, k_BxSxNxH.shape[1]
    dtype = jnp.result_type(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, jnp.float32)
    scale_NxT = jnp.full((N, T), H**-0.5, dtype)
    if temperature_NxT is not None:
        scale_NxT = scale_NxT / temperature_NxT.astype(dtype)
    attend = _implementation(implementation, T, S)
    out_BxTxNxH, entropy_BxNxT, lse_BxNxT, max_BxNxT = attend(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT)
    return out_BxTxNxH, AttentionStats(entropy_BxNxT, lse_BxNxT, jax.lax.stop_gradient(max_BxNxT))


def choose(T: int, S: int) -> str:
    """The rule of "auto", measured on CPU (docs/benchmarks/attention.md).

    Up to 64 × 64 logits a head both take the same time and dense compiles faster; beyond, blockwise takes less time,
    forward and backward, in float32 and bfloat16.
    """
    return "dense" if T * S <= 64 * 64 else "blockwise"


def _implementation(name: str, T: int, S: int):
    if name == "auto":
        name = choose(T, S)
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    choices = ("auto", *IMPLEMENTATIONS)
    if name in ("gpu", "tpu"):
        raise UserError(f"attention {name!r} is not available on this {jax.default_backend()}{nearest('', choices)}")
    raise UserError(f"unknown attention implementation {name!r}{nearest(name, choices)}")


def _check_shapes(q, k, v, temperature) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise UserError(f"attention needs q [B, T, N, H], k and v [B, S, N, H], not {shapes}")
    B, T, N, H = q.shape
    S = k.shape[1]
    if not k.shape == v.shape == (B, S, N, H):
        raise UserError(f"k and v must be [B, S, N, H] with the B, N and H of q, not {shapes}")
    if not 1 <= T <= S:
        raise UserError(f"causal attention needs at least as many keys as queries (S >= T >= 1), not {shapes}")
    if temperature is not None and temperature.shape != (N, T):
        raise UserError(f"temperature must be [N, T] = {(N, T)} for {shapes}, not {temperature.shape}")
