"""Bytes, rounds and seconds of private execution: measured, predicted, and the paper's."""
