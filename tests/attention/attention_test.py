"""The attention operator against its float64 definition: values, every gradient, properties, memory."""

import functools
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_entropy import attention
from jax_entropy.attention import IMPLEMENTATIONS, Implementation, available, choose
from jax_entropy.attention.attention_fn import attention_fn
from jax_entropy.bench.attention import bench_attention
from jax_entropy.bench.cases import CASES, errors
from jax_entropy.errors import UserError

B, N, H = 2, 3, 8
compiled_attention = jax.jit(attention, static_argnames="implementation")
BOTH = pytest.mark.parametrize("implementation", available())


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


def naive(q, k, v, t, window=None, num_slots=0):
    """The definition once more, differentiable: −Σ p log p over the keys seen, no trick."""
    T, S = q.shape[1], k.shape[1]
    s = jnp.einsum("BTNH,BSNH->BNTS", q, k) / (t[None, :, :, None] * q.shape[-1] ** 0.5)
    seen = np.tril(np.ones((T, S), bool), S - T)
    if window:
        seen &= np.triu(np.ones((T, S), bool), S - T - window + 1) | (np.arange(S) < num_slots)
    s = jnp.where(jnp.asarray(seen)[None, None], s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", p, v), entropy, jax.nn.logsumexp(s, axis=-1)


def inputs(T, S, scale=1.0, seed=0, dtype=np.float64, temperatures=(0.1, 10.0)):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, length, N, H)) for length in (T, S, S))
    t = np.exp(rng.uniform(*np.log(temperatures), (N, T)))
    return tuple(jnp.asarray(x, dtype) for x in (q * scale, k, v, t))


@functools.partial(jax.jit, static_argnames=("implementation", "through"))
def scalar(*arguments, implementation, through):
    """A number that depends on one of the operator's outputs, every element with its own weight."""
    out, stats = attention(*arguments, implementation=implementation)
    chosen = {"out": out, "entropy": stats.entropy, "logsumexp": stats.logsumexp, "max_logit": stats.max_logit}[through]
    return jnp.sum(chosen * jnp.cos(jnp.arange(chosen.size, dtype=chosen.dtype).reshape(chosen.shape)))


def gradients(arguments, implementation, through):
    return jax.grad(functools.partial(scalar, implementation=implementation, through=through), (0, 1, 2, 3))(*arguments)


def assert_close(actual, expected, rtol=1e-6):
    """Relative to each element; what cancels to far less than the largest one has no digits of its own."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-12 + 1e-5 * rtol * float(np.abs(expected).max()))


def differentiable(*arguments, implementation):
    out, stats = attention(*arguments, implementation=implementation)
    return out, stats.entropy, stats.logsumexp


def vjp(function, arguments, cotangents):
    """Outputs and the gradients of all arguments in one compilation."""

    def both(arguments, cotangents):
        outputs, backward = jax.vjp(function, *arguments)
        return outputs, backward(cotangents)

    return jax.jit(both)(arguments, cotangents)


@functools.cache
def expected(T, earlier):
    """Arguments, cotangents of out, entropy and logsumexp, and what the definition makes of them."""
    arguments = inputs(T, T + earlier, temperatures=(0.01, 10.0))
    rng = np.random.default_rng(1)
    cotangents = tuple(jnp.asarray(rng.standard_normal(shape)) for shape in ((B, T, N, H), (B, N, T), (B, N, T)))
    return arguments, cotangents, *vjp(naive, arguments, cotangents)


@BOTH
@pytest.mark.parametrize("T", [1, 7, 96, 129, 200, 512])
@pytest.mark.parametrize("earlier", [0, 1, 32])
def test_values_and_gradients_agree_with_the_definition(implementation, T, earlier):
    operator = functools.partial(differentiable, implementation=implementation)
    with jax.enable_x64(True):
        arguments, cotangents, outputs, gradients = expected(T, earlier)
        actual_outputs, actual_gradients = vjp(operator, arguments, cotangents)
        by_rows, (entropy, logsumexp, max_logit) = definition(*arguments)
        for actual, values in zip(actual_outputs, (by_rows, entropy, logsumexp), strict=True):
            assert_close(actual, values)
        assert_close(attention(*arguments, implementation=implementation)[1].max_logit, max_logit)
        for actual, values in zip((*actual_outputs, *actual_gradients), (*outputs, *gradients), strict=True):
            assert actual.dtype == jnp.float64
            assert_close(actual, values)


@BOTH
@pytest.mark.parametrize(
    ("T", "window", "num_slots", "earlier"), [(7, 1, 0, 2), (200, 70, 5, 5), (330, 64, 0, 0), (130, 20, 140, 150)]
)
def test_windows_and_slots_agree_with_the_definition(implementation, T, window, num_slots, earlier):
    """Values and every gradient; with the window known only when it runs, as in a scan over layers."""
    with jax.enable_x64(True):
        arguments, rng = inputs(T, T + earlier, temperatures=(0.1, 10.0)), np.random.default_rng(1)
        cotangents = tuple(jnp.asarray(rng.standard_normal(shape)) for shape in ((B, T, N, H), (B, N, T), (B, N, T)))

        def operator(*arguments):
            out, stats = attention(
                *arguments, window=jax.lax.optimization_barrier(window), num_slots=num_slots,
                implementation=implementation,
            )  # fmt: skip
            return out, stats.entropy, stats.logsumexp

        expected = vjp(functools.partial(naive, window=window, num_slots=num_slots), arguments, cotangents)
        jax.tree.map(assert_close, vjp(operator, arguments, cotangents), expected)


@functools.cache
def by_implementation(name):
    return functools.partial(attention, implementation=name)


@BOTH
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cases_that_all_implementations_share(implementation, case):
    """In float32; the weights of a row sum to 1 in the gradient too, however large its logits are."""
    assert not case.beyond(errors(case, by_implementation(implementation)))


@BOTH
def test_products_that_are_not_exact_have_exact_weights_even_so(implementation):
    """The backward pass computes the logits once more: a row's gradients by the values must sum to 1 all the same."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((3, 1, 200, 2, 32)))

    @jax.jit
    def weights(size):
        out = lambda v: attention(size * q, size * k, v, implementation=implementation)[0].sum()  # noqa: E731
        return jax.grad(out)(v).sum(1)

    for size in (1.0, 1e2, 1e4, 1e6):
        np.testing.assert_allclose(weights(size), 200, rtol=1e-6)


@BOTH
def test_a_position_known_only_later_is_one_known_before(implementation):
    q, k, v, t = inputs(5, 140, dtype=np.float32)
    attend = jax.jit(functools.partial(attention, implementation=implementation))
    for position in (0, 60, 135):
        end = position + 5
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            attend(q, k, v, t, position=jnp.asarray(position)),
            attention(q, k[:, :end], v[:, :end], t, implementation=implementation),
        )


@pytest.mark.parametrize("through", ["entropy", "logsumexp"])
def test_the_statistics_have_gradients_and_both_implementations_the_same(through):
    """Every library attention loses these silently."""
    arguments = inputs(129, 130, dtype=np.float32, temperatures=(0.5, 2.0))
    dense, blockwise = (gradients(arguments, name, through) for name in ("dense", "blockwise"))
    for argnum in (0, 1, 3):
        assert np.abs(dense[argnum]).max() > 1e-2
        np.testing.assert_allclose(blockwise[argnum], dense[argnum], rtol=1e-4, atol=1e-5)
    assert not np.any(blockwise[2]) and not np.any(dense[2])


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
            reference = gradients((q, k, v, t), "dense", through)
            for actual, expected in zip(gradients((q, k, v, t), implementation, through), reference, strict=True):
                assert_close(actual, expected)


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
    rounded = *(x.astype(jnp.bfloat16) for x in (q, k, v)), t
    precise = tuple(x.astype(jnp.float32) for x in rounded)
    rng = np.random.default_rng(1)
    dout, dentropy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (q.shape, (B, N, 129)))
    dout = dout.astype(jnp.bfloat16)
    operator = functools.partial(differentiable, implementation=implementation)
    (out, entropy, logsumexp), actual = vjp(operator, rounded, (dout, dentropy, dentropy))
    _, reference = vjp(naive, precise, (dout.astype(jnp.float32), dentropy, dentropy))
    assert out.dtype == jnp.bfloat16 and entropy.dtype == logsumexp.dtype == jnp.float32
    expected_out, expected_stats = definition(*precise)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected_out, atol=0.03)
    np.testing.assert_allclose(entropy, expected_stats[0], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(logsumexp, expected_stats[1], rtol=1e-5, atol=2e-6)
    for argument, gradient, exact in zip(rounded, actual, reference, strict=True):
        assert gradient.dtype == argument.dtype
        assert np.linalg.norm(np.asarray(gradient, np.float32) - exact) <= 0.01 * np.linalg.norm(exact)


@BOTH
def test_the_largest_logit_is_for_watching_only(implementation):
    for gradient in gradients(inputs(7, 7, dtype=np.float32), implementation, "max_logit"):
        assert np.all(np.asarray(gradient) == 0)


@BOTH
@hypothesis.given(st.sampled_from([1, 2, 40, 130]), st.sampled_from([0, 5]), st.floats(0.05, 50), st.integers(0, 10**6))
@hypothesis.settings(max_examples=30, deadline=None)
def test_entropy_lies_between_0_and_the_logarithm_of_the_keys_seen(implementation, T, earlier, scale, seed):
    _, stats = compiled_attention(*inputs(T, T + earlier, scale, seed, np.float32), implementation=implementation)
    most = np.log(np.arange(T) + 1 + earlier)
    assert np.all(np.asarray(stats.entropy) >= 0) and np.all(np.asarray(stats.entropy) <= most + 2e-6)
    if not earlier:
        assert np.all(np.asarray(stats.entropy[..., 0]) == 0)


@BOTH
@hypothesis.given(st.integers(0, 10**6), st.floats(-30, 30))
@hypothesis.settings(max_examples=30, deadline=None)
def test_a_constant_added_to_a_row_of_logits_changes_nothing_but_the_logsumexp(implementation, seed, constant):
    """The constant enters through a feature in which all keys are 1."""
    with jax.enable_x64(True):
        q, k, v, t = inputs(33, 33, seed=seed)
        k = k.at[..., 0].set(1.0)
        shifted = q.at[..., 0].add(constant * jnp.swapaxes(t, 0, 1)[None] * H**0.5)
        out, stats = compiled_attention(q, k, v, t, implementation=implementation)
        moved, moved_stats = compiled_attention(shifted, k, v, t, implementation=implementation)
        np.testing.assert_allclose(moved, out, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(moved_stats.entropy, stats.entropy, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(moved_stats.logsumexp, stats.logsumexp + constant, rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("T, earlier", [(150, 0), (20, 140)])
def test_no_query_sees_a_later_key(implementation, T, earlier):
    arguments = inputs(T, T + earlier, dtype=np.float32)

    @jax.jit
    def one_row(k, v, row):
        out, stats = attention(arguments[0], k, v, arguments[3], implementation=implementation)
        return jnp.sum(out[:, row]) + jnp.sum(stats.entropy[..., row]) + jnp.sum(stats.logsumexp[..., row])

    for row in (0, T // 2, T - 1):
        for gradient in jax.grad(one_row, (0, 1))(*arguments[1:3], row):
            assert np.all(np.asarray(gradient[:, row + earlier + 1 :]) == 0)
            assert np.any(np.asarray(gradient[:, row + earlier]) != 0)


@BOTH
def test_no_temperature_is_a_temperature_of_one(implementation):
    q, k, v, _ = inputs(129, 129, dtype=np.float32)
    plain = attention(q, k, v, implementation=implementation)
    ones = attention(q, k, v, jnp.ones((N, 129)), implementation=implementation)
    jax.tree.map(np.testing.assert_array_equal, plain, ones)


@BOTH
def test_transformations_do_not_change_values_or_gradients(implementation):
    arguments = inputs(130, 130, dtype=np.float32)

    def loss(*arguments):
        out, stats = attention(*arguments, implementation=implementation)
        return jnp.sum(out**2) + jnp.sum(stats.entropy**2) + jnp.sum(jnp.sin(stats.logsumexp))

    def gradient(loss):
        return jax.value_and_grad(loss, (0, 1, 2, 3))

    def close(actual):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, reference)

    reference = gradient(loss)(*arguments)
    close(jax.jit(gradient(loss))(*arguments))
    close(jax.jit(gradient(jax.checkpoint(loss)))(*arguments))
    two = tuple(jnp.stack([x, 0.5 * x]) for x in arguments)
    close(jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(gradient(loss)))(*two)))
    close(jax.tree.map(lambda x: x[0], jax.lax.map(lambda x: gradient(loss)(*x), two)))

    def scanned(*arguments):
        return jax.lax.scan(lambda carry, x: (carry + jax.checkpoint(loss)(*x), None), 0.0, arguments)[0]

    _, gradients_of_two = jax.jit(gradient(scanned))(*two)
    close((reference[0], jax.tree.map(lambda x: x[0], gradients_of_two)))


@BOTH
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_batch_and_heads_may_be_sharded(implementation, axis_type):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 130, 4, H)), jnp.float32) for _ in range(3))
    arguments = q, k, v, jnp.linspace(0.5, 2.0, 4 * 130).reshape(4, 130)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    specs = *(PartitionSpec("data", None, "tensor"),) * 3, PartitionSpec("tensor")

    def loss(*arguments):
        out, stats = attention(*arguments, implementation=implementation)
        return jnp.sum(out**2) + jnp.sum(stats.entropy**2)

    expected = jax.value_and_grad(loss, (0, 1, 2, 3))(*arguments)
    with jax.set_mesh(mesh):
        arguments = tuple(
            jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)
        )
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(*arguments).compile()
        actual = compiled(*arguments)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b)), actual, expected)
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()


def sizes(jaxpr):
    """How many elements each intermediate array has, inner functions and loops included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("implementation, square", [("dense", True), ("blockwise", False), ("auto", False)])
def test_blockwise_makes_no_square_array(implementation, square):
    """Neither among the residuals nor on the way, forward or backward."""

    def loss(q, k, v):
        out, stats = attention(q, k, v, implementation=implementation)
        return jnp.sum(out) + jnp.sum(stats.entropy) + jnp.sum(stats.logsumexp)

    x = jax.ShapeDtypeStruct((1, 512, 1, 8), jnp.float32)
    residuals = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(loss, *x)[1], x, x, x))
    assert any(leaf.size >= 512 * 512 for leaf in residuals) == square
    assert any(size >= 512 * 512 for size in sizes(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x))) == square


@pytest.mark.parametrize("implementation", ["blockwise", "auto"])
def test_temporaries_of_a_long_context_fit_in_200_mebibytes(implementation):
    x, t = jax.ShapeDtypeStruct((8, 2048, 12, 64), jnp.float32), jax.ShapeDtypeStruct((12, 2048), jnp.float32)

    def loss(*arguments):
        out, stats = attention(*arguments, implementation=implementation)
        return jnp.sum(out**2) + jnp.sum(stats.entropy**2) + jnp.sum(stats.logsumexp)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(x, x, x, t).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 200 * 2**20


def test_the_benchmark_has_a_row_for_each_implementation_and_counts_from_the_first():
    dense, blockwise = bench_attention([(1, 256, 2, 8)], ["float32"], rounds=2)
    assert (dense["implementation"], blockwise["implementation"]) == ("dense", "blockwise")
    assert dense["ratio"] == 1 and blockwise["ratio"] > 0 and dense["forward ms"] > 0
    assert blockwise["temporaries MiB"] < dense["temporaries MiB"]


def test_auto_follows_its_rule():
    arguments = inputs(8, 8, dtype=np.float32)
    q = lambda T, H=64, dtype=jnp.float32: jax.ShapeDtypeStruct((1, T, 2, H), dtype)  # noqa: E731
    assert choose("cpu", "cpu", q(8), 8) == "dense" and choose("cpu", "cpu", q(2048), 2048) == "blockwise"
    for kind, at_end, x, chosen in (
        ("NVIDIA H100 80GB HBM3", True, q(2048, dtype=jnp.bfloat16), "hopper"),
        ("NVIDIA H100 80GB HBM3", True, q(2048), "gpu"),
        ("NVIDIA H100 80GB HBM3", False, q(1, dtype=jnp.bfloat16), "gpu"),
        ("NVIDIA H200", True, q(2048, 48, jnp.bfloat16), "gpu"),
        ("NVIDIA A100-SXM4-80GB", True, q(2048, dtype=jnp.bfloat16), "gpu"),
        ("NVIDIA A100-SXM4-80GB", True, q(2048, 256, jnp.bfloat16), "blockwise"),
    ):
        assert choose("gpu", kind, x, 2048, at_end) == chosen
    for width, chosen in ((64, "hopper"), (128, "gpu")):
        assert choose("gpu", "NVIDIA H200", q(2048, width, jnp.bfloat16), 2048, windowed=True) == chosen
    for x, chosen in ((q(2048), "tpu"), (q(1), "dense"), (q(2048, 256), "blockwise")):
        assert choose("tpu", "TPU v5 lite", x, 2048) == chosen
    expected = attention(*arguments, implementation="dense")
    jax.tree.map(np.testing.assert_array_equal, attention(*arguments), expected)


@pytest.mark.parametrize("name, named", [("flash", "blockwise"), ("dnse", "did you mean 'dense'")])
def test_an_implementation_that_does_not_exist_is_answered_with_those_that_do(name, named):
    with pytest.raises(UserError, match=name) as caught:
        attention(*inputs(4, 4, dtype=np.float32), implementation=name)
    assert named in str(caught.value)


def test_a_kernel_for_another_card_says_for_which(monkeypatch):
    operator = sys.modules["jax_entropy.attention"]  # the name is the function's
    monkeypatch.setattr(operator, "platform", lambda: "gpu")
    monkeypatch.setattr(operator, "device_kind", lambda: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(
        UserError, match=r"'hopper' runs on NVIDIA H100 .*, and this is NVIDIA A100.*; here work 'auto', .*'gpu'"
    ):
        attention(*inputs(4, 4, dtype=np.float32), implementation="hopper")


def test_an_implementation_for_another_device_is_an_error_that_says_which_work_here(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "kernel", Implementation("kernel", ("gpu", "tpu")))
    with pytest.raises(UserError) as caught:
        attention(*inputs(4, 4, dtype=np.float32), implementation="kernel")
    message = "attention 'kernel' runs on gpu and tpu, and this is cpu; here work 'auto', 'dense', 'blockwise'"
    assert str(caught.value) == message


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, t = inputs(4, 6, dtype=np.float32)
    for bad in ((k, q, q, None), (q, k, v[:, :5], None), (q, k[..., :4], v[..., :4], None), (q[0], k[0], v[0], None),
                (q, k, v, t[:, :3]), (q, k[:, :, :2], v[:, :, :2], None)):  # fmt: skip
        with pytest.raises(UserError, match=r"[\[(]"):
            attention(*bad)
    for position in (-1, 3):
        with pytest.raises(UserError, match=f"position={position} must lie between 0 and S − T = 2"):
            attention(q, k, v, t, position=position)
    for window in (0, -3):
        with pytest.raises(UserError, match=f"window={window} must be at least 1"):
            attention(q, k, v, t, window=window)
    with pytest.raises(UserError, match="num_slots=3 must lie between 0 and S − T = 2"):
        attention(q, k, v, t, window=2, num_slots=3)
    with pytest.raises(UserError, match=r"num_slots=int32\[\] must be a whole number"):
        attention(q, k, v, t, window=2, num_slots=jnp.int32(1))


def _masked(q, k, v):
    return attention_fn(q, k, v, mask=jnp.ones((q.shape[1], k.shape[1]), bool))


@pytest.mark.parametrize(
    "attend",
    [*(functools.partial(attention, implementation=name) for name in ("dense", "blockwise")), _masked],
    ids=["dense", "blockwise", "attention_fn"],
)
def test_an_accelerator_rounds_no_operand_of_a_float32_product(attend):
    """By itself XLA multiplies float32 with ten bits on a GPU; here both passes."""
    q, k, v, _ = inputs(4, 6, dtype=np.float32)
    gradients = jax.jit(jax.grad(lambda *qkv: jnp.sum(jax.tree.leaves(attend(*qkv))[0]), (0, 1, 2)))
    products = [line for line in gradients.lower(q, k, v).as_text().splitlines() if "dot_general" in line]
    assert len(products) >= 5 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)
