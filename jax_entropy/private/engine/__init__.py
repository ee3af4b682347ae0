"""The engine of secure computation: its environment, and the subprocess that runs in it."""
