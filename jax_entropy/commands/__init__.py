"""The command line: the only place that knows flags, and that prints."""
