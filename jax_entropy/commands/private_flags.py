"""Flags that the commands of private execution share, and how they are read."""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_entropy.errors import UserError, nearest
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.program.blueprint import PLAIN, REWRITES, Rewrites
from jax_entropy.runs.workdir import to_json

SIZE = dict(
    num_layers=(2, "blocks"), num_heads=(4, "heads in a block"), model_dim=(128, "width"),
    vocab_size=(512, "entries of the tokenizer"),
)  # fmt: skip
MEASURE = dict(
    context=(32, "tokens read"),
    network=("wan", "lan | wan (the paper's) | like 100mbps,80ms"),
    json=("", "file for everything that was measured"),
    picture=("", "file for the picture, .png, .svg or .pdf"),
)
SETTING = dict(
    protocol=("semi2k", "semi2k (two parties and a dealer) | aby3 (three parties) | cheetah (two parties)"),
    fraction_bits=(Setting().fraction_bits, "of the 64 bits of a number"),
    exponent=(Setting().exponent, "taylor | pade: how the exponential is computed"),
    exponent_iterations=(Setting().exponent_iterations, "squarings of taylor"),
    colocated=(Setting().colocated, "cheetah uses that the server knows its own weights; off, they are shares"),
)
PICTURES = (".png", ".svg", ".pdf")
WITHOUT = dict(without=("", "rewrites to switch off, separated by commas; 'all' exports the model plainly"))

SAMPLING = dict(
    temperature=(0.0, "of the sampling among revealed logits; 0 is greedy"),
    top_k=(0, "sample among the k likeliest tokens; 0: among all"),
    seed=(0, "of the sampling"),
)


def read_setting(values: Any) -> Setting:
    """The engine's setting of a command's flags."""
    fields = Setting._fields
    return Setting(**{name: getattr(values, name) for name in fields}).check()


def read_rewrites(without: str) -> Rewrites:
    """All rewrites but those named, PLAIN for "all". Raises UserError for a name that is none."""
    if without == "all":
        return PLAIN
    off = [name for name in without.split(",") if name]
    for name in off:
        if name not in REWRITES:
            raise UserError(f"--without={name!r} is not a rewrite{nearest(name, [*REWRITES, 'all'])}")
    return Rewrites(**{name: name not in off for name in REWRITES})


def warn(line: str) -> None:
    print(line, file=sys.stderr)


def read_sampling(values: Any) -> Callable[[], Callable]:
    """Gives each text's `choose`, logits [V] → token. Raises UserError for options out of range."""
    from jax_entropy.private.session.inference import REVEALED, sampler

    if values.reveal not in REVEALED:
        raise UserError(f"--reveal={values.reveal!r} is not known{nearest(values.reveal, REVEALED)}")
    for name in ("temperature", "top_k"):
        if values.reveal == "token" and (value := values[name].value):
            raise UserError(f"--{name}={value} needs --reveal=logits; inside, the likeliest is taken")
    new_choose = functools.partial(sampler, values.tokens, values.temperature, values.top_k, values.seed)
    new_choose()
    return new_choose


def check_outputs(values: Any) -> None:
    """Raises UserError if --json or --picture cannot be written, before what is to be written is measured."""
    for name in {"json", "picture"} & set(values):
        if not (text := values[name].value):
            continue
        path = Path(text)
        try:
            is_folder, parent_there = path.is_dir(), path.resolve().parent.is_dir()
        except OSError as error:
            raise UserError(f"--{name}={text} cannot be written: {error.strerror}") from None
        if is_folder:
            raise UserError(f"--{name}={text} is a folder; name a file in it")
        if not parent_there:
            raise UserError(f"--{name}={text}: there is no folder {path.resolve().parent}")
        if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
            raise UserError(f"--{name}={text} cannot be written")
        if name == "picture" and path.suffix not in PICTURES:
            raise UserError(f"--picture={text} must end in {' or '.join(PICTURES)}")


def write_json(file: str | Path, content: dict) -> None:
    """Writes what was measured, where a file is given."""
    if file:
        try:
            Path(file).write_text(json.dumps(to_json(content), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from None
        print(f"wrote {file}", file=sys.stderr)


class Streamed:
    """Writes a prompt and the tokens after it as they come."""

    def __init__(self, tokenizer: Any, prompt: str):
        self.tokenizer, self.prompt, self.ids, self.written = tokenizer, prompt, [], None

    def token(self, token: int) -> None:
        self.ids.append(token)
        self._write(self.tokenizer.decode(self.ids))

    def end(self) -> None:
        self._write(self.tokenizer.decode(self.ids), end=True)

    def _write(self, text: str, end: bool = False) -> None:
        if self.written is None:
            print(self.prompt, end="", flush=True)
            self.written = ""
        if end or not text.endswith("\ufffd"):  # half a character
            print(text[len(self.written) :], end="\n" if end else "", flush=True)
            self.written = text
