"""The GPU kernels without a GPU: interpreted against float64, lowered, their tiles, and their arithmetic."""

import contextlib
import functools
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_entropy.attention import AttentionStats, blockwise, dense, gpu, hopper, tpu
from jax_entropy.attention.blocks import blocks_for
from jax_entropy.attention.kernels import LN2, base2, key_blocks, multiply_add, query_blocks
from jax_entropy.bench.cases import CASES, errors
from jax_entropy.errors import UserError
from jax_entropy.sharding import make_mesh

TILES = gpu.Blocks(32, 32, 4, 2)
interpreted = functools.partial(gpu.attend, kernels=gpu.Kernels(TILES, TILES, TILES), interpret=True)
CASE = {case.name: case for case in CASES}
# a kernel takes seconds to interpret: what is special about it, and not what the other implementations show already
INTERPRETED = (
    "one key", "one tile", "tiles that do not fit", "a thousand, of one head", "many heads", "equal logits",
    "earlier keys", "cold and hot rows", "logits of 1e8, equal or e^16 apart", "a cache with anything behind",
    "a window smaller than a tile", "a window, slots, earlier keys",
)  # fmt: skip


@functools.cache
def operator(attend):
    """`attention` by one implementation's own function."""

    def attention(q, k, v, t, position, window, num_slots):
        position = k.shape[1] - q.shape[1] if position is None else position
        out, *stats = attend(q, k, v, q.shape[-1] ** -0.5 / t, position, window, num_slots)
        return out, AttentionStats(*stats)

    return attention


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_cases_that_all_implementations_share(name):
    assert not CASE[name].beyond(errors(CASE[name], operator(interpreted), rounding=2**-23))


TPU_TILE = tpu.Blocks(128, 128, 256)
WINDOWED = {
    "blockwise": blockwise.attend,
    "gpu": interpreted,
    "tpu": functools.partial(tpu.attend, kernels=tpu.Kernels(TPU_TILE, TPU_TILE, None), interpret=True),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_blocks_outside_of_a_window_are_not_visited(name):
    """NaN in a tile that is computed would be in what is summed over it, as 0 · NaN is; slots are seen all the same."""
    T, S, window, num_slots = 508, 512, 64, 4
    q, k, v = (jax.random.normal(jax.random.key(i), (1, length, 1, 16)) for i, length in enumerate((T, S, S)))

    @jax.jit
    def outputs_and_gradients(*inputs):
        def loss(*inputs):
            out, entropy, *_ = WINDOWED[name](*inputs, jnp.full((1, T), 0.25), S - T, window, num_slots)
            return jnp.sum(out) + jnp.sum(entropy), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)

    behind, late = slice(128, 256), slice(384, None)
    (_, out), (dq, *_) = outputs_and_gradients(q, k.at[:, behind].set(jnp.nan), v.at[:, behind].set(jnp.nan))
    assert np.isfinite(out[:, late]).all() and np.isfinite(dq[:, late]).all() and np.isnan(out[:, 256]).all()
    _, (_, dk, dv) = outputs_and_gradients(q.at[:, late].set(jnp.nan), k, v)
    assert np.isfinite(dk[:, behind]).all() and np.isfinite(dv[:, behind]).all() and np.isnan(dk[:, :num_slots]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_shorter_types_cost_their_own_rounding_only(dtype):
    """Outputs and gradients to a few of its 2⁻⁹, or 2⁻¹², statistics as in float32."""
    case = CASE["earlier keys"]
    assert not case.beyond(errors(case, operator(interpreted), dtype), dtype)


@pytest.mark.parametrize("output", [0, 1, 2], ids=["out", "entropy", "logsumexp"])
def test_a_loss_of_one_output_has_all_gradients_of_it(output):
    """The others' cotangents are not zeros to be multiplied: the kernels do not see them at all."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 16 + 4 * (i > 0), 1, 16)) for i in range(3))
    scale = jnp.linspace(0.1, 0.5, 16)[None]

    def gradients(attend):
        def loss(*inputs):
            values = attend(*inputs, 4)[output]
            return jnp.sum(values * jnp.cos(jnp.arange(values.size).reshape(values.shape)))

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, scale)

    for found, expected in zip(gradients(interpreted), gradients(dense.attend), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


def test_an_unused_entropy_takes_its_terms_out_of_the_backward_kernels():
    x = jax.ShapeDtypeStruct((1, 32, 1, 16), jnp.float32)

    def size(uses, **options):
        def loss(q, k, v):
            out, entropy, *_ = interpreted(q, k, v, jnp.full((1, 32), 0.25), 0, **options)
            return jnp.sum(out) + (jnp.sum(entropy) if uses else 0)

        return len(str(jax.make_jaxpr(jax.grad(loss))(x, x, x)))

    assert size(uses=False, with_entropy=False) < size(uses=False) < size(uses=True)


def test_float16_keeps_the_digits_of_small_gradients_over_long_rows():
    """Of 512 equal logits a weight is 2⁻⁹ and dout/l would be 2⁻¹⁹, which a float16 knows to 2⁻²⁴ only."""
    q, v = jnp.zeros((1, 512, 1, 16), jnp.float16), jnp.ones((1, 512, 1, 16), jnp.float16)
    _, pull = jax.vjp(lambda v: interpreted(q, q, v, jnp.ones((1, 512)), 0)[0], v)
    (dv,) = pull(jnp.full(v.shape, 3 * 2.0**-12, jnp.float16))
    expected = 3 * 2.0**-12 * np.cumsum(1 / np.arange(1, 513)[::-1])[::-1]
    np.testing.assert_allclose(dv[0, :, 0, 0], expected, rtol=2**-10, atol=2**-25)


def test_it_runs_in_a_scan_that_recomputes_and_in_vmap():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1, 16, 1, 16))
    scale = jnp.full((1, 16), 0.25)

    def loss(q, k, v):
        out, entropy, *_ = interpreted(q, k, v, scale, 0)
        return jnp.sum(out**2) + jnp.sum(entropy)

    def scanned(q):
        body = jax.checkpoint(lambda total, x: (total + loss(*x), None))
        return jax.lax.scan(body, 0.0, (q, k, v))[0]

    gradient = jax.jit(jax.grad(loss))
    one_by_one = jnp.stack([gradient(*x) for x in zip(q, k, v, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(q), one_by_one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(loss)))(q, k, v), one_by_one, rtol=1e-5, atol=1e-6)


def test_sequences_and_heads_may_be_split_over_a_mesh():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 16, 2, 16))
    scale = jnp.linspace(0.1, 0.5, 32).reshape(2, 16)

    @jax.jit
    def gradients(q, k, v, scale):
        def loss(*inputs):
            out, entropy, logsumexp, _ = interpreted(*inputs, 0)
            return jnp.sum(out**2) + jnp.sum(entropy) + jnp.sum(logsumexp**2)

        return jax.grad(loss, (0, 1, 2, 3))(q, k, v, scale)

    expected = gradients(q, k, v, scale)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rows, heads = PartitionSpec(("data", "fsdp"), None, "tensor"), PartitionSpec("tensor")
    with jax.set_mesh(mesh):
        placed = (jax.device_put(x, NamedSharding(mesh, rows)) for x in (q, k, v))
        found = gradients(*placed, jax.device_put(scale, NamedSharding(mesh, heads)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def for_a_gpu():
    """What lowering for a GPU asks for where there is none; jax 0.10, the last for Python 3.11, asks for nothing."""
    if sys.version_info < (3, 12):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize(
    "attend, window, T",
    [(gpu.attend, None, 200), (hopper.attend, None, 129), (hopper.attend, 32, 200)],
    ids=["gpu", "hopper, of any length", "hopper with a window"],
)
def test_the_kernels_lower_for_a_gpu_with_every_gradient(attend, window, T):
    x, rows = jax.ShapeDtypeStruct((1, T, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, T), jnp.float32)

    def loss(q, k, v, scale):
        out, entropy, logsumexp, _ = attend(q, k, v, scale, 0, window)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(entropy) + jnp.sum(logsumexp)

    with for_a_gpu():
        lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(x, x, x, rows).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call") >= 3


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs the interpreter of jax 0.11")
def test_hopper_is_right_and_has_no_race():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tiles = hopper.Blocks(64, 64, 2)
    attend = functools.partial(
        hopper.attend,
        kernels=hopper.Kernels(tiles, tiles, tiles),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    for name in ("earlier keys", "a window, slots, earlier keys"):
        assert not CASE[name].beyond(errors(CASE[name], operator(attend), jnp.bfloat16), jnp.bfloat16), name


def test_tiles_are_found_by_device_type_and_size():
    assert blocks_for("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 64, 512)["forward"] == [64, 64, 4, 3]
    assert blocks_for("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 64, 4096)["forward"] == [64, 128, 4, 3]
    assert blocks_for("gpu", "NVIDIA A100-SXM4-80GB", "float16", 48, 4096)["forward"] == [64, 64, 4, 3]
    with pytest.raises(UserError, match="'hopper' takes heads of up to 128 in bfloat16, float16, not 64 in float32"):
        blocks_for("hopper", "NVIDIA H200", "float32", 64, 512)


def test_hopper_names_what_it_does_not_take():
    x = jnp.zeros((1, 8, 1, 48), jnp.bfloat16)
    with pytest.raises(UserError, match="heads of 32, 64, 96, 128, not 48"):
        hopper.attend(x, x, x, jnp.ones((1, 8)), 0)
    with pytest.raises(UserError, match="a cache is for 'gpu'"):
        hopper.attend(x[..., :32], x[..., :32], x[..., :32], jnp.ones((1, 8)), jnp.int32(0))


sizes = st.sampled_from([4, 8, 16])


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    st.integers(1, 40), st.sampled_from([0, 1, 9]), st.integers(0, 12), st.integers(0, 12),
    st.sampled_from([1, 2, 5, 17, 80]), sizes, sizes,
)  # fmt: skip
def test_a_sweep_meets_every_block_that_is_seen_once_and_no_other(T, num_slots, earlier, behind, window, Q, K):
    """And masks all but those that are seen whole."""
    position, S = num_slots + earlier, num_slots + earlier + T + behind
    seen_TxS = np.asarray(dense.visible(np.arange(S)[None], np.arange(T)[:, None] + position, window, num_slots))

    def check(sweep, seen_by_block):
        met = [(i, masked) for begin, end, masked in sweep.runs() for i in range(int(begin), int(end))]
        needed = {i for i, seen in enumerate(seen_by_block) if seen.any()}
        assert [i for i, _ in met] == sorted(needed)
        assert all(masked or seen_by_block[i].all() for i, masked in met)

    for first in range(0, T - Q + 1, Q):
        rows = seen_TxS[first : first + Q]
        sweep = key_blocks(jnp.int32(first + position), Q, K, S, window, num_slots)
        check(sweep, [rows[:, i : i + K] for i in range(0, S, K)])
    for first in range(num_slots, position + T - K + 1, K):
        columns = seen_TxS[:, first : first + K]
        sweep = query_blocks(jnp.int32(first), jnp.int32(position), K, Q, T, window, num_slots)
        check(sweep, [columns[i : i + Q] for i in range(0, T, Q)])


finite = st.floats(-1e6, 1e6, width=32)


@hypothesis.settings(deadline=None)
@hypothesis.given(finite, finite, finite)
def test_one_rounding_for_a_product_and_a_sum(x, y, z):
    exact = float(np.longdouble(x) * np.longdouble(y) + np.longdouble(z))
    found = float(multiply_add(*(jnp.float32(value) for value in (x, y, z))))
    assert abs(found - exact) <= abs(exact) * 2**-22 + 1e-30


def test_a_scale_in_base_2_is_bounded():
    np.testing.assert_allclose(base2(jnp.asarray([0.125, 1e9])), [0.125 / LN2, 2**23], rtol=1e-6)
