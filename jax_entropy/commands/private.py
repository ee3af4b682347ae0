"""The command line of private execution: `jax-entropy private WORD --flag=value …`."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from jax_entropy.commands.console import console
from jax_entropy.commands.parties import ask, keys, serve
from jax_entropy.commands.private_flags import (
    MEASURE,
    SAMPLING,
    SETTING,
    SIZE,
    WITHOUT,
    Streamed,
    check_outputs,
    read_rewrites,
    read_sampling,
    read_setting,
    warn,
    write_json,
)
from jax_entropy.errors import UserError
from jax_entropy.private.cost.account import read_network
from jax_entropy.private.engine import environment
from jax_entropy.private.engine.engine import Account, Engine, Setting
from jax_entropy.private.engine.environment import environment_python


def setup(parse: Any) -> None:
    """Makes the engine's own environment, once."""
    values = parse.flags(check=(False, "only say what is there"), force=(False, "make it anew"))
    found = environment.check() if values.check else environment.setup(print, force=values.force)
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
        **WITHOUT,
    )
    environment_python()
    setting, rewrites = read_setting(values), read_rewrites(values.without)
    check_outputs(values)
    choose = read_sampling(values)()
    from jax_entropy.private.program.export import export
    from jax_entropy.private.program.fixed_point import check_range
    from jax_entropy.private.session.inference import PrivateModel, check_request
    from jax_entropy.private.session.inference import generate as run
    from jax_entropy.runs.load import load_run

    loaded = load_run(values.workdir, warn, best=values.best)
    exported = export(loaded.model.config, loaded.variables, rewrites)
    ids, start = loaded.tokenizer.encode(values.prompt), time.monotonic()
    check_request(exported.blueprint, ids, values.tokens, values.reveal)
    check_range(exported, ids, setting)
    text = Streamed(loaded.tokenizer, values.prompt)
    with Engine(setting) as started:
        warn(f"sharing {sum(value.size for value in exported.weights.values()):,} weights")
        model = PrivateModel.of(started, exported)
        warn(f"reading {len(ids)} tokens")
        new = run(
            model,
            ids,
            values.tokens,
            choose=choose,
            end_of_text=loaded.tokenizer.end_of_text,
            reveal=values.reveal,
            notify=text.token,
        )
    text.end()
    seconds = time.monotonic() - start
    warn(spent(model.accounts, len(new), seconds, setting))
    write_json(values.json, dict(
        architecture=str(exported.blueprint.config), setting=setting, seconds=seconds,
        prompt_tokens=len(ids), tokens=new,
        programs=[dict(name=name, **account._asdict()) for name, account in model.accounts],
    ))  # fmt: skip


def profile(parse: Any) -> None:
    """Bytes, rounds and time of a forward pass by kind of operation, measured."""
    sources = ("workdir", "config", "architecture")
    given = [name for name in sources if any(word.partition("=")[0] == f"--{name}" for word in parse.arguments)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} exclude each other: each names a model")
    from jax_entropy.commands.private_tables import print_ablation, print_profile
    from jax_entropy.private.cost.profile import measure

    more = dict(
        ablation=(False, "measure every rewrite alone instead"), best=(False, "the best checkpoint, of --workdir")
    )
    if given not in (["workdir"], ["config"]):
        more |= SIZE | dict(architecture=("", "in the paper's notation"))
    values = parse.flags(
        config=given == ["config"], workdir=given == ["workdir"], **MEASURE, **SETTING, **WITHOUT, **more
    )
    environment_python()
    setting, network = read_setting(values), read_network(values.network)
    rewrites = read_rewrites(values.without)
    check_outputs(values)
    if values.ablation and values.picture:
        raise UserError("--ablation draws no --picture")
    if values.ablation and values.without:
        raise UserError("--ablation measures every rewrite, and goes without --without")
    config, variables = _model(values, given, setting)
    if values.ablation:
        rows = _ablation(config, variables, values.context, setting)
        print_ablation(rows, console())
        return write_json(values.json, dict(setting=setting, rows=rows))
    measured = measure(config, variables, rewrites, values.context, setting, warn)
    stored = measured.to_json(values.network)
    print_profile(measured, network, values.network, console())
    files = [(values.json, values.picture)]
    if given == ["workdir"]:  # where `report` finds them
        from jax_entropy.runs.workdir import Workdir

        workdir = Workdir(values.workdir)
        workdir.figures.mkdir(exist_ok=True)
        files.append((workdir.private, workdir.figures / "private.png"))
    for json_file, picture in files:
        write_json(json_file, stored)
        draw([stored], picture)


def _ablation(config: Any, variables: Any, num_tokens: int, setting: Setting) -> list:
    """Every rewrite alone and all together, after a check of the plain export's range."""
    from jax_entropy.private.cost.ablation import ablation
    from jax_entropy.private.program.blueprint import PLAIN
    from jax_entropy.private.program.export import export
    from jax_entropy.private.program.fixed_point import check_range, random_tokens

    tokens = random_tokens(config.vocab_size, num_tokens)
    check_range(export(config, variables, PLAIN), tokens, setting)
    with Engine(setting) as engine:
        return ablation(engine, lambda rewrites: export(config, variables, rewrites), tokens, warn)


def _model(values: Any, given: list[str], setting: Setting) -> tuple:
    """Config and variables of what a command's flags name; its size is checked before there are any."""
    from jax_entropy.private.cost.memory import check_size
    from jax_entropy.private.cost.profile import random_variables

    if given == ["workdir"]:
        from jax_entropy.runs.load import load_run

        loaded = load_run(values.workdir, warn, best=values.best)
        if not os.access(values.workdir, os.W_OK):
            raise UserError(f"--workdir={values.workdir} cannot be written, where the profile is left for `report`")
        check_size(loaded.model.config, values.context, setting, values.ablation or values.without == "all")
        return loaded.model.config, loaded.variables
    if given == ["config"]:
        from jax_entropy.config import check, model_config
        from jax_entropy.data.tokenizer import vocabulary

        check(values.config)
        config = model_config(values.config, vocabulary(values.config))
    elif values.architecture:
        from jax_entropy.architecture import architecture

        size = {name: values[name].value for name in SIZE}
        config = architecture(values.architecture, context_length=values.context, **size)
    else:
        raise UserError("profile what? give --workdir, --config=file.py:ARCHITECTURE, or --architecture")
    check_size(config, values.context, setting, values.ablation or values.without == "all")
    return config, random_variables(config)


def compare(parse: Any) -> None:
    """Architectures side by side, each exported plainly and optimised: `private compare ARCH ARCH …`."""
    names = [argument for argument in parse.arguments if not argument.startswith("-")]
    parse.arguments = [argument for argument in parse.arguments if argument.startswith("-")]
    from jax_entropy.architecture import architecture
    from jax_entropy.commands.private_tables import print_comparison
    from jax_entropy.private.cost.memory import check_size
    from jax_entropy.private.cost.profile import measure, random_variables
    from jax_entropy.private.program.blueprint import PLAIN, Rewrites

    values = parse.flags(**MEASURE, **SETTING, **SIZE)
    environment_python()
    setting, network = read_setting(values), read_network(values.network)
    check_outputs(values)
    if not names:
        raise UserError("compare what? give architectures, like: private compare SM+LN+G 'EReg(SM(t)+ScFuFFN)'")
    size = {name: values[name].value for name in SIZE} | dict(context_length=values.context)
    configs = [architecture(name, **size) for name in names]
    for config in configs:
        check_size(config, values.context, setting, plain=True)
    profiles = []
    for config in configs:
        variables = random_variables(config)
        for rewrites in (PLAIN, Rewrites()):
            start, name = time.monotonic(), f"{config}, {rewrites}"
            told = lambda line, name=name: warn(f"{name}: {line}")  # noqa: E731
            profiles.append(measure(config, variables, rewrites, values.context, setting, told))
            warn(f"{name}: measured in {time.monotonic() - start:.0f} s")
    print_comparison(profiles, network, values.network, console())
    stored = [measured.to_json(values.network) for measured in profiles]
    write_json(values.json, dict(profiles=stored))
    draw(stored, values.picture)


def predict(parse: Any) -> None:
    """Bytes and rounds of large models without running them: `private predict ARCH ARCH …`."""
    names = [argument for argument in parse.arguments if not argument.startswith("-")]
    parse.arguments = [argument for argument in parse.arguments if argument.startswith("-")]
    from jax_entropy.architecture import architecture
    from jax_entropy.commands.private_tables import print_predictions
    from jax_entropy.private.cost.model import count_by_layers, is_known, predict_total

    values = parse.flags(
        num_layers=(12, "blocks"), num_heads=(12, "heads in a block"), model_dim=(768, "width"),
        vocab_size=(50257, "entries of the tokenizer"), context=(128, "tokens read"),
        network=MEASURE["network"],
        json=MEASURE["json"], **SETTING,
    )  # fmt: skip
    if not names:
        raise UserError("predict what? give architectures, like: private predict SM+LN+G 'EReg(SM(t)+ScFuFFN)'")
    size = {name: values[name].value for name in SIZE}
    configs = [architecture(name, context_length=values.context, **size) for name in names]
    setting, network = read_setting(values), read_network(values.network)
    check_outputs(values)
    if not (known := is_known(setting)):
        environment_python()
        warn(f"no coefficients for this setting of {setting.protocol}: two blocks are measured, and counted by layers")
    predicted = []
    for config in configs:
        for plain in (True, False):
            if known:
                total = predict_total(config, values.context, setting, plain)
            else:
                total = count_by_layers(config, setting, plain, warn)
            predicted.append((config, "plain" if plain else "optimised", total))
    print_predictions(predicted, network, values.network, console())
    rows = [
        dict(architecture=str(config), plain=exported == "plain", bytes=total.bytes, rounds=total.rounds)
        for config, exported, total in predicted
    ]
    write_json(values.json, dict(setting=setting, num_tokens=values.context, rows=rows))


def precision(parse: Any) -> None:
    """Fraction bits and forms of the exponential on a run's held-out text: bytes, rounds, errors, and the cheapest."""
    values = parse.flags(
        workdir=True, context=(64, "tokens read"), tolerance=(0.001, "of the largest logit: the largest error allowed"),
        best=(False, "the best checkpoint by validation loss instead of the newest"),
        protocol=SETTING["protocol"], json=("", "file for everything that was measured"), **WITHOUT,
    )  # fmt: skip
    environment_python()
    setting, rewrites = Setting(protocol=values.protocol).check(), read_rewrites(values.without)
    if not values.tolerance > 0:
        raise UserError(f"--tolerance={values.tolerance} must be positive")
    check_outputs(values)
    from jax_entropy.commands.private_tables import print_precision
    from jax_entropy.private.cost.memory import check_size
    from jax_entropy.private.cost.precision import held_out_tokens, measure_precision
    from jax_entropy.private.program.export import export
    from jax_entropy.runs.load import load_run

    loaded = load_run(values.workdir, warn, best=values.best)
    check_size(loaded.model.config, values.context, setting, values.without == "all")
    exported = export(loaded.model.config, loaded.variables, rewrites)
    tokens = held_out_tokens(loaded, values.context, warn)
    with Engine(setting) as started:
        rows, largest = measure_precision(started, exported, tokens, warn)
    print_precision(rows, largest, values.tolerance, console())
    measured = [row for row in rows if not row.refused]
    write_json(values.json, dict(largest_logit=largest, num_tokens=len(tokens), rows=measured))


def calibrate(parse: Any) -> None:
    """Measures the coefficients that `predict` uses under a setting: a quarter of an hour, an hour under cheetah."""
    from jax_entropy.private.cost import model

    model.calibrate(read_setting(parse.flags(**SETTING)), warn)


def draw(profiles: list[dict[str, Any]], file: str | Path) -> None:
    """The picture of what `Profile.to_json` gave, where one is asked for."""
    if file:
        from jax_entropy.report.private import private_costs

        try:
            private_costs(profiles).savefig(file)
        except (OSError, ValueError) as error:  # ValueError: a format that is not known
            raise UserError(f"the picture {str(file)!r} cannot be written: {error}") from None
        print(f"wrote {file}")


WORDS = {
    function.__name__: function
    for function in (setup, generate, profile, compare, predict, precision, calibrate, keys, serve, ask)
}


def private(parse: Any) -> None:
    """A trained model under secure computation: `private setup`, `generate`, `profile`, `compare`, `serve`, `ask`, …"""
    word = parse.word({name: function.__doc__ for name, function in WORDS.items()})
    # engines are closed when these end the command; nohup's choice is left alone
    ends = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in ends]
    try:
        WORDS[word](parse)
    finally:
        for number, handler in zip(ends, before, strict=True):
            signal.signal(number, handler)


def spent(accounts: list, num_tokens: int, seconds: float, setting: Setting) -> str:
    """What generating took, in two lines."""
    prefill = next(account for name, account in accounts if name.startswith("prefill"))
    names = [name for name, _ in accounts]
    first = names.index("step") if "step" in names else len(names)
    rest = [account for name, account in accounts[first:] if name in ("step", "choose")]
    line = f"{num_tokens} tokens in {seconds:.1f} s under {setting.protocol}; the prompt {describe(prefill)}"
    if rest:
        steps = names.count("step")
        line += f"\na token {describe(Account(*(_mean(values, steps) for values in zip(*rest, strict=True))))}"
    return line


def _mean(values: tuple, count: int) -> Any:
    if isinstance(values[0], tuple):
        return tuple(sum(column) / count for column in zip(*values, strict=True))
    return sum(values) / count


def describe(account: Account) -> str:
    """Bytes of each party, rounds and time in a phrase."""
    each = " / ".join(f"{count / 1e6:,.2f}" for count in account.bytes)
    parties = " / ".join(map(str, range(len(account.bytes))))
    return f"{each} MB sent by party {parties}, {account.rounds:.0f} rounds, {account.seconds:.2f} s"
