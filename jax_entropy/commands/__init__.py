"""The command line: the only place that knows flags, and that prints."""

INTERRUPTED = "jax-entropy: interrupted; the same command starts again"
