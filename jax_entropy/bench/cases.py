"""Cases that every implementation of attention is held to, and what they come to in float64.

The tests run every implementation of this machine on them, `bench device` those of a card.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.attention import AttentionStats

H = 64
STATISTICS = ("entropy", "logsumexp", "max_logit")
Arguments = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Case(NamedTuple):
    """Arguments q, k, v, temperature (exact in bfloat16, but for the last), and how well float32 must do on them.

    `largest` is the size of its logits, of which kernels hold no more than 5e8. `rtol` is relative to the sum of the
    magnitudes that a number is summed from: the error of any order of summation. Of statistics it is the bound for
    every type, since they are float32; of outputs and gradients in a shorter type the bound is that type's epsilon, of
    dv, which is rounded three times, 1.5 of it.
    """

    name: str
    arguments: Callable[[], Arguments]
    position: int | None = None
    through: tuple[str, ...] = ("out", "entropy", "logsumexp")  # which outputs have a cotangent
    largest: float = 1e4
    rtol: float = 1e-5
    window: int | None = None
    num_slots: int = 0

    def beyond(self, errors: dict[str, float], dtype: Any = jnp.float32) -> dict[str, float]:
        """Those of `errors` that are above their bounds, and two runs that differ: of what is right, none."""
        rounding = float(jnp.finfo(dtype).eps) / 2
        bounds = {name: self.rtol if name in STATISTICS else max(self.rtol, 2 * rounding) for name in errors}
        bounds["dv"] = max(self.rtol, 3 * rounding)  # of weights, of dout/l, of the result
        return {k: error for k, error in errors.items() if not (error if k == "bit-equal" else error <= bounds[k])}


def _normal(T: int, S: int, temperatures: tuple[float, float] = (0.1, 10.0), N: int = 2) -> Arguments:
    rng = np.random.default_rng(0)
    q, k, v = (np.round(rng.standard_normal((2, length, N, H)) * 32) / 32 for length in (T, S, S))
    return q, k, v, np.exp(rng.uniform(*np.log(temperatures), (N, T)))


def _around(offset: float, unit: float, temperature: float, T: int = 130) -> Arguments:
    """q·k is offset + unit times a whole number up to 252, exact in float32: differences survive beside any offset."""
    rng, N = np.random.default_rng(0), 2
    q, k = (rng.integers(-2, 3, (2, T, N, H)).astype(float) for _ in range(2))
    q[..., 0], k[..., 0] = 1, offset / unit
    return q, k * unit, _normal(T, T)[2], np.full((N, T), temperature)


def _equal(T: int) -> Arguments:
    """Every key has the same weight, and row i an entropy of log(i + 1)."""
    q, k, v, t = _normal(T, T)
    return 0 * q, k, v, t


def _behind(garbage: float) -> Arguments:
    """Nine queries in a cache of 140 keys, which holds `garbage` behind the last of them."""
    q, k, v, t = _normal(9, 140)
    for x in (k, v):
        x[:, 60 + 9 :] = garbage
    return q, k, v, t


_WITHOUT_LSE = ("out", "entropy")  # its gradient by the temperature is as large as the logits and would hide the others
CASES = (
    Case("one key", lambda: _normal(1, 1)),
    Case("one tile", lambda: _normal(7, 7)),
    Case("tiles that do not fit", lambda: _normal(129, 129)),
    Case("a thousand, of one head", lambda: _normal(1000, 1000, N=1)),
    Case("many heads", lambda: _normal(20, 20, N=12)),
    Case("earlier keys", lambda: _normal(20, 150)),
    Case("equal logits", lambda: _equal(129)),
    Case("logits of 80", lambda: _around(0.0, 2.0, 0.25, 129)),
    Case("cold and hot rows", lambda: _normal(130, 130, (0.01, 100.0))),
    Case("logits of 5e5, weights of any size", lambda: _around(2.0**26, 8.0, 16.0), largest=5e5, through=_WITHOUT_LSE),
    Case("logits of 1e8, equal or e^16 apart", lambda: _around(2.0**30, 128.0, 1.0), largest=1e8, through=_WITHOUT_LSE),
    Case("logits of -1e8", lambda: _around(-(2.0**30), 128.0, 1.0), largest=1e8, through=_WITHOUT_LSE),
    Case("logits of 1e10", lambda: _around(2.0**37, 2.0**14, 1.0), largest=1e10, through=_WITHOUT_LSE),
    Case("temperatures of 1e-9", lambda: _around(1.0, 1.0, 1e-9), largest=1e10, through=_WITHOUT_LSE),
    Case("a cache at its position", lambda: _behind(0.0), position=60),
    Case("a cache with anything behind", lambda: _behind(1e30), position=60),
    Case("a window smaller than a tile", lambda: _normal(130, 130), window=20),
    Case("a window, slots, earlier keys", lambda: _normal(150, 170), window=75, num_slots=5),
)


class Number(NamedTuple):
    """An array in float64 and the sum of the magnitudes that its elements are summed from."""

    value: np.ndarray
    size: np.ndarray


def cotangents(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of out, entropy and logsumexp; 0 where nothing goes through."""
    (B, T, N, _), rng = case.arguments()[0].shape, np.random.default_rng(1)
    shapes = dict(out=(B, T, N, H), entropy=(B, N, T), logsumexp=(B, N, T))
    return tuple(rng.choice([-2.0, -1.0, 1.0, 2.0], shape) * (name in case.through) for name, shape in shapes.items())


def in_float64(case: Case, rounding: float = 0.0, least: float = 0.0) -> dict[str, Number]:
    """Outputs and gradients by their formulas (docs/mathematics.md), no trick but the subtracted maximum.

    Args:
      rounding: of what is subtracted from the logits of a row, relative to it.
      least: the magnitude below which a weight, its gradient or a result loses digits.
    """
    q, k, v, t = case.arguments()
    dout, dentropy, dlse = cotangents(case)
    T, S = q.shape[1], k.shape[1]
    position = S - T if case.position is None else case.position
    own, keys = np.arange(T)[:, None] + position, np.arange(S)
    visible = (keys <= own) & ((keys > own - (case.window or S)) | (keys < case.num_slots))
    k, v = (np.where((np.arange(S) < position + T)[:, None, None], x, 0) for x in (k, v))  # nobody sees the others

    def dot(equation: str, x: np.ndarray, y: np.ndarray, x_size: np.ndarray) -> Number:
        return Number(np.einsum(equation, x, y), np.einsum(equation, x_size, abs(y)) + least)

    scale = (1 / (t * np.sqrt(H)))[:, :, None]
    s = np.where(visible, np.einsum("BTNH,BSNH->BNTS", q, k), -np.inf)
    largest = s.max(-1, keepdims=True)
    x = np.where(visible, (s - largest) * scale, -np.inf)
    z = np.exp(x).sum(-1, keepdims=True)
    p, x = np.exp(x) / z, np.where(visible, x, 0)
    log_p = x - np.log(z)
    entropy = -(p * log_p).sum(-1)
    logit = largest[..., 0] * scale[..., 0]
    p_size = p + visible * least
    out = dot("BNTS,BSNH->BTNH", p, v, p_size)

    dp = dot("BTNH,BSNH->BNTS", dout, v, abs(dout))
    row = np.einsum("BTNH,BTNH->BNT", dout, out.value)[..., None]
    dlse, dentropy, H_ = dlse[..., None], dentropy[..., None], entropy[..., None]
    dx = p * (dp.value - row + dlse - dentropy * (log_p + H_))
    size = p * (dp.size + abs(row) + abs(dlse) + abs(dentropy) * (abs(log_p) + H_))
    ds, ds_size = dx * scale, size * scale + visible * least
    by_lse = Number((dlse[..., 0] * logit).sum(0), abs(dlse[..., 0] * logit).sum(0))
    return dict(
        out=out,
        entropy=Number(entropy, 1 + entropy),
        logsumexp=Number(logit + np.log(z[..., 0]), 1 + abs(logit)),
        max_logit=Number(logit, 1 + abs(logit)),
        dq=dot("BNTS,BSNH->BTNH", ds, k, ds_size),
        dk=dot("BNTS,BTNH->BSNH", ds, q, ds_size),
        dv=dot("BNTS,BTNH->BSNH", p, dout, p_size),
        dtemperature=Number(
            -((dx * x).sum((0, 3)) + by_lse.value) / t,
            ((size * (abs(x) + rounding * abs(logit[..., None]))).sum((0, 3)) + by_lse.size) / t,
        ),
    )  # fmt: skip


Operator = Callable[..., tuple[jax.Array, AttentionStats]]  # q, k, v, temperature; position=, window=, num_slots=


def errors(case: Case, operator: Operator, dtype: Any = jnp.float32, rounding: float = 0.0) -> dict[str, float]:
    """The largest error of each output and gradient, of what it is summed from.

    Args:
      operator: compiled once for all cases of a shape.
      dtype: of q, k, v and the cotangent of out.
      rounding: as for `in_float64`; 2⁻²³ for kernels, 0 for those that take off the largest logit itself.
    Returns:
      Errors by name, and "bit-equal": whether a second run gives the same bits.
    """
    q, k, v, t = case.arguments()
    dout, *dstats = cotangents(case)

    def run() -> list[np.ndarray]:
        *tensors, dout_ = (jnp.asarray(x, dtype) for x in (q, k, v, dout))
        t_, *dstats_ = (jnp.asarray(x, jnp.float32) for x in (t, *dstats))
        compiled = _compiled(operator, case.num_slots)
        return jax.device_get(compiled((*tensors, t_), (dout_, *dstats_), case.position, case.window))

    expected, found, again = in_float64(case, rounding, float(jnp.finfo(dtype).tiny)), run(), run()
    off = {
        name: float((np.abs(np.asarray(actual, np.float64) - number.value) / (number.size + 1e-30)).max())
        for (name, number), actual in zip(expected.items(), found, strict=True)
    }
    return off | {"bit-equal": all(map(np.array_equal, found, again))}


@functools.cache
def _compiled(operator: Operator, num_slots: int) -> Callable[..., tuple[jax.Array, ...]]:
    """Outputs and gradients from inputs and cotangents, which are donated, and a traced position and window."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def outputs_and_gradients(inputs, given, position, window):
        def outputs(q, k, v, t):
            out, stats = operator(q, k, v, t, position=position, window=window, num_slots=num_slots)
            return (out, stats.entropy, stats.logsumexp), stats.max_logit

        values, pull, max_logit = jax.vjp(outputs, *inputs, has_aux=True)
        return *values, max_logit, *pull(given)

    return outputs_and_gradients
