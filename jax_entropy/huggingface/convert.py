"""Workdirs from folders of models, GPT-2's of Hugging Face and our own safetensors, each with its tokenizer."""

import functools
import os
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
from jax_entropy.huggingface.native import MODEL_TYPE, from_safetensors, read_model_config
from jax_entropy.huggingface.tokenizer import read_tokenizer
from jax_entropy.model import Transformer
from jax_entropy.paths import local_path
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.workdir import OWN_TOKENIZER, Workdir
from jax_entropy.state import init_state


def is_folder(path: str | Path) -> bool:
    """Whether a folder holds a model for exchange, not one of our runs; one without a config.json is neither."""
    return (Path(path) / "config.json").is_file() and _model_type(path) is not None


def _model_type(directory: str | Path) -> str | None:
    return read_json(Path(directory) / "config.json").get("model_type")


def read_folder(
    directory: str | Path, notify: Callable[[str], None] = print
) -> tuple[ModelConfig, dict[str, Any], Tokenizer | None]:
    """The model in a folder, and its tokenizer if there is one.

    Raises:
      UserError: as `from_huggingface` and `from_safetensors` do, or a model that is between two architectures.
    """
    directory = local_path(directory, "directory")
    ours = directory.is_dir() and _model_type(directory) == MODEL_TYPE
    model, variables = from_safetensors(directory) if ours else from_huggingface(directory)
    if "annealing" in variables:
        raise UserError(f"{directory} was written while its run still took nonlinearities out; write it at the end")
    return model, variables, read_tokenizer(directory, model.vocab_size, notify)


def folder_config(directory: str | Path) -> ConfigDict:
    """The config of a run of the model in a folder: its architecture and sizes, and defaults besides."""
    ours = _model_type(directory) == MODEL_TYPE
    model = read_model_config(Path(directory)) if ours else read_config(Path(directory))[1]
    config = default_config(str(model))
    config.model.tanh_gelu = model.activation == "gelu_tanh"
    fields = set(config.model) - {"tanh_gelu"}
    config.model.update({name: value for name in fields if (value := getattr(model, name)) is not None})
    config.train.dtype, config.penalty.threshold_init = model.dtype, model.threshold_init
    if "frozen" in (model.norm, model.final_norm):
        config.anneal.end = 0.0  # what was taken out is gone
    return config


def import_run(directory: str | os.PathLike, workdir: str | os.PathLike, notify: Callable[[str], None] = print) -> None:
    """Makes a run of a model that somebody published: to evaluate, generate, train on, or execute privately.

    The workdir gets a config.json, the model's tokenizer if it has one, and a checkpoint of step 0, exact to the bit.

    Args:
      directory: what `export_run` wrote as "safetensors" or "huggingface", or another GPT-2 folder of Hugging Face.
      workdir: a folder that holds no run yet.
      notify: receives one sentence about a tokenizer that is missing, padded or renamed.
    Raises:
      UserError: as `from_safetensors` and `from_huggingface` do, a tokenizer of another vocabulary, or a workdir that
        holds a run.
    """
    workdir = Workdir(workdir)
    if workdir.exists():
        raise UserError(f"{workdir.path} holds a run already; choose another workdir")
    model, variables, tokenizer = read_folder(directory, notify)
    config = folder_config(directory)
    config.data.tokenizer = OWN_TOKENIZER
    state = jax.jit(functools.partial(init_state, config, Transformer(model)))()
    workdir.claim(config, tokenizer)
    with Checkpointer(workdir.checkpoints, notify=notify) as checkpointer:
        meta = dict(config=config.to_dict(), corpus=None, guard=None)
        beside = {name: tree for name, tree in variables.items() if name != "params"}
        checkpointer.save(0, state._replace(params=variables["params"], collections=beside), None, meta)
