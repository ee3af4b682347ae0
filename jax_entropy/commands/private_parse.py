"""Reads the arguments of a command: a word, then absl flags and an ml_collections config; errors are a sentence."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from jax_entropy.errors import UserError, nearest


class Parse:
    """The arguments of one command, and how it reads its flags."""

    def __init__(self, command: str, description: str, arguments: Sequence[str]):
        self.command, self.description, self.arguments = command, description, list(arguments)

    def word(self, choices: Mapping[str, str]) -> str:
        """Takes the word that follows the command. Raises UserError if none of `choices`, which say what each does."""
        if {"-h", "--help"} & set(self.arguments[:1]):
            print(f"jax-entropy {self.command}: {self.description}\n")
            for word, does in choices.items():
                print(f"  {word:10}  {does.splitlines()[0]}")
            print(f"\njax-entropy {self.command} WORD --help lists its flags")
            raise SystemExit(0)
        if not self.arguments:
            raise UserError(f"{self.command} what? say one of {', '.join(choices)}")
        word = self.arguments.pop(0)
        if word not in choices:
            raise UserError(f"{self.command} what? {word!r} is not known{nearest(word, choices)}")
        self.description = choices[word]
        return word

    def flags(self, config: bool = False, workdir: bool = False, **defaults: tuple) -> flags.FlagValues:
        """Flags by name with (default, help); `config` and `workdir` are required where asked for.

        Raises UserError for an unknown flag, a value of the wrong type, or a config that does not load.
        """
        values = flags.FlagValues()
        argv = [f"jax-entropy {self.command}", *self.arguments]
        stored = self._stored_config() if config and workdir else None
        if stored:
            config_flags.DEFINE_config_dict(
                "config", stored, help_string="of the run in --workdir", flag_values=values, sys_argv=argv
            )
        elif config:
            config_flags.DEFINE_config_file(
                "config", None, "file.py or file.py:ARCHITECTURE", flag_values=values, sys_argv=argv
            )
        if workdir:
            flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
        define = {
            bool: flags.DEFINE_bool,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            str: flags.DEFINE_string,
        }
        for name, (default, text) in defaults.items():
            define[type(default)](name, default, text, flag_values=values)
        if {"-h", "--help"} & set(self.arguments):
            print(f"jax-entropy {self.command}: {self.description}\n{values.get_help()}")
            raise SystemExit(0)
        if config and not stored:
            self._check_config_file()
        try:
            extra = values(argv)[1:]
            given = {name: name in values and values[name].value for name in ("config", "workdir")}
        except UserError:
            raise
        except flags.UnrecognizedFlagError as error:
            raise UserError(f"there is no flag --{error.flagname}{nearest(error.flagname, values)}") from None
        except flags.Error as error:
            raise UserError(" ".join(str(error).split())) from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(" ".join(str(error.args[0] if error.args else error).split())) from None
        except (OSError, ImportError, SyntaxError) as error:
            raise UserError(f"the config file does not load: {error}") from None
        if extra:
            raise UserError(f"the argument {extra[0]!r} is not understood; flags are written --name=value")
        for name, value in given.items():
            if name in values and not value:
                raise UserError(f"--{name} is missing")
        return values

    def _stored_config(self) -> ConfigDict | None:
        """Of the run in --workdir, where no --config is given."""
        given = dict(argument.partition("=")[::2] for argument in self.arguments)
        if "--config" in given or "--workdir" not in given:
            return None
        from jax_entropy.runs.workdir import Workdir

        workdir = Workdir(given["--workdir"])
        return workdir.read_config() if workdir.exists() else None

    def _check_config_file(self) -> None:
        """Raises UserError if --config names no file."""
        for argument in self.arguments:
            file = Path(argument.removeprefix("--config=").partition(":")[0])
            if argument.startswith("--config=") and not file.is_file():
                there = [str(path) for path in file.parent.glob("*.py")] or ["configs/quickstart.py"]
                raise UserError(f"there is no config file {str(file)!r}{nearest(file, there)}")
