"""`python -m jax_entropy` is `jax-entropy`."""

import sys

from jax_entropy.commands.main import main

sys.exit(main())
