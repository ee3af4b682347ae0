"""The command line of private execution: `jax-entropy private WORD --flag=value …`."""

import json
import time
from pathlib import Path
from typing import Any

from jax_entropy.console import console
from jax_entropy.errors import UserError
from jax_entropy.private import engine
from jax_entropy.private.party_commands import ask, keys, serve
from jax_entropy.private.settings import SAMPLING, SETTING, read_sampling, read_setting, read_steps, warn


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
        **SAMPLING,
        **SETTING,
    )
    engine.environment_python()
    from jax_entropy.private.export import export
    from jax_entropy.private.fixed_point import check_range
    from jax_entropy.private.inference import PrivateModel
    from jax_entropy.private.inference import generate as run
    from jax_entropy.workdir import load_run

    setting, choose = read_setting(values), read_sampling(values)()
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
            model,
            ids,
            values.tokens,
            choose=choose,
            end_of_text=loaded.tokenizer.end_of_text,
            reveal=values.reveal,
            notify=text.token,
        )
    print()
    seconds = time.monotonic() - start
    warn(spent(model.accounts, len(new), seconds, setting))
    write_json(values.json, dict(
        architecture=exported.shape.architecture, setting=setting._asdict(), seconds=seconds,
        prompt_tokens=len(ids), tokens=new,
        programs=[dict(name=name, **account._asdict()) for name, account in model.accounts],
    ))  # fmt: skip


def profile(parse: Any) -> None:
    """Bytes, rounds and time of a forward pass by kind of operation, measured."""
    from_run = any(argument.startswith("--workdir") for argument in parse.arguments)
    from_config = any(argument.startswith("--config") for argument in parse.arguments)
    from jax_entropy.private import measure
    from jax_entropy.workdir import Workdir

    more = dict(ablation=(False, "measure every step alone instead"), best=(False, "the best checkpoint, of --workdir"))
    size = {} if from_run or from_config else measure.SIZE | dict(architecture=("", "in the paper's notation"))
    values = parse.flags(config=from_config, workdir=from_run, **measure.MEASURE, **SETTING, **more, **size)
    engine.environment_python()
    setting, network, steps = read_setting(values), measure.read_network(values.network), read_steps(values.without)
    config, variables = _model(values, from_run, from_config)
    if values.ablation:
        rows = measure.print_ablation(config, variables, values.context, setting, console(), warn)
        return write_json(values.json, dict(setting=setting._asdict(), rows=[plain_json(row) for row in rows]))
    measured = measure.run_profile(config, variables, steps, values.context, setting, warn)
    measure.print_profile(measured, network, values.network, console())
    files = [(values.json, values.picture)]
    if from_run:  # where `report` finds them
        workdir = Workdir(values.workdir)
        files.append((workdir.private, workdir.figures / "private.png"))
    for json_file, picture in files:
        write_json(json_file, measured.to_json())
        draw([measured], network, values.network, picture)


def _model(values: Any, from_run: bool, from_config: bool) -> tuple:
    """Config and variables that a command's flags name."""
    from jax_entropy.private.measure import SIZE, random_variables

    if from_run:
        from jax_entropy.workdir import load_run

        loaded = load_run(values.workdir, warn, best=values.best)
        return loaded.model.config, loaded.variables
    if from_config:
        from jax_entropy.config import check, model_config

        check(values.config)
        config = model_config(values.config, values.config.model.vocab_size or values.config.data.vocab_size)
    elif values.architecture:
        from jax_entropy.architecture import architecture

        size = {name: values[name].value for name in SIZE}
        config = architecture(values.architecture, context_length=values.context, **size)
    else:
        raise UserError("profile what? give --workdir, --config=file.py:ARCHITECTURE, or --architecture")
    return config, random_variables(config)


def compare(parse: Any) -> None:
    """Architectures side by side, each exported plainly and optimised: `private compare ARCH ARCH …`."""
    names = [argument for argument in parse.arguments if not argument.startswith("-")]
    parse.arguments = [argument for argument in parse.arguments if argument.startswith("-")]
    from jax_entropy.private import measure

    values = parse.flags(**measure.MEASURE, **SETTING, **measure.SIZE)
    engine.environment_python()
    setting, network = read_setting(values), measure.read_network(values.network)
    profiles = measure.compare(names, values, setting, warn)
    measure.print_comparison(profiles, network, values.network, console())
    write_json(values.json, dict(profiles=[measured.to_json() for measured in profiles]))
    draw(profiles, network, values.network, values.picture)


def predict(parse: Any) -> None:
    """Bytes and rounds of large models without running them: `private predict ARCH ARCH …`."""
    names = [argument for argument in parse.arguments if not argument.startswith("-")]
    parse.arguments = [argument for argument in parse.arguments if argument.startswith("-")]
    from jax_entropy.architecture import architecture
    from jax_entropy.private import measure

    values = parse.flags(
        num_layers=(12, "blocks"), num_heads=(12, "heads in a block"), model_dim=(768, "width"),
        vocab_size=(50257, "entries of the tokenizer"), context=(128, "tokens read"),
        network=measure.MEASURE["network"],
        json=measure.MEASURE["json"], **SETTING,
    )  # fmt: skip
    if not names:
        raise UserError("predict what? give architectures, like: private predict SM+LN+G 'EReg(SM(t)+ScFuFFN)'")
    size = {name: values[name].value for name in measure.SIZE}
    configs = [architecture(name, context_length=values.context, **size) for name in names]
    setting, network = read_setting(values), measure.read_network(values.network)
    rows = measure.print_predictions(configs, setting, network, values.network, console(), warn)
    write_json(values.json, dict(setting=setting._asdict(), num_tokens=values.context, rows=rows))


def calibrate(parse: Any) -> None:
    """Measures the coefficients that `predict` uses under a setting, in some minutes."""
    from jax_entropy.private import measure

    measure.calibrate(read_setting(parse.flags(**SETTING)), warn)


def draw(profiles: list, network: Any, network_name: str, file: str | Path) -> None:
    """The picture, where one is asked for."""
    if file:
        from jax_entropy.private.drawing import draw_profiles

        draw_profiles(profiles, network, network_name, file)
        print(f"wrote {file}")


def plain_json(value: Any) -> Any:
    """Named tuples as objects, all the way down."""
    if hasattr(value, "_asdict"):
        return {name: plain_json(part) for name, part in value._asdict().items()}
    return value


WORDS = {
    function.__name__: function
    for function in (setup, generate, profile, compare, predict, calibrate, keys, serve, ask)
}


def private(parse: Any) -> None:
    """A trained model under secure computation: `private setup`, `generate`, `profile`, `compare`, `serve`, `ask`, …"""
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
    parties = " / ".join(map(str, range(len(account.bytes))))
    return f"{each} MB sent by party {parties}, {account.rounds:.0f} rounds, {account.seconds:.2f} s"


def write_json(file: str | Path, content: dict) -> None:
    if file:
        try:
            Path(file).write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json={file} cannot be written: {error.strerror}") from None
