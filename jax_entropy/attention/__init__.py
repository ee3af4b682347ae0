"""One operator, several implementations: causal softmax attention that also returns each row's entropy.

All implementations give the same numbers and the same gradients, through the output, the entropy and the logsumexp.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_entropy.attention.blockwise import blockwise_attention
from jax_entropy.attention.dense import dense_attention
from jax_entropy.errors import UserError, nearest
from jax_entropy.sharding import platform


class AttentionStats(NamedTuple):
    """What a row of weights looked like, in nats: [B, N, T] each, float32 (float64 for float64 inputs)."""

    entropy: jax.Array
    logsumexp: jax.Array
    max_logit: jax.Array


class Implementation(NamedTuple):
    """One way to compute the operator: `function(q, k, v, scale [N, T], position) -> (out, entropy, lse, max)`."""

    function: Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]]
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")


# A kernel is a file beside these, a line here, and one in `choose`.
IMPLEMENTATIONS = {
    "dense": Implementation(dense_attention),
    "blockwise": Implementation(blockwise_attention),
}


def attention(
    q_BxTxNxH: jax.Array,
    k_BxSxNxH: jax.Array,
    v_BxSxNxH: jax.Array,
    temperature_NxT: jax.Array | None = None,
    *,
    position: int | jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, AttentionStats]:
    """Computes softmax(q_i·k_j / (t_i·√H))·v_j and the entropy of every row of weights (paper §2, App. A).

    Causal with S ≥ T: query i stands at the position of key `position` + i and sees the keys up to there.
    Differentiable in q, k, v and temperature through out, entropy and logsumexp; max_logit is for watching.

    Args:
      q_BxTxNxH: queries.
      k_BxSxNxH, v_BxSxNxH: keys and values.
      temperature_NxT: positive divisor t of the scaled logits by head and query position; None is 1.
      position: key at which the first query stands, traced or not, as in a cache of fixed size; keys behind a query may
        hold anything finite. None: S − T, the queries are the last T of the keys.
      implementation: "dense" keeps every weight; "blockwise" none of them, in reverse mode only (no jvp, no second
        derivative); "auto" takes the faster one, see `choose`.

    Returns:
      out [B, T, N, H] in the type of q, and AttentionStats.

    Raises:
      UserError: shapes that do not fit together, or an implementation that this device lacks.
    """
    _check(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, temperature_NxT, position)
    (_, T, N, H), S = q_BxTxNxH.shape, k_BxSxNxH.shape[1]
    attend = _implementation(implementation, T, S).function
    dtype = jnp.result_type(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, jnp.float32)
    scale_NxT = jnp.full((N, T), H**-0.5, dtype)
    if temperature_NxT is not None:
        scale_NxT = scale_NxT / temperature_NxT.astype(dtype)
    out_BxTxNxH, entropy_BxNxT, lse_BxNxT, max_BxNxT = attend(
        q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, S - T if position is None else position
    )
    return out_BxTxNxH, AttentionStats(entropy_BxNxT, lse_BxNxT, jax.lax.stop_gradient(max_BxNxT))


def choose(T: int, S: int) -> str:
    """The rule of "auto", measured on CPU (docs/benchmarks/attention.md).

    Up to 64 × 64 logits a head both take the same time and dense compiles faster; beyond, blockwise takes less time,
    forward and backward, in float32 and bfloat16.
    """
    return "dense" if T * S <= 64 * 64 else "blockwise"


def _implementation(name: str, T: int, S: int) -> Implementation:
    name, here = choose(T, S) if name == "auto" else name, platform()
    if name not in IMPLEMENTATIONS:
        raise UserError(f"unknown attention implementation {name!r}{nearest(name, ('auto', *IMPLEMENTATIONS))}")
    if here not in (found := IMPLEMENTATIONS[name]).platforms:
        work = ("auto", *(other for other, record in IMPLEMENTATIONS.items() if here in record.platforms))
        raise UserError(
            f"attention {name!r} runs on {' and '.join(found.platforms)}, and this is {here}; "
            f"here work {', '.join(map(repr, work))}"
        )
    return found


def _check(q, k, v, temperature, position) -> None:
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
    if isinstance(position, int) and not 0 <= position <= S - T:
        raise UserError(f"position={position} must lie between 0 and S − T = {S - T} for {shapes}")
