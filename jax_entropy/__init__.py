"""Entropy-guided attention for private language models: train, watch, repair and privately run them.

The public names, each imported when it is first used: `import jax_entropy` loads nothing else.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; a test holds it to the table below
    from jax_entropy.architecture import ModelConfig as ModelConfig
    from jax_entropy.architecture import architecture as architecture
    from jax_entropy.attention import AttentionStats as AttentionStats
    from jax_entropy.attention import attention as attention
    from jax_entropy.attention.attention_fn import attention_fn as attention_fn
    from jax_entropy.config import default_config as default_config
    from jax_entropy.entropy import entropy_penalty as entropy_penalty
    from jax_entropy.entropy import head_bands as head_bands
    from jax_entropy.entropy import head_entropy as head_entropy
    from jax_entropy.entropy import max_entropy as max_entropy
    from jax_entropy.entropy import row_entropy as row_entropy
    from jax_entropy.errors import UserError as UserError
    from jax_entropy.evaluate import evaluate as evaluate
    from jax_entropy.export import export_run as export_run
    from jax_entropy.generate import generate as generate
    from jax_entropy.huggingface.convert import import_run as import_run
    from jax_entropy.huggingface.folder import from_huggingface as from_huggingface
    from jax_entropy.huggingface.folder import to_huggingface as to_huggingface
    from jax_entropy.huggingface.native import from_safetensors as from_safetensors
    from jax_entropy.huggingface.native import to_safetensors as to_safetensors
    from jax_entropy.inspection import inspect as inspect
    from jax_entropy.loss import loss_fn as loss_fn
    from jax_entropy.model import Aux as Aux
    from jax_entropy.model import Transformer as Transformer
    from jax_entropy.report import report as report
    from jax_entropy.runs.load import load_run as load_run
    from jax_entropy.sweep import sweep as sweep
    from jax_entropy.training.train import train as train

_HOME = {
    "ModelConfig": "architecture",
    "architecture": "architecture",
    "AttentionStats": "attention",
    "attention": "attention",
    "attention_fn": "attention.attention_fn",
    "default_config": "config",
    "entropy_penalty": "entropy",
    "head_bands": "entropy",
    "head_entropy": "entropy",
    "max_entropy": "entropy",
    "row_entropy": "entropy",
    "UserError": "errors",
    "evaluate": "evaluate",
    "export_run": "export",
    "generate": "generate",
    "import_run": "huggingface.convert",
    "from_huggingface": "huggingface.folder",
    "to_huggingface": "huggingface.folder",
    "from_safetensors": "huggingface.native",
    "to_safetensors": "huggingface.native",
    "inspect": "inspection",
    "loss_fn": "loss",
    "Aux": "model",
    "Transformer": "model",
    "report": "report",
    "load_run": "runs.load",
    "sweep": "sweep",
    "train": "training.train",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # slow enough to wait until somebody asks

        return version(__name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})


class _Package(types.ModuleType):
    """Here `evaluate` is the function, whoever imported the module `jax_entropy.evaluate` that it comes from."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
