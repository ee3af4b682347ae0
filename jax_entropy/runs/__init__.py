"""The folder of a run: paths, lock and status, checkpoints, and the trained model in it."""
