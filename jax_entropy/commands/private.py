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
    SAMPLING,
    SETTING,
    STEPS,
    Streamed,
    check_outputs,
    read_sampling,
    read_setting,
    read_steps,
    warn,
    write_json,
)
from jax_entropy.errors import UserError
from jax_entropy.private.cost.profile import read_network
from jax_entropy.private.engine import engine


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
        **STEPS,
    )
    engine.environment_python()
    setting, steps = read_setting(values), read_steps(values.without)
    check_outputs(values)
    choose = read_sampling(values)()
    from jax_entropy.private.program.export import export
    from jax_entropy.private.program.fixed_point import check_range
    from jax_entropy.private.session.inference import PrivateModel, check_request
    from jax_entropy.private.session.inference import generate as run
    from jax_entropy.runs.load import load_run

    loaded = load_run(values.workdir, warn, best=values.best)
    exported = export(loaded.model.config, loaded.variables, steps)
    ids, start = loaded.tokenizer.encode(values.prompt), time.monotonic()
    check_request(exported.shape, ids, values.tokens, values.reveal)
    check_range(exported, ids, setting)
    text = Streamed(loaded.tokenizer, values.prompt)
    with engine.Engine(setting) as started:
        model = PrivateModel(started, exported.shape, {name: value.shape for name, value in exported.weights.items()})
        warn(f"sharing {sum(value.size for value in exported.weights.values()):,} weights")
        model.share_weights(exported.weights)
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
        architecture=exported.shape.architecture, setting=setting._asdict(), seconds=seconds,
        prompt_tokens=len(ids), tokens=new,
        programs=[dict(name=name, **account._asdict()) for name, account in model.accounts],
    ))  # fmt: skip


def profile(parse: Any) -> None:
    """Bytes, rounds and time of a forward pass by kind of operation, measured."""
    sources = ("workdir", "config", "architecture")
    given = [name for name in sources if any(word.partition("=")[0] == f"--{name}" for word in parse.arguments)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} exclude each other: each names a model")
    from jax_entropy.private.cost import measure

    more = dict(ablation=(False, "measure every step alone instead"), best=(False, "the best checkpoint, of --workdir"))
    if given not in (["workdir"], ["config"]):
        more |= measure.SIZE | dict(architecture=("", "in the paper's notation"))
    values = parse.flags(
        config=given == ["config"], workdir=given == ["workdir"], **measure.MEASURE, **SETTING, **STEPS, **more
    )
    engine.environment_python()
    setting, network, steps = read_setting(values), read_network(values.network), read_steps(values.without)
    check_outputs(values)
    if values.ablation and values.picture:
        raise UserError("--ablation draws no --picture")
    if values.ablation and values.without:
        raise UserError("--ablation measures every step, and goes without --without")
    config, variables = _model(values, given, setting)
    if values.ablation:
        rows = measure.print_ablation(config, variables, values.context, setting, console(), warn)
        return write_json(values.json, dict(setting=setting._asdict(), rows=[plain_json(row) for row in rows]))
    measured = measure.run_profile(config, variables, steps, values.context, setting, warn)
    measure.print_profile(measured, network, values.network, console())
    files = [(values.json, values.picture)]
    if given == ["workdir"]:  # where `report` finds them
        from jax_entropy.runs.workdir import Workdir

        workdir = Workdir(values.workdir)
        workdir.figures.mkdir(exist_ok=True)
        files.append((workdir.private, workdir.figures / "private.png"))
    for json_file, picture in files:
        write_json(json_file, measured.to_json())
        draw([measured], network, values.network, picture)


def _model(values: Any, given: list[str], setting: engine.Setting) -> tuple:
    """Config and variables of what a command's flags name; its size is checked before there are any."""
    from jax_entropy.private.cost.measure import SIZE, check_size, random_variables

    if given == ["workdir"]:
        from jax_entropy.runs.load import load_run

        loaded = load_run(values.workdir, warn, best=values.best)
        if not os.access(values.workdir, os.W_OK):
            raise UserError(f"--workdir={values.workdir} cannot be written, where the profile is left for `report`")
        check_size(loaded.model.config, values.context, setting, values.ablation or values.without == "all")
        return loaded.model.config, loaded.variables
    if given == ["config"]:
        from jax_entropy.config import check, model_config

        check(values.config)
        config = model_config(values.config, values.config.model.vocab_size or values.config.data.vocab_size)
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
    from jax_entropy.private.cost import measure

    values = parse.flags(**measure.MEASURE, **SETTING, **measure.SIZE)
    engine.environment_python()
    setting, network = read_setting(values), read_network(values.network)
    check_outputs(values)
    profiles = measure.compare(names, values, setting, warn)
    measure.print_comparison(profiles, network, values.network, console())
    write_json(values.json, dict(profiles=[measured.to_json() for measured in profiles]))
    draw(profiles, network, values.network, values.picture)


def predict(parse: Any) -> None:
    """Bytes and rounds of large models without running them: `private predict ARCH ARCH …`."""
    names = [argument for argument in parse.arguments if not argument.startswith("-")]
    parse.arguments = [argument for argument in parse.arguments if argument.startswith("-")]
    from jax_entropy.architecture import architecture
    from jax_entropy.private.cost import measure

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
    setting, network = read_setting(values), read_network(values.network)
    check_outputs(values)
    rows = measure.print_predictions(configs, setting, network, values.network, console(), warn)
    write_json(values.json, dict(setting=setting._asdict(), num_tokens=values.context, rows=rows))


def precision(parse: Any) -> None:
    """Fraction bits and forms of the exponential on a run's held-out text: bytes, rounds, errors, and the cheapest."""
    values = parse.flags(
        workdir=True, context=(64, "tokens read"), tolerance=(0.001, "of the largest logit: the largest error allowed"),
        best=(False, "the best checkpoint by validation loss instead of the newest"),
        protocol=SETTING["protocol"], json=("", "file for everything that was measured"), **STEPS,
    )  # fmt: skip
    engine.environment_python()
    setting, steps = engine.Setting(protocol=values.protocol).check(), read_steps(values.without)
    if not values.tolerance > 0:
        raise UserError(f"--tolerance={values.tolerance} must be positive")
    check_outputs(values)
    from jax_entropy.private.cost import precision as measuring
    from jax_entropy.private.cost.measure import check_size
    from jax_entropy.private.program.export import export
    from jax_entropy.runs.load import load_run

    loaded = load_run(values.workdir, warn, best=values.best)
    check_size(loaded.model.config, values.context, setting, values.without == "all")
    exported = export(loaded.model.config, loaded.variables, steps)
    tokens = measuring.held_out_tokens(loaded, values.context, warn)
    rows, largest = measuring.measure_precision(exported, tokens, setting, warn)
    measuring.print_precision(rows, largest, values.tolerance, console())
    write_json(values.json, dict(largest_logit=largest, num_tokens=len(tokens), rows=measuring.to_json(rows)))


def calibrate(parse: Any) -> None:
    """Measures the coefficients that `predict` uses under a setting: a quarter of an hour, an hour under cheetah."""
    from jax_entropy.private.cost import measure

    measure.calibrate(read_setting(parse.flags(**SETTING)), warn)


def draw(profiles: list, network: Any, network_name: str, file: str | Path) -> None:
    """The picture, where one is asked for."""
    if file:
        from jax_entropy.report.private import draw_profiles

        draw_profiles(profiles, network, network_name, file)
        print(f"wrote {file}")


def plain_json(value: Any) -> Any:
    """Named tuples as objects, all the way down."""
    if hasattr(value, "_asdict"):
        return {name: plain_json(part) for name, part in value._asdict().items()}
    return value


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


def spent(accounts: list, num_tokens: int, seconds: float, setting: engine.Setting) -> str:
    """What generating took, in two lines."""
    prefill = next(account for name, account in accounts if name.startswith("prefill"))
    names = [name for name, _ in accounts]
    first = names.index("step") if "step" in names else len(names)
    rest = [account for name, account in accounts[first:] if name in ("step", "choose")]
    line = f"{num_tokens} tokens in {seconds:.1f} s under {setting.protocol}; the prompt {describe(prefill)}"
    if rest:
        steps = names.count("step")
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
