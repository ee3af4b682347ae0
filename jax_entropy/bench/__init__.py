"""Measurements that a person starts: attention, whole steps beside PyTorch's, feeding, and monitoring.

Each warms up, waits for its results, takes turns between contenders and reports medians and ratios of one run.
"""
