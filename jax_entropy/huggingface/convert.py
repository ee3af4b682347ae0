"""Workdirs from Hugging Face GPT-2 folders, and such folders from workdirs, each with its tokenizer."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jax_entropy.architecture import ModelConfig
from jax_entropy.config import default_config, model_config
from jax_entropy.data import load_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.huggingface.gpt2 import check_expressible, from_huggingface, to_huggingface
from jax_entropy.model import Transformer
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.load import load_state
from jax_entropy.runs.workdir import Workdir
from jax_entropy.state import init_state


def import_run(directory: str | Path, path: str | Path, notify: Callable[[str], None] = print) -> None:
    """Makes the workdir `path` of a GPT-2 folder: config.json, its tokenizer.json if it has one, checkpoint of step 0.

    Raises UserError as `from_huggingface` does, for a tokenizer of another vocabulary, and where `path` holds a run.
    """
    directory, workdir = Path(directory), Workdir(path)
    model, variables = from_huggingface(directory)
    tokenizer = None
    if (directory / "tokenizer.json").exists():
        tokenizer = load_tokenizer(directory / "tokenizer.json")
        if tokenizer.vocab_size != model.vocab_size:
            raise UserError(
                f"{directory / 'tokenizer.json'} has {tokenizer.vocab_size} entries, but the model has "
                f"vocab_size={model.vocab_size}; put the model's own tokenizer.json there"
            )
    else:
        notify(f"{directory} has no tokenizer.json: the run can be exported, but neither evaluated nor asked for text")
    if workdir.exists():
        raise UserError(f"{workdir.path} holds a run already; choose another --workdir")
    config = _run_config(model, workdir.tokenizer.name)
    state = jax.jit(functools.partial(init_state, config, Transformer(model)))()
    workdir.claim(config, tokenizer)
    with Checkpointer(workdir.checkpoints, notify=notify) as checkpointer:
        meta = dict(config=config.to_dict(), corpus=None, guard=None)
        checkpointer.save(0, state._replace(params=variables["params"]), None, meta)


def export_run(
    path: str | Path, directory: str | Path, notify: Callable[[str], None] = print, *, best: bool = False
) -> None:
    """Writes a workdir's newest good checkpoint, or the best by validation loss, as a GPT-2 folder with its tokenizer.

    Raises UserError if there is no run or checkpoint, and as `to_huggingface` does.
    """
    workdir, directory = Workdir(path), Path(directory)
    config = workdir.read_config()
    tokenizer = load_tokenizer(workdir.tokenizer) if workdir.tokenizer.exists() else None
    vocab_size = tokenizer.vocab_size if tokenizer else config.model.vocab_size
    if not vocab_size:
        raise UserError(f"{workdir.path} has no checkpoint yet; train it first")
    model = model_config(config, vocab_size)
    check_expressible(model)
    state, _ = load_state(workdir, config, Transformer(model), notify, best=best)
    to_huggingface(model, state.variables, directory, tokenizer and tokenizer.end_of_text)
    if tokenizer:
        tokenizer.save(directory / "tokenizer.json")
        # Without it transformers takes GPT-2's own way of cutting text into words for granted.
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=model.context_length)
        settings |= dict.fromkeys(("bos_token", "eos_token"), tokenizer.decode([tokenizer.end_of_text]))
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _run_config(model: ModelConfig, tokenizer: str) -> ConfigDict:
    """The config of a workdir around an imported model; text is read with the model's own tokenizer, which lies there."""
    config = default_config(str(model))
    config.model.update({name: value for name in config.model if (value := getattr(model, name)) is not None})
    config.model.activation = model.activation  # the notation's G is the exact GELU
    config.data.tokenizer = tokenizer
    return config
