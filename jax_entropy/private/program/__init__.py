"""The model as it is executed privately: weights, stages, and their compiled form."""
