"""Seeds are whole numbers of 64 bits, and all of them count."""

import numbers

import jax

from jax_entropy.errors import UserError
from jax_entropy.fields import SEED


def check_seed(seed: int) -> None:
    """Checks that a number is a seed.

    Raises:
      UserError: it is none.
    """
    if not isinstance(seed, numbers.Integral) or not SEED.holds(seed):
        raise UserError(f"seed={seed!r} {SEED.words}")


def random_key(seed: int) -> jax.Array:
    """JAX's key of a seed; it reads 32 bits, so that larger seeds have their upper half folded in."""
    check_seed(seed)
    upper, lower = divmod(seed, 2**32)
    key = jax.random.key(lower)
    return jax.random.fold_in(key, upper) if upper else key
