"""Workdirs from Hugging Face GPT-2 folders, each with its tokenizer."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jax_entropy.architecture import ModelConfig
from jax_entropy.config import default_config
from jax_entropy.data import Tokenizer
from jax_entropy.errors import UserError
from jax_entropy.huggingface.folder import from_huggingface, read_config, read_json
from jax_entropy.huggingface.tokenizer import read_tokenizer
from jax_entropy.model import Transformer
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.workdir import Workdir
from jax_entropy.state import init_state


def is_folder(path: str | Path) -> bool:
    """Whether a folder is Hugging Face's, not one of our runs; one without a config.json is neither."""
    config = Path(path) / "config.json"
    return config.is_file() and "model_type" in read_json(config)


def read_folder(
    directory: str | Path, notify: Callable[[str], None] = print
) -> tuple[ModelConfig, dict[str, Any], Tokenizer | None]:
    """The model in a folder, and its tokenizer if there is one.

    Raises:
      UserError: as `from_huggingface` does.
    """
    model, variables = from_huggingface(directory)
    return model, variables, read_tokenizer(Path(directory), model.vocab_size, notify)


def folder_config(directory: str | Path) -> ConfigDict:
    """The config of a run of the model in a folder: its architecture and sizes, and defaults besides."""
    _, model = read_config(Path(directory))
    config = default_config(str(model))
    config.model.update({name: value for name in config.model if (value := getattr(model, name)) is not None})
    config.model.activation = model.activation  # the notation's G is the exact GELU
    return config


def import_run(directory: str | Path, path: str | Path, notify: Callable[[str], None] = print) -> None:
    """Makes the workdir `path` of a GPT-2 folder: config.json, its tokenizer.json if it has one, checkpoint of step 0.

    Raises:
      UserError: as `from_huggingface` does, a tokenizer of another vocabulary, or a `path` that holds a run.
    """
    workdir = Workdir(path)
    model, variables, tokenizer = read_folder(directory, notify)
    if workdir.exists():
        raise UserError(f"{workdir.path} holds a run already; choose another workdir")
    config = folder_config(directory)
    config.data.tokenizer = workdir.tokenizer.name  # text is read with the model's own tokenizer, which lies there
    state = jax.jit(functools.partial(init_state, config, Transformer(model)))()
    workdir.claim(config, tokenizer)
    with Checkpointer(workdir.checkpoints, notify=notify) as checkpointer:
        meta = dict(config=config.to_dict(), corpus=None, guard=None)
        checkpointer.save(0, state._replace(params=variables["params"]), None, meta)
