"""What a command takes, declared beside the function that runs it, and how it is read; every mistake is one sentence.

    @command(WORKDIR, Flag("best", False, "…"), examples=["evaluate runs/quickstart --best"])
    def evaluate(values): …

argparse splits the arguments; types, choices, paths and configurations are read here.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_entropy.errors import UserError, nearest
from jax_entropy.paths import local_path


class Flag(NamedTuple):
    """`--name=VALUE` or `--name VALUE`; where the default is a bool, `--name` or `--noname`.

    kind: of a flag without a default. repeated: may be given several times, and is a list. endings: of a file that the
    command writes; whether it can be is found out before there is something to write.
    """

    name: str
    default: Any
    help: str
    choices: Sequence[str] = ()
    kind: type = str
    required: bool = False
    repeated: bool = False
    endings: tuple[str, ...] = ()

    @property
    def type(self) -> type:
        """Of its value."""
        return self.kind if self.default is None else type(self.default)

    def read(self, text: str) -> Any:
        """The value of `text`.

        Raises:
          UserError: it is none of the flag's type or choices.
        """
        if self.choices and text not in self.choices:
            raise UserError(f"--{self.name}={text!r} is not known{nearest(text, self.choices)}")
        if self.type is Path:
            path = local_path(text, f"--{self.name}")
            if self.endings and text != "-":
                _check_output(path, f"--{self.name}={text}", self.endings)
            return path
        try:
            return self.type(text)
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[self.type]
            raise UserError(f"--{self.name}={text} must be {kind}") from None


def _check_output(path: Path, given: str, endings: tuple[str, ...]) -> None:
    try:
        is_folder, folder = path.is_dir(), path.absolute().parent
        there = folder.is_dir()
    except OSError as error:
        raise UserError(f"{given} cannot be written: {error.strerror}") from error
    if is_folder:
        raise UserError(f"{given} is a folder; name a file in it")
    if not there:
        raise UserError(f"{given}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{given} cannot be written")
    if not path.name.endswith(endings):
        raise UserError(f"{given} must end in {' or '.join(endings)}")


class OneOf(NamedTuple):
    """Sources of which exactly one is given: each a flag, followed by those that go with it only."""

    groups: tuple[tuple[Flag, ...], ...]


class Names(NamedTuple):
    """Any number of words without a flag, as the list `name`."""

    name: str
    help: str


class Fields(NamedTuple):
    """`--config.FIELD=VALUE` without a config to change: texts by name, in `fields`."""

    help: str


class Command(NamedTuple):
    """A command: what it takes, and the function that is called with what was given."""

    name: str
    help: str
    run: Callable[[argparse.Namespace], None]
    arguments: tuple["Argument", ...]
    examples: tuple[str, ...]

    @property
    def flags(self) -> list[Flag]:
        """All flags, those of sources too."""
        flags = [argument for argument in self.arguments if isinstance(argument, Flag)]
        for argument in self.arguments:
            if isinstance(argument, OneOf):
                flags += [flag for group in argument.groups for flag in group]
        return [*flags, DEBUG]


Argument = Flag | OneOf | Names | Fields

WORKDIR = Flag("workdir", None, "folder of the run; may be given without --workdir=, too", kind=Path, required=True)
MODEL = Flag("model", None, "folder of Hugging Face; may be given without --model=, too", kind=Path, required=True)
CONFIG = Flag("config", None, "file.py, or quickstart, codeparrot, languini; :ARCHITECTURE may follow", required=True)
BEST = Flag("best", False, "the best checkpoint by validation loss instead of the newest")
JSON = Flag("json", None, "file for the numbers; - is standard output", kind=Path, endings=("",))
XLA = Flag("xla", "", "compiler options beside XLA's own choice, written down with the numbers", choices=("fast",))
DEBUG = Flag("debug", False, "show where in the code a mistake was found")


def command(
    *arguments: Argument, examples: Sequence[str] = ()
) -> Callable[[Callable[[argparse.Namespace], None]], Command]:
    """Makes a function the command of its name; the first line of its docstring says what it does."""
    return lambda run: Command(run.__name__, (run.__doc__ or "").strip(), run, arguments, tuple(examples))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        message = message.replace("ignored explicit argument", "takes no value, but was given")
        raise UserError(message.removeprefix("argument ").replace("expected one argument", "needs a value"))


class _Switch(argparse.Action):
    """--name and --noname."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def read(command: Command, arguments: Sequence[str]) -> argparse.Namespace | None:
    """The values of a command's flags by name; those of configuration fields, as text, in `fields`; None for --help.

    Raises:
      UserError: a flag that does not exist, is missing, or has a value that cannot be.
    """
    parser, flags = _Parser(allow_abbrev=False, add_help=False), {flag.name: flag for flag in command.flags}
    parser.add_argument("-h", "--help", action="store_true")
    for flag in flags.values():
        if flag.type is bool:
            parser.add_argument(f"--{flag.name}", f"--no{flag.name}", action=_Switch, nargs=0, dest=flag.name)
        else:
            parser.add_argument(f"--{flag.name}", action="append", dest=flag.name)
    takes_fields = "config" in flags or any(isinstance(argument, Fields) for argument in command.arguments)
    fields = _fields() if takes_fields else {}
    for name in fields:
        parser.add_argument(f"--config.{name}", dest=f"config.{name}")
    parser.add_argument("words", nargs="*")
    given, unknown = parser.parse_known_intermixed_args([_decoded(argument) for argument in arguments])
    if given.help:
        return None
    for argument in unknown:
        name = argument.partition("=")[0]
        raise UserError(f"there is no flag {name}{nearest(name, [option for option in parser._option_string_actions])}")
    values = argparse.Namespace(arguments=list(arguments), given={n for n in flags if getattr(given, n) is not None})
    values.fields = {name: text for name in fields if (text := getattr(given, f"config.{name}")) is not None}
    for name, flag in flags.items():
        setattr(values, name, _value(flag, getattr(given, name)))
    _take_words(values, command, given.words, flags)
    _check_given(values, command)
    return values


def _fields() -> Sequence[str]:
    from jax_entropy.fields import FIELDS

    return [field.name for field in FIELDS]


def _decoded(argument: str) -> str:
    """As UTF-8, whatever the locale; names of files need not be."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return argument


def _value(flag: Flag, given: Any) -> Any:
    if given is None:
        return [] if flag.repeated else flag.default
    if flag.type is bool:
        return given
    read_all = [flag.read(text) for text in given]
    return read_all if flag.repeated else read_all[-1]


def _take_words(values: argparse.Namespace, command: Command, words: list[str], flags: Mapping[str, Flag]) -> None:
    """Words without a flag: the folder of the run or model, then names where the command takes some."""
    for flag in (WORKDIR, MODEL):
        if words and flags.get(flag.name) == flag and flag.name not in values.given:
            setattr(values, flag.name, flag.read(words.pop(0)))
            values.given.add(flag.name)
    for argument in command.arguments:
        if isinstance(argument, Names):
            setattr(values, argument.name, words)
            return
    if words:
        raise UserError(f"the argument {words[0]!r} is not understood; flags are written --name=value")


def _check_given(values: argparse.Namespace, command: Command) -> None:
    """Checks that the flags given are complete and go together.

    Raises:
      UserError: something is missing, or two things exclude each other.
    """
    for argument in command.arguments:
        if isinstance(argument, OneOf):
            values.source = _source(values, command, argument)
        elif isinstance(argument, Flag) and argument.required and argument.name not in values.given:
            if argument.name == "config" and (_holds_run(values) or "from" in values.given):
                continue
            raise UserError(f"--{argument.name} is missing")


def _holds_run(values: argparse.Namespace) -> bool:
    """Whether the configuration is that of a run which is there."""
    if "workdir" not in values.given:
        return False
    from jax_entropy.runs.workdir import Workdir

    return Workdir(values.workdir).exists()


def _source(values: argparse.Namespace, command: Command, sources: OneOf) -> str:
    names = [group[0].name for group in sources.groups]
    given = [name for name in names if name in values.given]
    if not given:
        choice = ", ".join(f"--{name}" for name in names[:-1]) + f" or --{names[-1]}"
        raise UserError(f"{command.name} what? give {choice}")
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} exclude each other: each names a model")
    for group in sources.groups:
        for flag in group[1:]:
            if flag.name in values.given and group[0].name != given[0]:
                raise UserError(f"--{flag.name} goes with --{group[0].name}, not with --{given[0]}")
    if values.fields and given[0] != "config":
        raise UserError(f"--config.{next(iter(values.fields))} goes with --config, not with --{given[0]}")
    return given[0]


def load(values: argparse.Namespace) -> None:
    """Replaces `values.config`, a text, by the configuration; without one, by that of the workdir or of --from."""
    if not hasattr(values, "config") or getattr(values, "source", "config") != "config":
        return
    from jax_entropy.config_file import change, load_config

    if values.config is not None:
        values.config = load_config(values.config, values.fields)
    elif "from" in values.given and not _holds_run(values):
        from jax_entropy.training.warm_start import source_config

        values.config = change(source_config(getattr(values, "from")), values.fields)
    else:
        from jax_entropy.runs.workdir import Workdir

        values.config = change(Workdir(values.workdir).read_config(), values.fields)


def describe(called: str, command: Command) -> str:
    """The help of a command that is called "jax-entropy NAME"."""
    rows = []
    for argument in command.arguments:
        if isinstance(argument, Names):
            rows.append((f"{argument.name.upper()} …", argument.help))
    for flag in command.flags:
        if flag.type is bool:
            written = f"--{'no' if flag.default else ''}{flag.name}"
        elif flag.default in (None, ""):
            written = f"--{flag.name}={'PATH' if flag.type is Path else 'VALUE'}"
        else:
            written = f"--{flag.name}={flag.default}"
        rows.append((written, flag.help + (f": {' | '.join(flag.choices)}" if flag.choices else "")))
        if flag.name == "config":
            rows.append(("--config.FIELD=VALUE", "one field of it; docs/configuration.md has all"))
    rows += [("--config.FIELD=VALUE", argument.help) for argument in command.arguments if isinstance(argument, Fields)]
    width = max(len(written) for written, _ in rows) + 2
    lines = [f"{called} — {command.help}", "", *(f"  {written:{width}}{text}" for written, text in rows)]
    if command.examples:
        lines += ["", "examples:", *(f"  jax-entropy {example}" for example in command.examples)]
    return "\n".join(lines)
