"""The TPU kernels without a TPU: interpreted against float64, and compiled ahead of time where libtpu is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jax_entropy.attention import AttentionStats, dense, tpu
from jax_entropy.bench.cases import CASES, errors
from jax_entropy.errors import UserError

TILE = tpu.Blocks(128, 128, 256)
ONE, TWO = tpu.Kernels(TILE, TILE, None), tpu.Kernels(TILE, TILE, TILE)  # backward kernels
interpreted = functools.partial(tpu.attend, interpret=True)


def operator(q, k, v, t, position, window, num_slots, kernels=ONE):
    position = k.shape[1] - q.shape[1] if position is None else position
    out, *stats = interpreted(q, k, v, q.shape[-1] ** -0.5 / t, position, window, num_slots, kernels=kernels)
    return out, AttentionStats(*stats)


def case(name):
    return next(case for case in CASES if case.name == name)


def test_logits_of_any_size_are_right():
    """The largest is taken off before the scale; 1e10 is more than the GPU kernels hold."""
    found = errors(case("logits of 1e10"), operator)
    assert found.pop("bit-equal")
    assert max(found.values()) <= 1e-5, found


def test_bfloat16_costs_its_own_rounding_only():
    """Outputs and gradients to a few of its 2⁻⁹, statistics as in float32."""
    found = errors(case("earlier keys"), operator, jnp.bfloat16)
    assert max(found[name] for name in ("entropy", "logsumexp", "max_logit")) <= 1e-5
    assert max(found[name] for name in ("out", "dq", "dk", "dv", "dtemperature")) <= 4 * 2**-9


def all_of(attend, q, k, v, scale, *where):
    """Outputs, and gradients of a number that depends on all of them but the largest logit."""

    def number(*arguments):
        out, entropy, logsumexp, largest = attend(*arguments, *where)
        weights = jnp.cos(jnp.arange(entropy.size, dtype=jnp.float32)).reshape(entropy.shape)
        return jnp.sum(jnp.sin(out)) + jnp.sum(weights * (entropy - logsumexp)), (out, entropy, logsumexp, largest)

    return jax.jit(jax.value_and_grad(number, (0, 1, 2, 3), has_aux=True))(q, k, v, scale)


@pytest.mark.parametrize(
    ("heads", "width", "T", "S", "position", "kernels", "windowed"),
    [
        (2, 64, 300, 400, 40, ONE, ()),  # spans of both sides, and keys that no query sees
        (3, 48, 130, 130, 0, TWO, ()),  # lanes that are no head's, and a head that is not there
        (1, 64, 600, 650, 40, ONE, (20, 0)),  # a window smaller than a tile
        (1, 64, 600, 640, 40, TWO, (260, 7)),  # whole tiles, with slots
    ],
)
def test_values_and_gradients_are_those_of_the_definition(heads, width, T, S, position, kernels, windowed):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, length, heads, width)).astype(np.float32) for length in (T, S, S))
    k[:, position + T :] = v[:, position + T :] = 1e30
    scale = rng.uniform(0.05, 0.5, (heads, T)).astype(np.float32)
    found = all_of(functools.partial(interpreted, kernels=kernels), q, k, v, scale, jnp.int32(position), *windowed)
    expected = all_of(dense.attend, q, k, v, scale, position, *windowed)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))


def test_an_unused_entropy_takes_its_terms_out_of_the_backward_kernel():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 1, 16))

    def kernels(weight):
        def loss(q):
            out, entropy, *_ = interpreted(q, k, v, jnp.full((1, 8), 0.25), 0, kernels=ONE)
            return jnp.sum(out) + (weight * jnp.sum(entropy) if weight else 0)

        return len(str(jax.make_jaxpr(jax.grad(loss))(q)))

    assert kernels(0) < kernels(1.0)


def test_tiles_are_even_and_in_whole_lanes():
    assert tpu._even(1024, 512, 2048) == (512, 1024, 1024)
    assert tpu._even(1100, 512, 2048) == (384, 1152, 1152)
    assert tpu._even(2100, 512, 2048) == (512, 1536, 3072)
    assert tpu._even(20, 512) == (128, 128, 128)


def test_a_row_of_dq_that_memory_does_not_hold_has_a_kernel_of_its_own():
    q = lambda T, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, T, 2, 64), dtype)  # noqa: E731
    assert tpu.tiles("TPU v5 lite", q(1024), 1024).dq is None
    assert tpu.tiles("TPU v4", q(32768), 32768).dq is not None
    with pytest.raises(UserError, match="'tpu' takes heads of up to 128 in bfloat16, float32, not 64 in float16"):
        tpu.tiles("TPU v4", q(1024, jnp.float16), 1024)


TOPOLOGIES = {"v5e": "v5e:2x2", "v4": "v4:2x2x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LENGTHS = ((64, 1024), (128, 1024), (64, 16384), (64, 32768))


@pytest.mark.parametrize(
    ("chip", "width", "T", "dtype", "windowed"),
    [("v5e", 64, 1024, "bfloat16", ())]
    + [
        pytest.param("v5e", 64, T, "bfloat16", (256, 8), marks=pytest.mark.long, id=f"v5e-64-{T}-a window, slots")
        for _, T in LENGTHS[1:]
    ]
    + [
        pytest.param(chip, width, T, dtype, (), marks=pytest.mark.long)
        for chip in TOPOLOGIES
        for dtype in ("bfloat16", "float32")
        for width, T in LENGTHS
        if (chip, width, T, dtype) != ("v5e", 64, 1024, "bfloat16")
    ],
)
def test_the_kernels_compile_ahead_of_time(chip, width, T, dtype, windowed):
    pytest.importorskip("libtpu", reason="libtpu is not installed (the extra `plan`)")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]
    shaped = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    earlier = sum(windowed[1:])
    x, rows = shaped((1, T, 2, width), jnp.dtype(dtype)), shaped((2, T), jnp.float32)
    y = shaped((1, T + earlier, 2, width), x.dtype)
    kernels = tpu.tiles(device.device_kind, x, T + earlier)

    def loss(q, k, v, scale):
        out, entropy, logsumexp, _ = tpu.attend(q, k, v, scale, earlier, *windowed, kernels=kernels)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(entropy) + jnp.sum(logsumexp)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, y, y, rows).compile()
    assert compiled.as_text().count("tpu_custom_call") == (2 if kernels.dq is None else 3)
