"""One operator, several implementations: causal softmax attention that also returns each row's entropy.

All implementations give the same numbers and the same gradients, through the output, the entropy and the logsumexp.
Kernels work in base 2, tile by tile. For query i, scale_i = 1/(t_i·√H), and the keys j that it sees:

    s_ij = q_i·k_j     a_i = scale_i·log₂e     m_i = max_j s_ij·a_i     x_ij = s_ij·a_i − m_i     e_ij = 2^x_ij
    l_i = Σ_j e_ij     w_i = Σ_j e_ij·x_ij     out_i = Σ_j e_ij·v_j / l_i
    entropy_i = ln2·(log₂ l_i − w_i/l_i)       logsumexp_i = ln2·(m_i + log₂ l_i)

Where a tile raises m_i by d, the sums so far decay: w ← 2^−d·(w − d·l), l ← 2^−d·l, out ← 2^−d·out.
Backward, with p_ij = e_ij/l_i and D_i = dout_i·out_i:

    dS_ij = p_ij·(dout_i·v_j − D_i + dlogsumexp_i − dentropy_i·(ln p_ij + entropy_i))
    dq_i = Σ_j scale_i·dS_ij·k_j     dk_j = Σ_i scale_i·dS_ij·q_i
    dv_j = Σ_i p_ij·dout_i           dscale_i = Σ_j dS_ij·s_ij = (Σ_j dS_ij·x_ij + m_i·dlogsumexp_i) / a_i

of which the loop sees, with dout'_i = dout_i/l_i, g_i = −scale_i·ln2·dentropy_i/l_i and
c_i = scale_i·(dlogsumexp_i − D_i − dentropy_i·entropy_i)/l_i − g_i·log₂ l_i, one more multiply-add for the entropy:

    scale_i·dS_ij = e_ij·(scale_i·dout'_i·v_j + c_i + g_i·x_ij)     dv_j = Σ_i e_ij·dout'_i
"""

import functools
import importlib
import importlib.metadata
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_entropy.errors import UserError, check_array, check_choice, check_kind, check_number, spelled
from jax_entropy.sharding import device_kind, platform


class AttentionStats(NamedTuple):
    """What a row of weights looked like, in nats: [B, N, T] each, float32 (float64 for float64 inputs)."""

    entropy: jax.Array
    logsumexp: jax.Array
    max_logit: jax.Array


class Implementation(NamedTuple):
    """One way to compute the operator: the file beside this one that it is in, and what it runs on.

    devices: how their names begin, as JAX has them.
    """

    module: str
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    devices: tuple[str, ...] = ("",)

    def runs_on(self, platform: str, device_kind: str) -> bool:
        """Whether a device of that kind can run it."""
        return platform in self.platforms and device_kind.startswith(self.devices)

    @property
    def function(self) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
        """`attend(q, k, v, scale [N, T], position[, window, num_slots]) -> (out, entropy, lse, max)`.

        A kernel's compiler loads only now.
        """
        return importlib.import_module(f"{__name__}.{self.module}").attend


# A kernel is a file beside these, a line here, and one in `choose`.
IMPLEMENTATIONS = {
    "dense": Implementation("dense"),
    "blockwise": Implementation("blockwise"),
    "gpu": Implementation("gpu", ("gpu",)),
    "hopper": Implementation("hopper", ("gpu",), ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")),
    "tpu": Implementation("tpu", ("tpu",)),
}


def attention(
    q_BxTxNxH: jax.Array,
    k_BxSxNxH: jax.Array,
    v_BxSxNxH: jax.Array,
    temperature_NxT: jax.Array | None = None,
    *,
    position: int | jax.Array | None = None,
    transform: Callable[[jax.Array], jax.Array] | None = None,
    window: int | jax.Array | None = None,
    num_slots: int = 0,
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
      window: how many keys a query sees, its own and those before it, traced or not; None: all.
      num_slots: so many of the first keys are seen by all queries, whatever the window is.
      transform: of the logits [B, N, T, S] on their way into the softmax, as in transformed.py; only "dense" and "auto"
        take one, and then no T×T array is kept either. max_logit stays that of the logits before it.
      implementation: "dense" keeps every weight; "blockwise" none of them, nor do the kernels "gpu", "hopper" and
        "tpu", which compute no block outside of a window; all but dense in reverse mode only (no jvp, no second
        derivative). "auto": the fastest, see `choose`.
    Returns:
      out [B, T, N, H] in the type of q, and AttentionStats.
    Raises:
      UserError: shapes that do not fit together, or an implementation that this device lacks.
    """
    _check(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, temperature_NxT, position, window, num_slots)
    check_kind("transform", transform, Callable | None, "a function of the logits, or None")
    check_choice("attention implementation", implementation, ("auto", *IMPLEMENTATIONS))
    (_, T, N, H), S = q_BxTxNxH.shape, k_BxSxNxH.shape[1]
    if transform is None:
        attend = _implementation(implementation, q_BxTxNxH, S, position is None, window is not None).function
    elif implementation in ("auto", "dense"):
        attend = functools.partial(importlib.import_module(f"{__name__}.transformed").attend, transform=transform)
    else:
        raise UserError(
            f"attention {implementation!r} is for the softmax of plain logits; PSM and Cap work with 'auto' or 'dense'"
        )
    windowed = () if window is None else (window, num_slots)
    dtype = jnp.result_type(q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, jnp.float32)
    scale_NxT = jnp.full((N, T), H**-0.5, dtype)
    if temperature_NxT is not None:
        scale_NxT = scale_NxT / temperature_NxT.astype(dtype)
    out_BxTxNxH, entropy_BxNxT, lse_BxNxT, max_BxNxT = attend(
        q_BxTxNxH, k_BxSxNxH, v_BxSxNxH, scale_NxT, S - T if position is None else position, *windowed
    )
    return out_BxTxNxH, AttentionStats(entropy_BxNxT, lse_BxNxT, jax.lax.stop_gradient(max_BxNxT))


def choose(platform: str, device_kind: str, q: jax.Array, S: int, at_end: bool = True, windowed: bool = False) -> str:
    """The rule of "auto", for queries [B, T, N, H] to S keys, at whose end they stand or not, with a window or not.

    On CPU, measured (docs/benchmarks/attention.md): up to 64 × 64 logits a head dense and blockwise take the same time
    and dense compiles faster; beyond, blockwise takes less time, forward and backward, in float32 and bfloat16.
    On GPUs, measured (docs/benchmarks/device.md): hopper for what it takes and, with a window, heads of up to 64, since
    masks of wider ones spill registers (docs/benchmarks/kernels.md); else gpu. On TPUs, not measured: tpu where there
    are queries enough for its lanes.
    """
    (_, T, _, H), half = q.shape, q.dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and H <= 128 and (half or q.dtype == jnp.float32):
        for_hopper = half and at_end and H in ((32, 64) if windowed else (32, 64, 96, 128)) and _assembler_is_sound()
        return "hopper" if for_hopper and IMPLEMENTATIONS["hopper"].runs_on(platform, device_kind) else "gpu"
    if platform == "tpu" and H <= 128 and q.dtype in (jnp.bfloat16, jnp.float32):
        return "tpu" if T >= 128 else "dense"
    return "dense" if T * S <= 64 * 64 else "blockwise"


def available() -> list[str]:
    """The implementations that this device can run, by name."""
    here, kind = platform(), device_kind()
    return [name for name, record in IMPLEMENTATIONS.items() if record.runs_on(here, kind)]


@functools.cache
def _assembler_is_sound() -> bool:
    """ptxas of CUDA 12.8.0 to 12.9.0 gets causal masks on Hopper wrong."""
    try:
        version = importlib.metadata.version("nvidia-cuda-nvcc-cu12")
    except importlib.metadata.PackageNotFoundError:
        return True
    return not (12, 8, 0) <= tuple(map(int, version.split(".")[:3])) < (12, 9, 86)


def _implementation(name: str, q: jax.Array, S: int, at_end: bool, windowed: bool) -> Implementation:
    here, kind = platform(), device_kind()
    name = choose(here, kind, q, S, at_end, windowed) if name == "auto" else name
    if not (found := IMPLEMENTATIONS[name]).runs_on(here, kind):
        work = ("auto", *available())
        needed = " and ".join(found.platforms if found.devices == ("",) else found.devices)
        raise UserError(
            f"attention {name!r} runs on {needed}, and this is {kind if here in found.platforms else here}; "
            f"here work {', '.join(map(repr, work))}"
        )
    return found


def _check(q, k, v, temperature, position, window, num_slots) -> None:
    for name, x, axes in (("q", q, "[B, T, N, H]"), ("k", k, "[B, S, N, H]"), ("v", v, "[B, S, N, H]")):
        check_array(name, x, axes)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"{name}={spelled(x)} must be an array of real numbers, like float32")
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    B, T, N, H = q.shape
    S = k.shape[1]
    if not k.shape == v.shape == (B, S, N, H):
        raise UserError(f"k and v must be [B, S, N, H] with the B, N and H of q, not {shapes}")
    if not 1 <= T <= S:
        raise UserError(f"causal attention needs at least as many keys as queries (S >= T >= 1), not {shapes}")
    if temperature is not None:
        check_array("temperature", temperature, "[N, T]")
        if temperature.shape != (N, T):
            raise UserError(f"temperature must be [N, T] = {(N, T)} for {shapes}, not {temperature.shape}")
    if window is not None:
        check_number("window", window, 1, traced=True)  # a query sees its own key
    for name, value in (("position", 0 if position is None else position), ("num_slots", num_slots)):
        check_number(name, value, -math.inf, traced=name == "position")  # kernels are compiled for their slots
        if isinstance(value, numbers.Integral) and not 0 <= value <= S - T:
            raise UserError(f"{name}={value} must lie between 0 and S − T = {S - T} for {shapes}")
