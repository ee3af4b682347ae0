"""Models of Hugging Face's folders, in and out."""

from jax_entropy.huggingface.folder import from_huggingface, to_huggingface

__all__ = ["from_huggingface", "to_huggingface"]
