"""Linear layers, and the matrices that weight norm, spectral norm and σReparam make of their parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_entropy.products import add_bias, product
from jax_entropy.sharding import constrain

_POWER_ITERATIONS_AT_START = 15  # as torch's spectral_norm


class Linear(nn.Module):
    """y = x·W + b; W [*in, *out] may be given by weight or spectral normalisation (Table 5), or by σReparam.

    σReparam (arXiv 2303.06296) is spectral normalisation times a learned scalar.
    """

    out_shape: tuple[int, ...]
    init_std: float
    in_axes: int = 1
    split_inputs: bool = False  # over `tensor`; otherwise outputs are
    use_bias: bool = False
    bias_init: float = 0.0
    reparametrization: str = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch_shape, in_shape = x.shape[: -self.in_axes], x.shape[-self.in_axes :]
        shape = (*in_shape, *self.out_shape)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape, jnp.float32)
        matrix = kernel.reshape(math.prod(in_shape), math.prod(self.out_shape))
        gain = vectors = None
        if self.reparametrization == "weight":
            gain = self.param("gain", lambda _: jnp.linalg.norm(matrix, axis=0).reshape(self.out_shape))
        elif self.reparametrization in ("spectral", "sigma"):
            vectors = self._singular_vectors(matrix)
        if self.reparametrization == "sigma":
            gain = self.param("gamma", nn.initializers.ones, (), jnp.float32)
        matrix = effective_matrix(matrix, gain, vectors)
        # Rows are flattened: with two batch axes XLA's CPU backend computes the kernel's gradient far more slowly.
        matrix = constrain(matrix.astype(self.dtype), *(("tensor", None) if self.split_inputs else (None, "tensor")))
        y = product(x.reshape(-1, matrix.shape[0]), matrix)
        if self.use_bias:  # to flat rows: with heads on an axis of their own, a TPU would copy them there and back
            bias = self.param("bias", nn.initializers.constant(self.bias_init), self.out_shape, jnp.float32)
            y = add_bias(y, bias.reshape(-1))
        return y.astype(self.dtype).reshape(*batch_shape, *self.out_shape)

    def _singular_vectors(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Those of the largest singular value, by a power iteration at each forward pass of training; in `spectral`."""
        frozen = jax.lax.stop_gradient(matrix)

        def iterate(_, vectors):
            right = _unit(vectors[0] @ frozen)
            return _unit(frozen @ right), right

        def start():
            left = _unit(jax.random.normal(self.make_rng("params"), (matrix.shape[0],)))
            return jax.lax.fori_loop(0, _POWER_ITERATIONS_AT_START, iterate, (left, jnp.zeros((matrix.shape[1],))))

        vectors = self.variable("spectral", "singular_vectors", start)
        if self.is_mutable_collection("spectral") and not self.is_initializing():
            vectors.value = iterate(0, vectors.value)
        return vectors.value


def effective_matrix(matrix: Any, gain: Any, vectors: tuple[Any, Any] | None) -> Any:
    """The matrix [in, out] that a reparametrised layer multiplies with; arrays of JAX or of NumPy, None where absent.

    Args:
      matrix: the kernel, [in, out].
      gain: of weight normalisation, one for each output; of σReparam a scalar.
      vectors: of spectral normalisation and σReparam, the left and right singular vector.
    """
    if vectors is not None:
        matrix = matrix / (vectors[0] @ matrix @ vectors[1])
        return matrix if gain is None else matrix * gain
    if gain is not None:
        norm = matrix.__array_namespace__().linalg.norm(matrix, axis=0)
        return matrix * (gain.reshape(-1) / norm)[None]
    return matrix


def _unit(vector: jax.Array) -> jax.Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)
