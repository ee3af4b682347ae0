"""The command line of private execution: `jax-entropy private WORD --flag=value …`."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from jax_entropy.errors import UserError, nearest
from jax_entropy.private import engine
from jax_entropy.private.program import Steps

SETTING = dict(
    protocol=("semi2k", "semi2k (two parties and a dealer) | aby3 (three parties) | cheetah (two parties)"),
    fraction_bits=(engine.Setting().fraction_bits, "of the 64 bits of a number"),
    exponent=(engine.Setting().exponent, "taylor | pade: how the exponential is computed"),
    exponent_iterations=(engine.Setting().exponent_iterations, "squarings of taylor"),
    without=("", "steps to switch off, separated by commas; 'all' exports the model plainly"),
)


def setup(parse: Any) -> None:
    """Makes the engine's own environment, once."""
    values = parse.flags(check=(False, "only say what is there"), force=(False, "make it anew"))
    found = engine.check() if values.check else engine.setup(print, force=values.force)
    print(f"engine {found['engine']} on Python {found['python']} in {found['directory']}")


def generate(parse: Any) -> None:
    """Text under secure computation, all parties on this machine."""
    values = parse.flags(
        workdir=True,
        prompt=("", "text to go on from"),
        tokens=(16, "tokens to write at most"),
        reveal=("logits", "what the client learns of each new token: logits | token"),
        best=(False, "the best checkpoint by validation loss instead of the newest"),
        json=("", "file for the account of every program that ran"),
        **SETTING,
    )
    engine.environment_python()
    from jax_entropy.private.export import export
    from jax_entropy.private.fixed_point import check_range
    from jax_entropy.private.inference import PrivateModel
    from jax_entropy.private.inference import generate as run
    from jax_entropy.workdir import load_run

    setting = read_setting(values)
    loaded = load_run(values.workdir, warn, best=values.best)
    exported = export(loaded.model.config, loaded.variables, read_steps(values.without))
    ids, start = loaded.tokenizer.encode(values.prompt), time.monotonic()
    if ids:
        check_range(exported, ids[: exported.shape.context_length], setting)
    text = Streamed(loaded.tokenizer, values.prompt)
    with engine.Engine(setting) as started:
        model = PrivateModel(started, exported.shape, {name: value.shape for name, value in exported.weights.items()})
        model.share_weights(exported.weights)
        new = run(
            model, ids, values.tokens, end_of_text=loaded.tokenizer.end_of_text, reveal=values.reveal, notify=text.token
        )
    print()
    seconds = time.monotonic() - start
    Console(stderr=True, highlight=False, soft_wrap=True).print(spent(model.accounts, len(new), seconds, setting))
    write_json(values.json, dict(
        architecture=exported.shape.architecture, setting=setting._asdict(), seconds=seconds, prompt_tokens=len(ids), tokens=new,
        programs=[dict(name=name, **account._asdict()) for name, account in model.accounts],
    ))  # fmt: skip


WORDS = {function.__name__: function for function in (setup, generate)}


def private(parse: Any) -> None:
    """A trained model under secure computation: `private setup`, `generate`, `profile`, `compare`, `keys`, `serve`, `ask`."""
    WORDS[parse.word(tuple(WORDS))](parse)


class Streamed:
    """Writes a text as its tokens come."""

    def __init__(self, tokenizer: Any, prompt: str):
        self.tokenizer, self.ids, self.written = tokenizer, [], ""
        print(prompt, end="", flush=True)

    def token(self, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):  # half a character
            print(text[len(self.written) :], end="", flush=True)
            self.written = text


def read_setting(values: Any) -> engine.Setting:
    """The engine's setting of a command's flags."""
    fields = ("protocol", "fraction_bits", "exponent", "exponent_iterations")
    return engine.Setting(**{name: getattr(values, name) for name in fields}).check()


def read_steps(without: str) -> Steps:
    """All steps but those named. Raises UserError for a name that is none."""
    names = [field.name for field in dataclasses.fields(Steps)]
    off = names if without == "all" else [name for name in without.split(",") if name]
    for name in off:
        if name not in names:
            raise UserError(f"--without={name!r} is not a step{nearest(name, [*names, 'all'])}")
    return Steps(**{name: name not in off for name in names})


def spent(accounts: list, num_tokens: int, seconds: float, setting: engine.Setting) -> str:
    """What generating took, in two lines."""
    prefill = next(account for name, account in accounts if name.startswith("prefill"))
    rest = [account for name, account in accounts if name in ("step", "choose")]
    line = f"{num_tokens} tokens in {seconds:.1f} s under {setting.protocol}; the prompt {describe(prefill)}"
    if rest:
        steps = sum(name == "step" for name, _ in accounts) or 1
        line += f"\na token {describe(engine.Account(*(_mean(values, steps) for values in zip(*rest))))}"
    return line


def _mean(values: tuple, count: int) -> Any:
    if isinstance(values[0], tuple):
        return tuple(sum(column) / count for column in zip(*values))
    return sum(values) / count


def describe(account: engine.Account) -> str:
    """Bytes of each party, rounds and time in a phrase."""
    each = " / ".join(f"{count / 1e6:,.2f}" for count in account.bytes)
    return f"{each} MB sent by party {' / '.join(map(str, range(len(account.bytes))))}, {account.rounds:.0f} rounds, {account.seconds:.2f} s"


def write_json(file: str, content: dict) -> None:
    if file:
        try:
            Path(file).write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json={file} cannot be written: {error.strerror}") from None


def warn(line: str) -> None:
    print(line, file=sys.stderr)
