"""Linear layers and their reparametrisations, values and gradients, beside NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_entropy.linear import Linear, effective_matrix
from tests import reference_model as reference

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
