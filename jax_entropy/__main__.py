"""`python -m jax_entropy` is `jax-entropy`."""

import sys

from jax_entropy.cli import main

sys.exit(main())
