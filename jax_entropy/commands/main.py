"""`jax-entropy COMMAND …`: the names of the commands, what a process needs before one runs, and its exit code.

Exit codes: 0 done or cleanly stopped, 2 a mistake of the user's, said in one sentence on stderr, 1 anything else.
"""

import contextlib
import importlib
import importlib.metadata
import os
import platform
import sys
import traceback
from argparse import Namespace
from collections.abc import Mapping, Sequence

from jax_entropy.commands import INTERRUPTED, parse, process
from jax_entropy.commands.census import census
from jax_entropy.commands.console import output_failure, prepare_streams, warn
from jax_entropy.commands.inspect import inspect
from jax_entropy.commands.parse import Command
from jax_entropy.commands.plan import plan
from jax_entropy.commands.runs import convert, evaluate, generate, report, status, watch
from jax_entropy.commands.sweep import sweep
from jax_entropy.commands.train import train
from jax_entropy.errors import UserError, nearest

COMMANDS = {
    found.name: found
    for found in (train, sweep, status, watch, evaluate, generate, report, inspect, convert, census, plan)
}
FAMILIES = {
    "private": "A trained model under secure computation.",
    "bench": "Speed, memory and growth: attention and its kernels, a step, the loader, monitoring, a whole device.",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
_COMPILE = ("train", "evaluate", "generate")  # the same programs again and again
_HELP = ("help", "--help", "-h")
# Large buffers in huge pages, and kept: a step's temporaries are one buffer, which glibc would give back to the system
# after each step, to be cleared for the next. It reads this when a process starts, and from nowhere else.
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    f"glibc.malloc.trim_threshold={1 << 40}"
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    code = 1
    try:
        if argv is None:
            prepare_streams(outlives_reader=sys.argv[1:2] in (["train"], ["sweep"]))
        code = _run(sys.argv[1:] if argv is None else list(argv), is_process=argv is None)
        if failure := output_failure():
            warn(f"jax-entropy: the output cannot be written: {failure.strerror}")
            code = code or 1
    except BrokenPipeError:  # whoever reads, `head` for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        if _was_interrupted(error):
            warn(INTERRUPTED)
        elif needed := _out_of_memory(error):
            warn(f"jax-entropy: out of memory: {needed}; docs/troubleshooting.md says what takes less")
            code = 2
        else:
            traceback.print_exc()
    if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        # a failed process must not wait for its peers, which wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: extension modules that are being imported make an ImportError of it."""
    return error is not None and (
        isinstance(error, KeyboardInterrupt) or _was_interrupted(error.__cause__ or error.__context__)
    )


def _out_of_memory(error: Exception) -> str:
    """What did not fit, as NumPy or XLA says it; empty where memory is not what is missing."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    return said if isinstance(error, MemoryError) or said.startswith("RESOURCE_EXHAUSTED") else ""


def _run(arguments: list[str], is_process: bool) -> int:
    values = Namespace(debug=False)
    try:
        if not arguments or arguments[0] in _HELP:
            print(_list())
            return 0
        if arguments[0] == "--version":
            print(_version())
            return 0
        called, command, rest = _find(arguments)
        if command is None:
            print(_list(called))
            return 0
        if is_process and arguments[0] in ("train", "sweep", "bench") and not {"-h", "--help"} & set(rest):
            _keep_memory()
        if is_process and command.name in _COMPILE:
            process.keep_compilations()
        read = parse.read(command, rest)
        if read is None:
            print(parse.describe(called, command))
            return 0
        values = read
        parse.load(values)
        if command is not status:
            process.prepare()
        command.run(values)
    except UserError as error:
        if values.debug:
            traceback.print_exc()
        warn("jax-entropy: " + str(error).replace("\n", "\\n"))
        return 2
    except KeyboardInterrupt:
        warn(INTERRUPTED)
        return 1
    return 0


def _find(arguments: list[str]) -> tuple[str, Command | None, list[str]]:
    """The command that is named, how it is called, and its arguments; None where a family's help is asked for."""
    name, *rest = arguments
    if name in COMMANDS:
        return f"jax-entropy {name}", COMMANDS[name], rest
    if name not in FAMILIES:
        raise UserError(f"there is no command {name!r}{nearest(name, [*COMMANDS, *FAMILIES])}")
    found = family(name)
    if not rest:
        raise UserError(f"{name} what? say one of {', '.join(found)}")
    word, *rest = rest
    if word in _HELP:
        return name, None, rest
    if word not in found:
        raise UserError(f"{name} what? {word!r} is not known{nearest(word, found)}")
    return f"jax-entropy {name} {word}", found[word], rest


def family(name: str) -> Mapping[str, Command]:
    """The commands of a family by name; what they share is imported for them only."""
    return importlib.import_module(f"jax_entropy.commands.{name}").COMMANDS


def _list(name: str = "") -> str:
    """The help of all commands, or of those of a family."""
    found = family(name) if name else COMMANDS
    does = {word: command.help.splitlines()[0] for word, command in found.items()} | ({} if name else FAMILIES)
    called = f"jax-entropy {name}".strip()
    lines = [f"{called} COMMAND --flag=VALUE …", "", *(f"  {word:12}{text}" for word, text in does.items())]
    lines += ["", f"{called} COMMAND --help says what a command takes, with examples."]
    if not name:
        lines += ["jax-entropy --version says which versions are here.", "", "to begin with:"]
        lines += ["  jax-entropy train --config=quickstart --workdir=runs/quickstart"]
    return "\n".join(lines)


def _version() -> str:
    def of(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    versions = [f"jax_entropy {of('jax_entropy')}", f"Python {platform.python_version()}"]
    return "\n".join([*versions, *(f"{package} {of(package)}" for package in _PACKAGES)])


def _keep_memory() -> None:
    """Starts this program again where its memory is kept: page faults are a sixth to two fifths of a step on CPU."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        with contextlib.suppress(OSError):  # slower, but it runs
            os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)
