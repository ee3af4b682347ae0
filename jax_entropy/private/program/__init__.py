"""The model as it is executed privately: a public blueprint, secret weights, and stages that the engine compiles."""
