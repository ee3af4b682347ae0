"""A run's model for other programs: a folder of Hugging Face, of safetensors, or for TransformerLens, with its card.

What a format has no place for is refused by name, before anything is written.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jax_entropy.architecture import ModelConfig
from jax_entropy.config import model_config
from jax_entropy.data import Tokenizer, load_tokenizer
from jax_entropy.errors import UserError, check_choice
from jax_entropy.export.card import HUGGINGFACE, SAFETENSORS, TRANSFORMER_LENS, card
from jax_entropy.export.transformer_lens import check_expressible as check_lens
from jax_entropy.export.transformer_lens import to_transformer_lens
from jax_entropy.huggingface.folder import check_expressible as check_gpt2
from jax_entropy.huggingface.folder import to_huggingface
from jax_entropy.huggingface.native import to_safetensors
from jax_entropy.paths import local_path, writing
from jax_entropy.runs.load import load_model
from jax_entropy.runs.workdir import Workdir

__all__ = ["FORMATS", "export_run"]


class Format(NamedTuple):
    """How a model is written: what refuses a config that has no place in it, and what writes the folder."""

    check: Callable[[ModelConfig], None]
    write: Callable[[ModelConfig, dict[str, Any], Path, Tokenizer | None], None]


def _write_huggingface(
    config: ModelConfig, variables: dict[str, Any], directory: Path, tokenizer: Tokenizer | None
) -> None:
    to_huggingface(config, variables, directory, tokenizer and tokenizer.end_of_text)
    if tokenizer:
        # Without it transformers takes GPT-2's own way of cutting text into words for granted.
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.context_length)
        settings |= dict.fromkeys(("bos_token", "eos_token"), tokenizer.decode([tokenizer.end_of_text]))
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


FORMATS = {
    HUGGINGFACE: Format(check_gpt2, _write_huggingface),
    SAFETENSORS: Format(lambda config: None, lambda config, variables, to, _: to_safetensors(config, variables, to)),
    TRANSFORMER_LENS: Format(check_lens, lambda config, variables, to, _: to_transformer_lens(config, variables, to)),
}


def export_run(
    workdir: str | os.PathLike,
    directory: str | os.PathLike,
    to: str = HUGGINGFACE,
    notify: Callable[[str], None] = print,
    *,
    best: bool = False,
) -> None:
    """Writes a run's model as a folder for other programs, with its tokenizer and a README.md that is its card.

    Args:
      workdir: the run's folder.
      directory: a folder that is empty or not there yet.
      to: "huggingface", what GPT-2 can express; "safetensors", everything, read by `from_safetensors`; or
        "transformer_lens", models without normalisation, read by HookedTransformer.
      notify: receives one sentence about each damaged checkpoint.
      best: the checkpoint of the lowest validation loss instead of the newest.
    Raises:
      UserError: there is no run or checkpoint, the format has no place for a part of the model, or the folder is not
        empty or cannot be written.
    """
    check_choice("to", to, FORMATS)
    workdir, directory, form = Workdir(workdir), local_path(directory, to), FORMATS[to]
    config = workdir.read_config()
    tokenizer = load_tokenizer(workdir.tokenizer) if workdir.tokenizer.exists() else None
    vocab_size = tokenizer.vocab_size if tokenizer else config.model.vocab_size
    if not vocab_size:
        raise UserError(f"{workdir.path} has no checkpoint yet; train it first")
    form.check(model_config(config, vocab_size))
    with writing(directory, to):
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise UserError(f"{directory} is not an empty folder; name one that is, or that is not there yet")
    model, variables, step, _ = load_model(workdir, config, vocab_size, notify, best=best)
    if "annealing" in variables and to != SAFETENSORS:
        raise UserError(
            f"{workdir.path} is still on its way to {model_config(config, vocab_size)}, and only safetensors have a "
            "place for what it is now; train it to its end"
        )
    form.write(model, variables, directory, tokenizer)
    with writing(directory, to):
        if tokenizer:
            tokenizer.save(directory / "tokenizer.json")
        (directory / "README.md").write_text(card(workdir, config, model, step, to), encoding="utf-8")
