"""The parts of a block: linear layers and their reparametrisations, temperature, feed-forward, norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_entropy.layers import Attention, Block, Linear, Shared, Stream, effective_matrix, temperature
from jax_entropy.model import Transformer
from jax_entropy.norms import normalise
from jax_entropy.notation import TARGETS
from tests import reference_model as reference
from tests.tiny_model import ARCHITECTURES, initial, random_tokens, scattered, shapes, tiny

WIDTH, HEADS = 12, (3, 4)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def linear_inputs(in_axes):
    """(layer's options, x, cotangent of y, kernel) of a layer from the heads, or to them."""
    out_shape, in_shape = ((WIDTH,), HEADS) if in_axes == 2 else (HEADS, (WIDTH,))
    options = dict(out_shape=out_shape, init_std=0.3, in_axes=in_axes)
    return options, normal(2, 5, *in_shape), normal(2, 5, *out_shape, seed=1), normal(*in_shape, *out_shape, seed=2)


@pytest.mark.parametrize("in_axes", [1, 2])
@pytest.mark.parametrize("use_bias", [False, True])
def test_a_linear_layer_is_a_product_and_a_bias(in_axes, use_bias):
    options, x, _, kernel = linear_inputs(in_axes)
    params = {"kernel": kernel} | ({"bias": normal(*options["out_shape"], seed=3)} if use_bias else {})
    with jax.enable_x64(True):
        layer = Linear(**options, use_bias=use_bias, dtype="float64")
        y = layer.apply({"params": params}, x)
    np.testing.assert_allclose(y, reference.linear(params, None, x, in_axes), rtol=1e-12)


@pytest.mark.parametrize("in_axes", [1, 2])
def test_weight_normalisation_and_its_gradients_are_torchs(in_axes):
    """torch.nn.utils.weight_norm: w = g·v/‖v‖ for each output feature."""
    options, x, dy, v = linear_inputs(in_axes)
    g = normal(*options["out_shape"], seed=3)
    with jax.enable_x64(True):
        layer = Linear(**options, reparametrization="weight", dtype="float64")

        def loss(params):
            return jnp.sum(layer.apply({"params": params}, x) * dy)

        y = layer.apply({"params": {"kernel": v, "gain": g}}, x)
        gradient = jax.jit(jax.grad(loss))({"kernel": v, "gain": g})

    features = int(np.prod(options["out_shape"]))
    v, g = v.reshape(-1, features), g.ravel()
    norm = np.sqrt((v**2).sum(0))
    dw = x.reshape(-1, v.shape[0]).T @ dy.reshape(-1, features)
    np.testing.assert_allclose(y.reshape(-1, features), x.reshape(-1, v.shape[0]) @ (g * v / norm), rtol=1e-10)
    along = (dw * v).sum(0) / norm  # ∂L/∂g = ∂L/∂w · v/‖v‖
    np.testing.assert_allclose(gradient["gain"].ravel(), along, rtol=1e-10)
    dv = g / norm * dw - g * along / norm**2 * v
    np.testing.assert_allclose(gradient["kernel"].reshape(-1, features), dv, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("in_axes", [1, 2])
def test_weight_normalisation_starts_as_the_layer_without_it(in_axes):
    options, x, _, _ = linear_inputs(in_axes)
    x, key = jnp.asarray(x, jnp.float32), jax.random.key(0)
    plain, normed = Linear(**options), Linear(**options, reparametrization="weight")
    before, after = plain.init(key, x), normed.init(key, x)
    np.testing.assert_array_equal(before["params"]["kernel"], after["params"]["kernel"])
    np.testing.assert_array_equal(plain.apply(before, x), normed.apply(after, x))
    assert after["params"]["gain"].shape == options["out_shape"]


def spectral_layer(in_axes=1, **kwargs):
    options, x, dy, _ = linear_inputs(in_axes)
    layer = Linear(**options, reparametrization="spectral", **kwargs)
    return layer, layer.init(jax.random.key(0), jnp.asarray(x, jnp.float32)), x, dy


@pytest.mark.parametrize("in_axes", [1, 2])
def test_spectral_normalisation_converges_to_the_largest_singular_value(in_axes):
    layer, variables, x, _ = spectral_layer(in_axes)
    kernel = np.asarray(variables["params"]["kernel"], np.float64).reshape(12, 12)
    largest = np.linalg.svd(kernel)[1][0]
    apply = jax.jit(lambda variables, x: layer.apply(variables, x, mutable=["spectral"]))
    errors = []
    for _ in range(60):
        y, updated = apply(variables, jnp.asarray(x, jnp.float32))
        variables = {**variables, **updated}
        left, right = variables["spectral"]["singular_vectors"]
        errors.append(abs(left @ kernel @ right / largest - 1))
    assert errors[0] < 0.1 and errors[-1] < 1e-6 and errors[-1] < errors[0]
    expected = x.reshape(-1, 12) @ kernel / largest
    np.testing.assert_allclose(y.reshape(-1, 12), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([np.linalg.norm(left), np.linalg.norm(right)], 1, rtol=1e-6)


def test_each_training_step_is_one_power_iteration():
    layer, variables, x, _ = spectral_layer()
    matrix = np.asarray(variables["params"]["kernel"]).reshape(12, 12)
    left, _ = variables["spectral"]["singular_vectors"]
    _, updated = layer.apply(variables, jnp.asarray(x, jnp.float32), mutable=["spectral"])
    right = matrix.T @ left / np.linalg.norm(matrix.T @ left)
    left = matrix @ right / np.linalg.norm(matrix @ right)
    for vector, expected in zip(updated["spectral"]["singular_vectors"], (left, right), strict=True):
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-6)
    assert "params" not in updated


@pytest.mark.parametrize("mutable", [False, ["spectral"]])
def test_the_gradient_holds_the_singular_vectors_fixed(mutable):
    """∂L/∂W = ∂L/∂Ŵ/σ − ⟨∂L/∂Ŵ, W⟩/σ²·u·vᵀ, as torch.nn.utils.parametrizations.spectral_norm."""
    with jax.enable_x64(True):
        layer, variables, x, dy = spectral_layer(dtype="float64")
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)

        def loss(params):
            result = layer.apply({**variables, "params": params}, x, mutable=mutable)
            y, updated = result if mutable else (result, variables)
            return jnp.sum(y * dy), updated["spectral"]["singular_vectors"]

        (_, vectors), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    u, v = map(np.asarray, vectors)
    matrix = variables["params"]["kernel"].reshape(12, 12)
    dw = x.reshape(-1, 12).T @ dy.reshape(-1, 12)
    sigma = u @ matrix @ v
    expected = dw / sigma - (dw * matrix).sum() / sigma**2 * np.outer(u, v)
    np.testing.assert_allclose(gradient["kernel"].reshape(12, 12), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "weight", "spectral"])
def test_the_effective_matrix_is_the_same_in_numpy(kind):
    """The private export computes it in float64."""
    matrix, gain, *vectors = normal(12, 8), normal(2, 4), normal(12, seed=1), normal(8, seed=2)
    arguments = matrix, gain if kind == "weight" else None, tuple(vectors) if kind == "spectral" else None
    of_numpy = effective_matrix(*arguments)
    assert isinstance(of_numpy, np.ndarray) and of_numpy.dtype == np.float64
    with jax.enable_x64(True):
        np.testing.assert_allclose(effective_matrix(*jax.tree.map(jnp.asarray, arguments)), of_numpy, rtol=1e-12)


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
