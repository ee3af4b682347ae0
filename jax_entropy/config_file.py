"""Config files, found by path or by the name of one that is bundled, run, and changed field by field.

Whatever is wrong with one is said in a sentence with its file and line; the exception behind it is its cause. Files of
sweeps are found and run the same way.
"""

import contextlib
import inspect
import os
import re
import runpy
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jax_entropy.config import PATHS
from jax_entropy.errors import UserError, check_kind, nearest
from jax_entropy.fields import FIELDS, KINDS
from jax_entropy.paths import local_path

_HERE = Path(__file__).parent
# inside the package where it is installed, beside it in a checkout
_FOLDER = next(folder for folder in (_HERE / "configs", _HERE.parent / "configs", _HERE) if folder.is_dir())


def bundled(folder: str = "") -> dict[str, Path]:
    """The files of `configs/`, or of a folder in it, by the names that they are asked for by."""
    if _FOLDER == _HERE:
        return {}
    return {path.stem: path for path in sorted((_FOLDER / folder).glob("[!_]*.py"))}


BUNDLED = bundled()


def load_config(file: str | os.PathLike, values: Mapping[str, Any] | None = None) -> ConfigDict:
    """The configuration of "file.py", "file.py:ARCHITECTURE" or, by name, "quickstart:SM+LN+G".

    Args:
      values: fields to change, as text or not: {"train.num_steps": 100}.
    Raises:
      UserError: a file that is not there, cannot be read or raises, or a value of the wrong type.
    """
    check_kind("config", file, str | os.PathLike, "a file, by path or name")
    text = os.fspath(file)
    head, ending, architecture = text.partition(".py:")
    if ending:
        name, arguments = f"{head}.py", (architecture,)
    else:
        name, colon, architecture = (text, "", "") if text.endswith(".py") else text.partition(":")
        arguments = (architecture,) if colon else ()
    return change(_run(find(name), arguments), values or {})


def change(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """`config` with fields changed to what `values` say, as text or not, and `~` in its paths expanded.

    Raises:
      UserError: a field that does not exist, or a value of the wrong type.
    """
    check_kind("values", values, Mapping, "a mapping of fields to values")
    fields = {field.name: field for field in FIELDS}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"config.{name} is not a field{nearest(name, fields)}")
        config.update_from_flattened_dict({name: fields[name].read(str(value))})
    for section, name in (path.split(".") for path in PATHS):
        if text := config.get(section, {}).get(name):
            config[section][name] = str(local_path(text, f"config.{section}.{name}"))
    return config


def find(name: str, known: Mapping[str, Path] = BUNDLED, kind: str = "config") -> Path:
    """The file of this path, else of this name.

    Args:
      known: files by name.
      kind: what the file should be, in words: "config", "sweep".
    Raises:
      UserError: there is none.
    """
    path = local_path(name, kind)
    try:
        if path.is_file():
            return path
        if name in known:
            return known[name]
        beside = [str(file) for file in path.parent.glob("*.py")]
    except OSError as error:
        raise UserError(f"the {kind} file {name!r} cannot be read: {error.strerror}") from error
    what = f"is a folder, not a {kind} file" if path.is_dir() else f"is no {kind} file"
    raise UserError(f"{name!r} {what}{nearest(name, [*beside, *known])}")


def function_of(path: Path, name: str) -> Callable:
    """The function `name` of a Python file, which is run.

    Raises:
      UserError: it has none.
    """
    function = runpy.run_path(str(path), run_name=path.stem).get(name)
    if not callable(function):
        raise UserError(f"{path} has no function {name}; see docs/configuration.md")
    return function


@contextlib.contextmanager
def explained(path: Path, kind: str = "config") -> Iterator[None]:
    """Turns whatever code of the file `path` raises into a UserError with its line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"the {kind} file {path}{_place(path, error)}: {_spell(path, error)}") from error


def _run(path: Path, arguments: tuple[str, ...]) -> ConfigDict:
    """What get_config of the file `path` returns."""
    with explained(path):
        get_config = function_of(path, "get_config")
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            raise UserError(
                f"get_config of {path} takes no architecture; leave ':{arguments[0]}' out"
                if arguments
                else f"get_config of {path} needs an architecture: {path}:SM+LN+G"
            ) from None
        config: Any = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path} returns {type(config).__name__}, not a ConfigDict; see default_config")
    return config


def _frame(path: Path, error: BaseException) -> traceback.FrameSummary | None:
    """Where in the file an error came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return frames[-1] if frames else None


def _place(path: Path, error: BaseException) -> str:
    frame = _frame(path, error)
    line = error.lineno if isinstance(error, SyntaxError) else frame and frame.lineno
    return f", line {line}" if line else ""


def _spell(path: Path, error: BaseException) -> str:
    """An error in words, where it is about a field in ours."""
    said = " ".join(str(error.args[0] if error.args else "").split())
    frame = _frame(path, error)
    wrong_type = re.match(r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type", said)
    if isinstance(error, TypeError) and wrong_type:
        name, value = wrong_type.groups()
        kinds = [field.kind or type(field.default) for field in FIELDS if field.name.split(".")[-1] == name]
        return f"{name}={value} must be {KINDS[kinds[0]]}" if kinds else f"{name} is a section; set its fields"
    missing = re.match(r"""['"\\]*([A-Za-z_]\w*)""", said)
    if isinstance(error, (KeyError, AttributeError)) and missing and frame and frame.name != "<module>":
        dotted = re.search(rf"\.((?:\w+\.)*{missing[1]})\b", frame.line or "")
        name = dotted[1] if dotted else missing[1]
        known = [field.name for field in FIELDS]
        return f"{name} is not a field{nearest(name, [*known, *(field.partition('.')[0] for field in known)])}"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
