"""The attention operator against its float64 definition: values, every gradient, properties, memory."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_entropy import attention
from jax_entropy.attention import IMPLEMENTATIONS, choose
from jax_entropy.errors import UserError

B, N, H = 2, 3, 8
BOTH = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))


def definition(q, k, v, t):
    """Rows one by one, in numpy float64: out, entropy, logsumexp, max logit."""
    q, k, v, t = (np.asarray(x, np.float64) for x in (q, k, v, t))
    T, S = q.shape[1], k.shape[1]
    out, stats = np.zeros(q.shape), np.zeros((3, q.shape[0], q.shape[2], T))
    for b, n, i in np.ndindex(q.shape[0], q.shape[2], T):
        seen = i + S - T + 1
        s = k[b, :seen, n] @ q[b, i, n] / (t[n, i] * np.sqrt(q.shape[-1]))
        lse = s.max() + np.log(np.exp(s - s.max()).sum())
        p = np.exp(s - lse)
        out[b, i, n] = p @ v[b, :seen, n]
        stats[:, b, n, i] = -(p * (s - lse)).sum(), lse, s.max()
    return out, stats


def inputs(T, S, scale=1.0, seed=0, dtype=np.float64, temperatures=(0.1, 10.0)):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, length, N, H)) for length in (T, S, S))
    t = np.exp(rng.uniform(*np.log(temperatures), (N, T)))
    return tuple(jnp.asarray(x, dtype) for x in (q * scale, k, v, t))


def scalar(*arguments, implementation, through):
    """A number that depends on one of the operator's outputs, every element with its own weight."""
    out, stats = attention(*arguments, implementation=implementation)
    chosen = {"out": out, "entropy": stats.entropy, "logsumexp": stats.logsumexp, "max_logit": stats.max_logit}[through]
    return jnp.sum(chosen * jnp.cos(jnp.arange(chosen.size, dtype=chosen.dtype).reshape(chosen.shape)))


def gradients(arguments, implementation, through):
    return jax.grad(functools.partial(scalar, implementation=implementation, through=through), (0, 1, 2, 3))(*arguments)


def assert_close(actual, expected, rtol=1e-6):
    """Relative to the array's largest element: rows that cancel have no digits of their own."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=max(1e-12, rtol * float(np.abs(expected).max())))


@BOTH
@pytest.mark.parametrize("T", [1, 7, 96, 129, 200, 512])
@pytest.mark.parametrize("earlier", [0, 1, 32])
def test_values_agree_with_the_definition(implementation, T, earlier):
    with jax.enable_x64(True):
        arguments = inputs(T, T + earlier, temperatures=(0.01, 10.0))
        out, stats = attention(*arguments, implementation=implementation)
        expected_out, expected_stats = definition(*arguments)
        assert_close(out, expected_out)
        for actual, expected in zip((stats.entropy, stats.logsumexp, stats.max_logit), expected_stats, strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("through", ["out", "entropy", "logsumexp"])
@pytest.mark.parametrize("T, earlier", [(1, 0), (1, 32), (7, 1), (96, 0), (129, 32), (200, 1), (512, 0)])
def test_gradients_of_blockwise_are_those_of_dense(T, earlier, through):
    with jax.enable_x64(True):
        arguments = inputs(T, T + earlier, temperatures=(0.01, 10.0))
        expected = gradients(arguments, "dense", through)
        for actual, reference in zip(gradients(arguments, "blockwise", through), expected, strict=True):
            assert_close(actual, reference)
        if through != "out" and T > 1:
            for gradient in (expected[0], expected[1], expected[3]):  # libraries lose these silently
                assert np.abs(gradient).max() > 1e-3
        if through == "entropy" and T == 1 and not earlier:
            assert all(np.abs(gradient).max() < 1e-12 for gradient in expected)


@BOTH
@pytest.mark.parametrize("through", ["out", "entropy", "logsumexp"])
def test_gradients_agree_with_finite_differences(implementation, through):
    with jax.enable_x64(True):
        arguments = inputs(9, 12, temperatures=(0.5, 2.0))
        function = functools.partial(scalar, implementation=implementation, through=through)
        for argnum, gradient in enumerate(gradients(arguments, implementation, through)):
            direction = jnp.cos(3.0 * jnp.arange(arguments[argnum].size)).reshape(arguments[argnum].shape)

            def moved(step, argnum=argnum, direction=direction):
                return function(*(x + step * direction if i == argnum else x for i, x in enumerate(arguments)))

            difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
            np.testing.assert_allclose(jnp.sum(gradient * direction), difference, rtol=1e-6, atol=1e-7)


@BOTH
def test_logits_up_to_80_and_collapsed_rows_stay_exact(implementation):
    with jax.enable_x64(True):
        q, k, v, t = inputs(129, 130, temperatures=(1.0, 1.0))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / H**0.5
        q = q * 80 / jnp.abs(scores).max()
        out, stats = attention(q, k, v, t, implementation=implementation)
        expected_out, expected_stats = definition(q, k, v, t)
        assert np.abs(expected_stats[2]).max() > 60
        assert_close(out, expected_out)
        assert_close(stats.entropy, expected_stats[0])
        for through in ("out", "entropy", "logsumexp"):
            for a, b in zip(gradients((q, k, v, t), implementation, through), gradients((q, k, v, t), "dense", through)):
                assert_close(a, b)


@BOTH
def test_a_row_with_one_key_has_no_entropy_and_finite_gradients(implementation):
    arguments = inputs(130, 130, scale=50.0, dtype=np.float32, temperatures=(0.01, 1.0))
    _, stats = attention(*arguments, implementation=implementation)
    assert np.all(np.asarray(stats.entropy[..., 0]) == 0)
    for through in ("out", "entropy", "logsumexp"):
        assert all(np.isfinite(gradient).all() for gradient in gradients(arguments, implementation, through))


@BOTH
def test_bfloat16_inputs_have_float32_statistics(implementation):
    q, k, v, t = inputs(129, 129, dtype=np.float32)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    out, stats = attention(q, k, v, t, implementation=implementation)
    assert out.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in stats)
    expected_out, expected_stats = definition(*(np.asarray(x, np.float32) for x in (q, k, v, t)))
    np.testing.assert_allclose(np.asarray(out, np.float32), expected_out, atol=0.03)
    assert_close(stats.entropy, expected_stats[0], rtol=1e-5)
    for actual, reference in zip(gradients((q, k, v, t), implementation, "entropy"), (q, k, v, t), strict=True):
        assert actual.dtype == reference.dtype


@BOTH
def test_the_largest_logit_is_for_watching_only(implementation):
    assert all(np.all(np.asarray(g) == 0) for g in gradients(inputs(7, 7, dtype=np.float32), implementation, "max_logit"))


@BOTH
@hypothesis.given(st.integers(1, 40), st.integers(0, 5), st.floats(0.05, 20.0), st.integers(0, 10**6))
@hypothesis.settings(max_examples=15, deadline=None)
def test_entropy_lies_between_0_and_the_logarithm_of_the_keys_seen(implementation, T, earlier, scale, seed):
    _, stats = attention(*inputs(T, T + earlier, scale, seed, np.float32), implementation=implementation)
    most = np.log(np.arange(T) + 1 + earlier)
    assert np.all(np.asarray(stats.entropy) >= -1e-6) and np.all(np.asarray(stats.entropy) <= most + 2e-6)


@BOTH
@hypothesis.given(st.integers(0, 10**6), st.floats(-30, 30))
@hypothesis.settings(max_examples=10, deadline=None)
def test_a_constant_added_to_a_row_of_logits_changes_nothing_but_the_logsumexp(implementation, seed, constant):
    """The constant enters through a feature in which all keys are 1."""
    with jax.enable_x64(True):
        q, k, v, t = inputs(33, 33, seed=seed)
        k = k.at[..., 0].set(1.0)
        shifted = q.at[..., 0].add(constant * jnp.swapaxes(t, 0, 1)[None] * H**0.5)
        (out, stats), (moved, moved_stats) = (
            attention(x, k, v, t, implementation=implementation) for x in (q, shifted)
        )
        np.testing.assert_allclose(moved, out, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(moved_stats.entropy, stats.entropy, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(moved_stats.logsumexp, stats.logsumexp + constant, rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("T, earlier", [(150, 0), (20, 140)])
def test_no_query_sees_a_later_key(implementation, T, earlier):
    arguments = inputs(T, T + earlier, dtype=np.float32)
    for row in (0, T // 2, T - 1):

        def one_row(k, v, row=row):
            out, stats = attention(arguments[0], k, v, arguments[3], implementation=implementation)
            return jnp.sum(out[:, row]) + jnp.sum(stats.entropy[..., row]) + jnp.sum(stats.logsumexp[..., row])

        for gradient in jax.grad(one_row, (0, 1))(*arguments[1:3]):
            assert np.all(np.asarray(gradient[:, row + earlier + 1 :]) == 0)
            assert np.any(np.asarray(gradient[:, row + earlier]) != 0)


@BOTH
def test_no_temperature_is_a_temperature_of_one(implementation):
    q, k, v, _ = inputs(129, 129, dtype=np.float32)
    plain = attention(q, k, v, implementation=implementation)
    ones = attention(q, k, v, jnp.ones((N, 129)), implementation=implementation)
    jax.tree.map(np.testing.assert_array_equal, plain, ones)


@BOTH
def test_transformations_and_shards_do_not_change_the_numbers(implementation):
    arguments = inputs(130, 130, dtype=np.float32)
    operator = functools.partial(attention, implementation=implementation)
    expected = operator(*arguments)

    def close(actual):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected)

    close(jax.jit(operator)(*arguments))
    close(jax.checkpoint(operator)(*arguments))
    stacked = tuple(x[None] for x in arguments)
    close(jax.tree.map(lambda x: x[0], jax.vmap(operator)(*stacked)))
    close(jax.tree.map(lambda x: x[0], jax.lax.scan(lambda carry, x: (carry, operator(*x)), 0, stacked)[1]))


@BOTH
def test_batch_and_heads_may_be_sharded(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 130, 4, H)), jnp.float32) for _ in range(3))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))

    def loss(q, k, v):
        out, stats = attention(q, k, v, implementation=implementation)
        return jnp.sum(out**2) + jnp.sum(stats.entropy**2)

    expected = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), in_shardings=(sharding,) * 3).lower(q, k, v).compile()
    actual = compiled(*(jax.device_put(x, sharding) for x in (q, k, v)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)
    assert "all-gather" not in compiled.as_text()


def test_blockwise_keeps_no_square_array():
    """Forward + backward at B=8, T=2048, N=12, H=64: temporaries of at most 200 MiB, and no T×T residual."""
    shape = jax.ShapeDtypeStruct((8, 2048, 12, 64), jnp.float32)

    def loss(q, k, v):
        out, stats = attention(q, k, v, implementation="blockwise")
        return jnp.sum(out) + jnp.sum(stats.entropy) + jnp.sum(stats.logsumexp)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 200 * 2**20
    small = jax.ShapeDtypeStruct((1, 256, 2, 8), jnp.float32)
    _, backward = jax.eval_shape(lambda *x: jax.vjp(loss, *x), small, small, small)
    assert all(leaf.size < 256 * 256 for leaf in jax.tree.leaves(backward))


def test_auto_follows_its_rule():
    arguments = inputs(8, 8, dtype=np.float32)
    assert choose(8, 8) == "dense" and choose(2048, 2048) == "blockwise"
    expected = attention(*arguments, implementation="dense")
    jax.tree.map(np.testing.assert_array_equal, attention(*arguments), expected)


@pytest.mark.parametrize("name, named", [("flash", "blockwise"), ("gpu", "dense"), ("tpu", "dense"), ("densse", "dense")])
def test_an_implementation_that_is_not_here_is_an_error_that_says_which_is(name, named):
    with pytest.raises(UserError, match=name) as caught:
        attention(*inputs(4, 4, dtype=np.float32), implementation=name)
    assert named in str(caught.value)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, t = inputs(4, 6, dtype=np.float32)
    for bad in ((k, q, q, None), (q, k, v[:, :5], None), (q, k[..., :4], v[..., :4], None), (q[0], k[0], v[0], None),
                (q, k, v, t[:, :3]), (q, k[:, :, :2], v[:, :, :2], None)):  # fmt: skip
        with pytest.raises(UserError, match=r"\("):
            attention(*bad)
