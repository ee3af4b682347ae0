"""What private execution costs: the census of a model's operations, and what is built on it."""
