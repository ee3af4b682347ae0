"""Entropy-guided attention for private language models: train, watch, repair and privately run them."""
