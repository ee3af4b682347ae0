"""Entropy, penalty and bands against the published code's numbers, against NumPy in float64, and at their edges."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_entropy.entropy import (
    entropy_penalty,
    head_bands,
    head_entropy,
    max_entropy,
    row_entropy,
)
from jax_entropy.errors import UserError
from tests import GOLDEN
from tests.tiny_model import assert_gradients

SOME_NATS = st.one_of(st.just(0.0), st.floats(2**-20, 6, width=32))
REDUCTIONS, SHAPES = ("row_sum", "row_mean", "head_mean"), ("deadzone", "hinge")


def random_rows(*shape, seed=0):
    """Causal attention weights [..., T, T] in float64."""
    scores = np.random.default_rng(seed).normal(0, 2, shape)
    weights = np.tril(np.exp(scores))
    return weights / weights.sum(-1, keepdims=True)


def entropy_by_hand(weights):
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return -(weights * logs).sum(-1)


def penalty_by_hand(entropy_LxBxNxT, threshold_LxN, tolerance, reduction, shape, maximum_LxT=None):
    """Algorithm 1 of the paper, loop by loop, and the two readings of its code."""
    L, B, N, T = entropy_LxBxNxT.shape
    if maximum_LxT is None:
        maximum_LxT = np.full((L, T), math.log(T))

    def penalty(deviation, maximum):
        excess = abs(deviation) - tolerance * maximum
        if shape == "hinge":
            return max(excess, 0) ** 2
        return deviation**2 if excess > 0 else 0

    layers = []
    for layer in range(L):
        heads = []
        for head in range(N):
            rows = entropy_LxBxNxT[layer, :, head].ravel()
            maxima, threshold = np.tile(maximum_LxT[layer], B), threshold_LxN[layer, head]
            if reduction == "head_mean":
                heads.append(penalty(rows.mean() - threshold * maxima.mean(), maxima.mean()))
            else:
                total = sum(penalty(row - threshold * m, m) for row, m in zip(rows, maxima, strict=True))
                heads.append(total if reduction == "row_sum" else total / rows.size)
        layers.append(sum(heads) / N)
    return sum(layers) / L


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_penalty_of_rows_that_see_more_or_less_has_their_own_maximum(reduction, shape):
    """Divided by its row's maximum an entropy pays what it would pay under a maximum of 1."""
    rng, T = np.random.default_rng(0), 8
    maximum_LxT = np.log(rng.integers(2, 20, (2, T)))
    relative, threshold_LxN = rng.uniform(0, 1, (2, 3, 4, T)), rng.uniform(0.2, 0.6, (2, 4))
    entropy = relative * maximum_LxT[:, None, None]
    found = entropy_penalty(
        entropy, threshold_LxN, tolerance=0.1, reduction=reduction, shape=shape, maximum_LxT=maximum_LxT
    )
    head = maximum_LxT.mean(1)[:, None]
    if reduction == "head_mean":
        deviation, scale = entropy.mean((1, 3)) / head - threshold_LxN, head
    else:
        deviation, scale = relative - threshold_LxN[:, None, :, None], maximum_LxT[:, None, None]
    excess = np.abs(deviation) - 0.1
    paid = np.where(excess > 0, deviation if shape == "deadzone" else excess, 0) * scale
    expected = (paid**2).mean((0, 2)).sum() if reduction == "row_sum" else (paid**2).mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture(params=["reg_small", "reg_margin0", "reg_wide"])
def golden(request):
    return dict(np.load(GOLDEN / f"{request.param}.npz"))


def golden_loss(attentions, threshold_LxN, golden):
    penalty = entropy_penalty(
        row_entropy(attentions), threshold_LxN, tolerance=float(golden["tolerance_margin_factor"]), reduction="row_sum"
    )
    return float(golden["loss_coeff"]) * penalty


@pytest.mark.parametrize("x64", [False, True])
def test_the_published_regulariser(golden, x64):
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        attentions = golden["attentions"].astype(dtype)
        threshold_LxN = np.tile(golden["thresholds"].astype(dtype), (attentions.shape[0], 1))
        entropy = jax.jit(row_entropy)(attentions)
        assert entropy.dtype == dtype
        np.testing.assert_allclose(entropy, golden["entropy"], rtol=1e-4, atol=1e-5)
        loss_and_gradients = jax.jit(jax.value_and_grad(lambda *args: golden_loss(*args, golden), (0, 1)))
        loss, (d_attentions, d_threshold) = loss_and_gradients(attentions, threshold_LxN)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-4)
    np.testing.assert_allclose(np.sum(np.asarray(d_threshold), 0), golden["grad_thresholds"], rtol=1e-3, atol=1e-9)
    positive = attentions > 0
    scale = np.abs(golden["grad_attentions"]).max()
    np.testing.assert_allclose(
        d_attentions[positive], golden["grad_attentions"][positive], rtol=1e-3, atol=1e-5 * scale
    )
    assert np.all(np.isfinite(d_attentions))
    assert np.abs(d_threshold).max() > 0


def test_row_entropy_in_float64():
    weights = random_rows(3, 16, 16)
    with jax.enable_x64(True):
        entropy = row_entropy(weights)
        np.testing.assert_allclose(entropy, entropy_by_hand(weights), rtol=1e-14, atol=1e-15)
        assert_gradients(lambda w: row_entropy(w).sum(), np.array([0.35, 0.15, 0.3, 0.2]))
        gradient = jax.jit(jax.grad(lambda w: row_entropy(w).sum()))(weights)
        expected = np.where(weights > 0, -np.log(np.where(weights > 0, weights, 1)) - 1, 0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 128])
def test_one_hot_rows_have_no_entropy_and_uniform_rows_the_most(size):
    one_hot, uniform = jnp.eye(size), jnp.full((size,), 1 / size)
    assert np.all(np.asarray(row_entropy(one_hot)) == 0)
    np.testing.assert_allclose(row_entropy(uniform), math.log(size), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_gradient_is_finite_where_a_weight_is_zero(dtype):
    gradient = jax.grad(lambda w: row_entropy(w).sum())(jnp.asarray([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], dtype))
    expected = [[0, -1, 0], [math.log(2) - 1, math.log(2) - 1, 0]]
    np.testing.assert_allclose(gradient.astype(np.float32), expected, rtol=1e-2)


def test_a_row_that_is_not_a_number_is_not_hidden():
    weights = jnp.asarray([[0.5, 0.5], [math.nan, math.nan], [1.0, 0.0], [0.0, math.nan]])
    np.testing.assert_array_equal(np.isnan(row_entropy(weights)), [False, True, False, True])


def test_statistics_are_at_least_float32():
    assert row_entropy(jnp.ones((2, 2), jnp.bfloat16)).dtype == jnp.float32
    assert head_entropy(jnp.ones((1, 2, 2), jnp.bfloat16)).dtype == jnp.float32
    penalty = entropy_penalty(jnp.ones((1, 1, 2, 8), jnp.bfloat16), jnp.ones((1, 2)), tolerance=0.1)
    assert penalty.dtype == jnp.float32


@jax.jit
def softmax_entropies(scores):
    weights = jax.nn.softmax(scores)
    return row_entropy(weights), jax.nn.logsumexp(scores, axis=-1) - jnp.sum(weights * scores, axis=-1)


@settings(deadline=None)
@given(hnp.arrays(np.float32, (4, 8), elements=st.floats(-80, 80, width=32)))
def test_entropy_lies_between_zero_and_its_maximum_and_obeys_equation_10(scores):
    entropy, through_logits = map(np.asarray, softmax_entropies(scores))
    assert np.all(entropy >= -1e-6) and np.all(entropy <= math.log(8) + 1e-5)
    np.testing.assert_allclose(entropy, through_logits, atol=1e-4)


def test_head_entropy_is_the_mean_over_batch_and_rows():
    entropy = np.random.default_rng(0).random((3, 4, 2, 5), np.float32)
    np.testing.assert_allclose(head_entropy(entropy), entropy.astype(np.float64).mean((1, 3)), rtol=1e-6)
    np.testing.assert_allclose(head_entropy(entropy[0]), entropy[0].mean((0, 2)), rtol=1e-6)


@pytest.mark.parametrize(("T", "causal", "share"), [(128, 3.878, 0.799), (256, 4.560, 0.822), (512, 5.246, 0.841)])
def test_reference_maxima(T, causal, share):
    assert max_entropy(T) == math.log(T)
    assert max_entropy(T, "causal") == pytest.approx(np.log(np.arange(1, T + 1)).mean(), rel=1e-12)
    assert max_entropy(T, "causal") == pytest.approx(causal, abs=5e-4)
    assert max_entropy(T, "causal") / max_entropy(T) == pytest.approx(share, abs=5e-4)


def test_the_causal_maximum_is_reached_by_uniform_attention():
    weights = np.tril(np.ones((1, 1, 32, 32))) / np.arange(1, 33)[:, None]
    np.testing.assert_allclose(head_entropy(row_entropy(weights)), max_entropy(32, "causal"), rtol=1e-6)


def test_maxima_of_one_token_are_zero():
    assert max_entropy(1) == max_entropy(1, "causal") == 0


@pytest.mark.parametrize(
    ("T", "S", "window"), [(1, 1, None), (1, 9, None), (5, 8, None), (64, 64, 80), (64, 64, 16), (9, 12, 1)]
)
def test_rows_with_earlier_keys_or_a_window_reach_the_mean_logarithm_of_the_keys_they_see(T, S, window):
    """Uniform weights over what each row sees have that entropy."""
    visible = np.tril(np.ones((T, S)), S - T)
    visible[:, S - T :] -= np.tril(np.ones((T, T)), -(window or T))
    rows = row_entropy(visible / visible.sum(-1, keepdims=True))
    found = (max_entropy(T, kind, num_keys=S, window=window) for kind in ("context", "causal"))
    assert [*found] == pytest.approx([float(rows.max()), float(rows.mean())], rel=1e-6, abs=1e-7)


def test_fewer_keys_than_rows_are_refused():
    with pytest.raises(UserError, match="num_keys=7 must be at least 8"):
        max_entropy(8, num_keys=7)


@pytest.mark.parametrize("T", [0, -1])
def test_a_context_without_tokens_has_no_maximum(T):
    with pytest.raises(UserError, match=f"context_length={T} must be at least 1"):
        max_entropy(T)


def test_an_unknown_maximum_is_named():
    with pytest.raises(UserError, match="kind='casual' .* did you mean 'causal'"):
        max_entropy(8, "casual")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_penalty_is_algorithm_1(reduction, shape):
    rng = np.random.default_rng(1)
    entropy, threshold = rng.uniform(0, math.log(16), (3, 2, 4, 16)), rng.uniform(0.1, 0.9, (3, 4))
    with jax.enable_x64(True):
        for tolerance in (0.0, 0.1, 0.25):
            penalty = entropy_penalty(entropy, threshold, tolerance=tolerance, reduction=reduction, shape=shape)
            expected = penalty_by_hand(entropy, threshold, tolerance, reduction, shape)
            np.testing.assert_allclose(penalty, expected, rtol=1e-12)
            assert expected > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_penaltys_gradients_match_finite_differences(reduction, shape):
    rng = np.random.default_rng(2)
    entropy, threshold = rng.uniform(0, math.log(8), (2, 2, 2, 8)), rng.uniform(0.1, 0.9, (2, 2))

    def penalty(entropy, threshold):
        return entropy_penalty(entropy, threshold, tolerance=0.05, reduction=reduction, shape=shape)

    with jax.enable_x64(True):
        assert_gradients(penalty, entropy, threshold)


def test_the_sum_is_the_mean_times_batch_and_rows():
    rng = np.random.default_rng(3)
    entropy, threshold = rng.uniform(0, 3, (2, 5, 3, 16)).astype(np.float32), np.full((2, 3), 0.4, np.float32)
    total, mean = (
        entropy_penalty(entropy, threshold, tolerance=0.1, reduction=reduction) for reduction in ("row_sum", "row_mean")
    )
    np.testing.assert_allclose(total, mean * 5 * 16, rtol=1e-6)


def test_head_mean_forgives_rows_that_average_out():
    maximum = math.log(4)
    entropy = jnp.asarray([0.0, 1.0, 0.0, 1.0]).reshape(1, 1, 1, 4) * maximum
    threshold = jnp.full((1, 1), 0.5)
    assert entropy_penalty(entropy, threshold, tolerance=0.2, reduction="head_mean") == 0
    np.testing.assert_allclose(
        entropy_penalty(entropy, threshold, tolerance=0.2, reduction="row_mean"), (0.5 * maximum) ** 2, rtol=1e-6
    )


@functools.partial(jax.jit, static_argnums=1)
def one_row(deviation, shape):
    """Penalty of rows whose deviation from θ·E_max is `deviation`, at γ·E_max = 0.25·log 16."""
    entropy = jnp.full((1, 1, 1, 16), 0.5 * math.log(16)) + deviation
    return entropy_penalty(entropy, jnp.full((1, 1), 0.5), tolerance=0.25, reduction="row_mean", shape=shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_deviation_of_exactly_the_tolerance_is_free(shape, threshold):
    maximum = np.float32(math.log(16))
    edge = np.full((1, 1, 1, 16), np.float32(0.25) * maximum)
    free = entropy_penalty(edge, jnp.full((1, 1), threshold), tolerance=0.25, reduction="row_mean", shape=shape)
    assert free == 0
    beyond = np.nextafter(edge, np.float32(threshold == 0) * np.float32(9))
    penalty = entropy_penalty(beyond, jnp.full((1, 1), threshold), tolerance=0.25, reduction="row_mean", shape=shape)
    assert penalty > 0
    if shape == "deadzone":
        np.testing.assert_allclose(penalty, (0.25 * maximum) ** 2, rtol=1e-5)


def test_the_hinge_is_continuous_where_the_dead_zone_jumps():
    edge, step = 0.25 * math.log(16), 1e-3
    for sign in (-1, 1):
        assert one_row(sign * (edge - step), "deadzone") == one_row(sign * (edge - step), "hinge") == 0
        assert one_row(sign * (edge + step), "deadzone") == pytest.approx((edge + step) ** 2, rel=1e-4)
        assert one_row(sign * (edge + step), "hinge") == pytest.approx(step**2, rel=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_entropy_that_is_not_a_number_is_not_free(reduction, shape):
    entropy = jnp.ones((1, 1, 2, 4)).at[0, 0, 1, 2].set(math.nan)
    assert jnp.isnan(entropy_penalty(entropy, jnp.full((1, 2), 0.5), tolerance=0.2, reduction=reduction, shape=shape))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_row_pays_for_a_context_of_one_token(reduction):
    entropy, threshold = jnp.zeros((2, 3, 2, 1)), jnp.full((2, 2), 0.5)
    assert entropy_penalty(entropy, threshold, tolerance=0.0, reduction=reduction) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reduction="rowsum"), "reduction='rowsum' is not known; did you mean 'row_sum'"),
        (dict(shape="dead_zone"), "shape='dead_zone' is not known; did you mean 'deadzone'"),
    ],
)
def test_an_unknown_option_of_the_penalty_is_named(options, message):
    with pytest.raises(UserError, match=message):
        entropy_penalty(jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1)), tolerance=0.1, **options)


def test_bands_are_half_open_but_for_the_last():
    entropy = jnp.asarray([[0.0, 0.999, 1.0, 1.999], [2.0, 2.999, 3.0, 4.0]])
    np.testing.assert_array_equal(head_bands(entropy), [0.25, 0.25, 0.25, 0.25])
    np.testing.assert_array_equal(head_bands(entropy, 4.0), [0.25, 0.25, 0.25, 0.25])
    np.testing.assert_array_equal(head_bands(entropy, 2.0), [1 / 8, 1 / 8, 1 / 8, 5 / 8])
    np.testing.assert_array_equal(head_bands(entropy, 8.0), [4 / 8, 3 / 8, 1 / 8, 0])


def test_bands_of_the_papers_softmax_only_model():
    counts = (47, 14, 18, 65)  # of 144 heads, as its heat-map (Fig. 3) reads
    heads = np.concatenate([np.linspace(low, low + 0.99, n) for low, n in enumerate(counts)]).reshape(12, 12)
    assert [round(100 * float(share), 1) for share in head_bands(heads / heads.max() * 4.2)] == [32.6, 9.7, 12.5, 45.1]


@settings(deadline=None)
@given(hnp.arrays(np.float32, (3, 4), elements=SOME_NATS), st.sampled_from([None, 4.0, 6.0]))
def test_bands_count_every_head_once(entropy, maximum):
    shares = np.asarray(head_bands(entropy, maximum))
    top = np.float32(maximum or entropy.max())
    edges = [top * q / 4 if top > 0 else np.inf for q in (1, 2, 3)]
    expected = np.bincount(np.digitize(entropy.ravel(), edges), minlength=4) / entropy.size
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    assert abs(shares.sum() - 1) < 1e-6


def test_heads_that_are_not_numbers_are_in_no_band():
    shares = head_bands(jnp.asarray([[0.1, math.nan], [4.0, 4.0]]))
    np.testing.assert_array_equal(shares, [0.25, 0, 0, 0.5])
    np.testing.assert_array_equal(head_bands(jnp.full((2, 2), math.nan)), [0, 0, 0, 0])


@pytest.mark.parametrize("entropy", [0.0, -1e-7])
def test_heads_without_any_entropy_are_collapsed_not_overloaded(entropy):
    np.testing.assert_array_equal(head_bands(jnp.full((2, 2), entropy)), [1, 0, 0, 0])
    np.testing.assert_array_equal(head_bands(jnp.full((2, 2), entropy), 4.0), [1, 0, 0, 0])
