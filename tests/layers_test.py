"""The parts of a block: reparametrised layers, temperature, feed-forward, norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_entropy.layers import Attention, Block, Shared, Stream, temperature
from jax_entropy.model import Transformer
from jax_entropy.norms import normalise
from jax_entropy.notation import TARGETS
from tests import reference_model as reference
from tests.tiny_model import ARCHITECTURES, initial, random_tokens, scattered, shapes, tiny


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_evaluation_neither_updates_nor_needs_to_update_the_singular_vectors():
    config = tiny("SM+SNorm(QKVO+FFN)")
    variables, tokens = scattered(config), random_tokens(2, 8)
    model = Transformer(config)
    evaluate = jax.jit(model.apply)
    first, again = evaluate(variables, tokens)[0], evaluate(variables, tokens)[0]
    np.testing.assert_array_equal(first, again)
    (trained, _), updated = jax.jit(lambda v, t: model.apply(v, t, mutable=["spectral"]))(variables, tokens)
    assert not np.allclose(trained, first, rtol=1e-3)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), variables["spectral"], updated["spectral"])
    assert all(jax.tree.leaves(changed))


PROJECTIONS = {"QK": {"query", "key"}, "QKV": {"query", "key", "value"}, "QKVO": {"query", "key", "value", "out"}}


def touched(target, ffn):
    return set().union(*(ffn if part == "FFN" else PROJECTIONS[part] for part in target.split("+")))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("suffix", "ffn"), [("", {"up", "down"}), ("+ScFFN", {"up", "down"}), ("+ScFuFFN", {"fused"})])
def test_a_reparametrisation_touches_the_projections_it_names(target, suffix, ffn):
    weight = flatten_dict(shapes(tiny(f"SM+WNorm({target}){suffix}")))
    assert {path[-2] for path in weight if path[-1] == "gain"} == touched(target, ffn)
    spectral = flatten_dict(shapes(tiny(f"SM+SNorm({target}){suffix}"))["spectral"])
    assert {path[-2] for path in spectral} == touched(target, ffn)
    assert not {path for path in flatten_dict(shapes(tiny("SM" + suffix))) if path[-1] == "gain"}


@pytest.mark.parametrize(
    ("bias", "biased"),
    [("none", set()), ("qk", {"query", "key"}), ("all", {"query", "key", "value", "out", "up", "down"})],
)
def test_biases(bias, biased):
    paths = flatten_dict(shapes(tiny("SM+LN+G", bias=bias))["params"])
    assert {path[-2] for path in paths if path[-1] == "bias" and "norm" not in path[-2]} == biased
    paths = flatten_dict(shapes(tiny("SM+ScFuFFN", bias=bias))["params"])
    fused = {"fused"} if bias == "all" else set()
    assert {path[-2] for path in paths if path[-1] == "bias"} - {"final_norm"} == biased - {"up", "down"} | fused


def test_a_block_without_feed_forward_has_no_parameters_of_one():
    for name in ARCHITECTURES:
        config = tiny(name)
        params, without = shapes(config)["params"], config.ffn_free_layers
        stacks = {"blocks": 2 - without, "blocks_without_ffn": without}
        lengths = {stack: length for stack, length in stacks.items() if length}
        assert {stack for stack in params if stack.startswith("blocks")} == set(lengths), name
        norms = {"norm1", "norm2"} if config.norm != "none" else set()
        scales = {"alpha", "beta"} if config.scaled else set()
        expected = {
            "blocks": {"attention", "ffn"} | norms | scales,
            "blocks_without_ffn": {"attention"} | norms - {"norm2"},
        }
        for stack, length in lengths.items():
            assert {leaf.shape[0] for leaf in jax.tree.leaves(params[stack])} == {length}, name
            assert set(params[stack]) == expected[stack], name
            assert ("threshold" in params[stack]["attention"]) == config.entropy_regularizer, name
            assert ("temperature" in params[stack]["attention"]) == config.learnable_temperature, name


@pytest.mark.parametrize(
    ("slope", "expected"),
    [("0.3", {}), ("layer", {"blocks/ffn/negative_slope": (3,)}), ("global", {"negative_slope": ()})],
)
def test_learned_slopes_are_one_for_each_feed_forward_or_one_in_all(slope, expected):
    config = tiny(f"SM+LR({slope})^1", num_layers=4, **({} if slope == "0.3" else {"negative_slope": 0.3}))
    params = flatten_dict(initial(config)["params"], sep="/")
    slopes = {path: leaf for path, leaf in params.items() if "slope" in path}
    assert {path: leaf.shape for path, leaf in slopes.items()} == expected
    assert all(np.all(leaf == np.float32(0.3)) for leaf in slopes.values())


def test_initial_values():
    config = tiny(
        "EReg(SM(t)+LN+R+WNorm(QK)+ScFFN)", model_dim=128, temperature_init=0.07, threshold_init=0.4, alpha_init=2.0,
        beta_init=0.5, init_std=0.03, residual_init_std=0.01,
    )  # fmt: skip
    params = flatten_dict(initial(config)["params"], sep="/")
    deviation = {path: float(jnp.std(leaf)) for path, leaf in params.items()}
    for path, std in deviation.items():
        if path.endswith("kernel") or path.endswith("embedding"):
            residual = "/out/" in path or "/down/" in path
            assert std == pytest.approx(0.01 if residual else 0.03, rel=0.05), path
    constants = {"temperature": 0.07, "threshold": 0.4, "alpha": 2.0, "beta": 0.5, "scale": 1.0, "bias": 0.0}
    for path, leaf in params.items():
        if (name := path.split("/")[-1]) in constants:
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, constants[name], np.float32), err_msg=path)
    assert not np.array_equal(params["blocks/attention/query/kernel"][0], params["blocks/attention/query/kernel"][1])
    assert not np.array_equal(params["blocks/attention/query/kernel"], params["blocks/attention/key/kernel"])


@pytest.mark.parametrize("name", ["SM+ScFFN", "SM+ScFuFFN", "SM+LN+R+ScFFN"])
def test_the_scaled_feed_forward_is_equation_8(name):
    config = tiny(name)
    params = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), scattered(config)["params"]["blocks"])
    x = normal(2, 8, 16)
    (output, _), _ = jax.jit(lambda params, x: Block(config, True).apply({"params": params}, Stream(x), 0, Shared()))(
        *jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, x))
    )
    attended, _ = reference.attend(
        config, params["attention"], {}, reference.normalise(config, config.norm, params.get("norm1"), x), {}
    )
    residual = x + attended
    normed = reference.normalise(config, config.norm, params.get("norm2"), residual)
    if config.ffn == "fused":
        ffn = normed @ params["ffn"]["fused"]["kernel"]
    else:
        hidden = normed @ params["ffn"]["up"]["kernel"]
        ffn = (np.maximum(hidden, 0) if config.activation == "relu" else hidden) @ params["ffn"]["down"]["kernel"]
    expected = params["beta"] * residual + ffn / params["alpha"]
    assert abs(params["alpha"] - 1) > 1e-2 and abs(params["beta"] - 1) > 1e-2
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnums=1)
def temperature_of(parameter, kind):
    return temperature(parameter, tiny("SM(t)", temperature_parameter=kind))


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4))
def test_a_direct_temperature_is_positive_and_nearly_its_parameter(parameter):
    t = np.asarray(temperature_of(jnp.asarray(parameter, jnp.float32), "direct"))
    assert np.all(t >= 0.99e-4)
    large = np.abs(parameter) >= 0.01
    np.testing.assert_allclose(t[large], np.abs(np.float32(parameter))[large], rtol=1e-4)


@settings(deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4))
def test_a_logarithmic_temperature_is_the_exponential_of_its_parameter(parameter):
    t = temperature_of(jnp.asarray(parameter, jnp.float32), "log")
    assert np.all(t > 0)
    np.testing.assert_allclose(t, np.exp(np.float64(parameter)), rtol=1e-5)


@pytest.mark.parametrize("kind", ["direct", "log"])
def test_the_temperatures_gradient_is_finite_everywhere(kind):
    parameter = jnp.asarray([-1.0, -1e-5, 0.0, 1e-5, 0.01, 1.0])
    gradient = jax.jit(jax.grad(lambda p: temperature(p, tiny("SM(t)", temperature_parameter=kind)).sum()))(parameter)
    assert np.all(np.isfinite(gradient))
    expected = np.exp(parameter) if kind == "log" else np.asarray(parameter) / np.sqrt(np.square(parameter) + 1e-8)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["direct", "log"])
def test_the_initial_temperature_is_the_configs(kind):
    config = tiny("SM(t)", temperature_parameter=kind, temperature_init=0.03)
    parameter = initial(config)["params"]["blocks"]["attention"]["temperature"]
    assert parameter.shape == (2, 2, 16)
    np.testing.assert_allclose(temperature(parameter, config), 0.03, rtol=1e-4)


@pytest.mark.parametrize("parameter", ["direct", "log"])
def test_a_temperature_acts_on_its_head_and_query_position_alone(parameter):
    config = tiny("SM(t)", temperature_parameter=parameter)
    x = jnp.asarray(normal(2, 8, 16), jnp.float32)
    attention = Attention(config)
    variables = jax.tree.map(lambda leaf: leaf[0], scattered(config)["params"]["blocks"]["attention"])

    @jax.jit
    def entropy(temperatures):
        return attention.apply({"params": variables | {"temperature": temperatures}}, x, Stream(x), 0, Shared())[
            2
        ].stats.entropy

    before, head, position = variables["temperature"], 1, 5
    after = before.at[head, position].add(0.3)
    moved = np.any(np.asarray(entropy(before)) != np.asarray(entropy(after)), axis=0)
    expected = np.zeros((2, 8), bool)
    expected[head, position] = True
    np.testing.assert_array_equal(moved, expected)


def test_a_higher_temperature_diffuses():
    config = tiny("SM(t)")
    x, attention = jnp.asarray(normal(2, 16, 16), jnp.float32), Attention(config)
    variables = jax.tree.map(lambda leaf: leaf[0], scattered(config)["params"]["blocks"]["attention"])

    @jax.jit
    def mean_entropy(t):
        params = variables | {"temperature": jnp.full((2, 16), t)}
        return attention.apply({"params": params}, x, Stream(x), 0, Shared())[2].stats.entropy.mean()

    entropies = [float(mean_entropy(t)) for t in (0.02, 0.2, 1.0, 5.0, 1e3)]
    assert entropies == sorted(entropies)
    assert entropies[0] < 0.5
    assert entropies[-1] == pytest.approx(np.log(np.arange(1, 17)).mean(), rel=1e-4)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (3, 1), (0, 1e-3), (0, 1e4), (300, 1)])
def test_norms(kind, offset, scale):
    config, x = tiny("SM+LN+G"), (offset + scale * normal(4, 5, 64)).astype(np.float32)
    layer = normalise(kind, config, "norm")
    params = {"scale": normal(64, seed=1)} | ({"bias": normal(64, seed=2)} if kind == "layer" else {})
    y = layer.apply({"params": jax.tree.map(lambda leaf: leaf.astype(np.float32), params)}, x)
    np.testing.assert_allclose(y, reference.normalise(config, kind, params, x.astype(np.float64)), rtol=1e-4, atol=2e-4)


def test_norms_of_bfloat16_have_float32_statistics():
    config, x = tiny("SM+LN+G", dtype="bfloat16"), (8 + normal(4, 64)).astype(jnp.bfloat16)
    layer, params = normalise("layer", config, "norm"), {"scale": np.ones(64), "bias": np.zeros(64)}
    y = layer.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float64), reference.normalise(config, "layer", params, x.astype(np.float64)), atol=2e-2
    )
