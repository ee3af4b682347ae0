"""Training a run: the loop, the guard, the clock and the writer of its metrics."""
