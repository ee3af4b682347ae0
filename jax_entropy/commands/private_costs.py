"""What private execution costs, as commands: measured, compared, predicted, and how few digits do."""

import itertools
import os
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from jax_entropy.commands.census import ARCHITECTURE
from jax_entropy.commands.console import console, warn, write_json
from jax_entropy.commands.parse import BEST, CONFIG, JSON, WORKDIR, Flag, Names, OneOf, command
from jax_entropy.commands.private_flags import (
    EMBEDDING,
    LOGITS,
    MEASURE,
    MEMORY,
    NETWORK,
    PRICES,
    PROTOCOL,
    SETTING,
    SIZE,
    WITHOUT,
    draw,
    read_models,
    read_rewrites,
    read_setting,
    size_flags,
    tokens_read,
)
from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Engine, Setting
from jax_entropy.private.engine.environment import environment_python

if TYPE_CHECKING:
    from jax_entropy.architecture import ModelConfig
    from jax_entropy.private.cost.memory import Layout

ARCHITECTURES = Names("architectures", "in the paper's notation, like SM+LN+G 'EReg(SM(t)+ScFuFFN)'")


@command(
    OneOf(((WORKDIR, BEST), (CONFIG,), (ARCHITECTURE, *SIZE))),
    tokens_read(32),
    Flag("ablation", False, "measure every rewrite instead: added alone to none, and left out alone of all"),
    WITHOUT,
    LOGITS,
    EMBEDDING,
    *MEASURE,
    examples=[
        "private profile runs/quickstart",
        "private profile --architecture=SM+LN+G --context_length=64 --protocol=cheetah --picture=profile.png",
    ],
)
def profile(values: Namespace) -> None:
    """Bytes, rounds and time of a forward pass by kind of operation, measured."""
    from jax_entropy.commands.private_tables import print_ablation, print_profile
    from jax_entropy.private.cost.account import read_network
    from jax_entropy.private.cost.profile import measure

    environment_python()
    setting, network = read_setting(values), read_network(values.network)
    rewrites = read_rewrites(values.without)
    for name in ("picture", "without", "logits", "embedding", "network") if values.ablation else ():
        if name in values.given:
            raise UserError(f"--ablation measures every rewrite, and goes without --{name}")
    config, variables, of = _model(values, setting)
    if values.ablation:
        rows = _ablation(config, variables, values.context_length, setting, of)
        print_ablation(rows, console(values.json))
        return write_json(values.json, dict(setting=setting, rows=rows))
    measured = measure(
        config, variables, rewrites, values.context_length, setting, warn, values.logits, values.embedding, of
    )
    stored = measured.to_json(values.network)
    print_profile(measured, network, values.network, console(values.json))
    files = [(values.json, values.picture)]
    if values.source == "workdir":  # where `report` finds them
        from jax_entropy.runs.workdir import Workdir

        workdir = Workdir(values.workdir)
        workdir.figures.mkdir(exist_ok=True)
        files.append((workdir.private, workdir.figures / "private.png"))
    for json_file, picture in files:
        write_json(json_file, stored)
        draw([stored], picture)


def _ablation(config: "ModelConfig", variables: Any, num_tokens: int, setting: Setting, of: "Layout") -> list:
    """Every rewrite alone and all together, after a check of the plain export's range."""
    from jax_entropy.private.cost.ablation import ablation
    from jax_entropy.private.program.blueprint import PLAIN, Rewrites
    from jax_entropy.private.program.export import Export, export
    from jax_entropy.private.program.fixed_point import check_range, random_tokens

    def exported(rewrites: Rewrites) -> Export:
        return export(config, variables, rewrites, setting, piece=of.piece)

    tokens = random_tokens(config.vocab_size, num_tokens)
    check_range(exported(PLAIN), tokens, setting)
    with Engine(setting) as engine:
        return ablation(engine, exported, tokens, warn)


def _model(values: Namespace, setting: Setting) -> "tuple[ModelConfig, Any, Layout]":
    """Config and variables of what a command's flags name, and the layout that fits, found before there are any."""
    from jax_entropy.private.cost.memory import layout, read_memory
    from jax_entropy.private.cost.profile import random_variables

    def fitting(config: "ModelConfig") -> "Layout":
        return layout(
            config, values.context_length, setting, values.ablation or values.without == "all",
            limit=read_memory(values.memory), logits=values.logits, embedding=values.embedding,
            streamable=not values.ablation,
        )  # fmt: skip

    if values.source == "workdir":
        from jax_entropy.runs.load import load_run

        loaded = load_run(values.workdir, warn, best=values.best)
        if not os.access(values.workdir, os.W_OK):
            raise UserError(f"--workdir={values.workdir} cannot be written, where the profile is left for `report`")
        return loaded.model.config, loaded.variables, fitting(loaded.model.config)
    if values.source == "config":
        from jax_entropy.config import check, model_config
        from jax_entropy.data.tokenizer import vocabulary

        check(values.config)
        config = model_config(values.config, vocabulary(values.config))
    else:
        [config] = read_models([values.architecture], values)
    of = fitting(config)
    return config, random_variables(config), of


@command(
    ARCHITECTURES,
    *SIZE,
    tokens_read(32),
    LOGITS,
    EMBEDDING,
    PRICES,
    *MEASURE,
    examples=["private compare SM+LN+G 'EReg(SM(t)+ScFuFFN)' --picture=costs.png"],
)
def compare(values: Namespace) -> None:
    """Architectures side by side, each exported plainly and optimised."""
    environment_python()
    from jax_entropy.commands.private_tables import print_comparison
    from jax_entropy.private.cost.account import read_network
    from jax_entropy.private.cost.memory import layout, read_memory
    from jax_entropy.private.cost.prices import read_price
    from jax_entropy.private.cost.profile import measure, random_variables
    from jax_entropy.private.program.blueprint import PLAIN, Rewrites

    setting, network, price = read_setting(values), read_network(values.network), read_price(values.prices)
    if not values.architectures:
        raise UserError("compare what? give architectures, like: private compare SM+LN+G 'EReg(SM(t)+ScFuFFN)'")
    configs = read_models(values.architectures, values)
    fits = dict(limit=read_memory(values.memory), logits=values.logits, embedding=values.embedding, streamable=True)
    layouts = [layout(config, values.context_length, setting, True, **fits) for config in configs]
    profiles = []
    for config, of in zip(configs, layouts, strict=True):
        variables = random_variables(config)
        for rewrites in (PLAIN, Rewrites()):
            start, name = time.monotonic(), f"{config}, {rewrites}"
            told = lambda line, name=name: warn(f"{name}: {line}")  # noqa: E731
            measured = measure(
                config, variables, rewrites, values.context_length, setting, told, values.logits, values.embedding, of
            )
            profiles.append(measured)
            warn(f"{name}: measured in {time.monotonic() - start:.0f} s")
    print_comparison(profiles, network, values.network, price, console(values.json))
    stored = [measured.to_json(values.network) for measured in profiles]
    write_json(values.json, dict(profiles=stored))
    draw(stored, values.picture)


@command(
    ARCHITECTURES,
    *size_flags(12, 12, 768, 50257),
    tokens_read(128),
    EMBEDDING,
    NETWORK,
    PRICES,
    JSON,
    *SETTING,
    examples=["private predict SM+LN+G SM+LN+R --context_length=512"],
)
def predict(values: Namespace) -> None:
    """Bytes and rounds of large models, GPT-2's size unless told otherwise, without running them."""
    if not values.architectures:
        raise UserError("predict what? give architectures, like: private predict SM+LN+G 'EReg(SM(t)+ScFuFFN)'")
    from jax_entropy.commands.private_tables import Predicted, print_predictions
    from jax_entropy.private.cost.account import read_network
    from jax_entropy.private.cost.model import count_by_layers, is_known, predict_total
    from jax_entropy.private.cost.prices import read_price

    configs = read_models(values.architectures, values)
    setting, network, price = read_setting(values), read_network(values.network), read_price(values.prices)
    if not (known := is_known(setting)):
        environment_python()
        warn(f"no coefficients for this setting of {setting.protocol}: a block of each kind is measured, and counted")
    predicted = []
    for config in configs:
        for plain, logits in itertools.product((True, False), ("every", "last") if known else ("every",)):
            if known:
                total = predict_total(config, values.context_length, setting, plain, logits, values.embedding)
            else:
                total = count_by_layers(config, setting, plain, warn, values.embedding)
            predicted.append(Predicted(config, plain, logits, total))
    print_predictions(
        predicted, values.context_length, values.embedding, network, values.network, price, console(values.json)
    )
    rows = [dict(row._asdict() | row.total._asdict(), architecture=str(row.config)) for row in predicted]
    for row in rows:
        del row["config"], row["total"], row["seconds"], row["messages"]
    write_json(
        values.json,
        dict(setting=setting, num_tokens=values.context_length, embedding=values.embedding, rows=rows),
    )


@command(
    WORKDIR,
    BEST,
    tokens_read(64),
    Flag("tolerance", 0.001, "of the largest logit: the largest error allowed"),
    Flag("per_layer", False, "squarings of the exponential layer by layer instead"),
    PROTOCOL,
    WITHOUT,
    MEMORY,
    JSON,
    examples=["private precision runs/quickstart --tolerance=0.01", "private precision runs/quickstart --per_layer"],
)
def precision(values: Namespace) -> None:
    """Fraction bits and forms of the exponential on a run's held-out text: bytes, rounds, errors, and the cheapest."""
    environment_python()
    setting, rewrites = Setting(protocol=values.protocol).check(), read_rewrites(values.without)
    if not values.tolerance > 0:
        raise UserError(f"--tolerance={values.tolerance} must be positive")
    from jax_entropy.commands.private_tables import print_precision
    from jax_entropy.private.cost.memory import layout, read_memory
    from jax_entropy.private.cost.precision import held_out_tokens, measure_by_layer, measure_precision
    from jax_entropy.private.program.export import export
    from jax_entropy.runs.load import load_run

    loaded = load_run(values.workdir, warn, best=values.best)
    config, plain, limit = loaded.model.config, values.without == "all", read_memory(values.memory)
    of = layout(config, values.context_length, setting, plain, limit=limit)
    exported = export(config, loaded.variables, rewrites, setting, piece=of.piece)
    tokens = held_out_tokens(loaded, values.context_length, warn)
    with Engine(setting) as started:
        if values.per_layer:
            rows, largest = measure_by_layer(started, exported, tokens, values.tolerance, warn)
        else:
            rows, largest = measure_precision(started, exported, tokens, warn)
    print_precision(rows, largest, values.tolerance, console(values.json))
    measured = [row for row in rows if not row.refused]
    write_json(values.json, dict(largest_logit=largest, num_tokens=len(tokens), rows=measured))


@command(*SETTING, examples=["private calibrate --protocol=aby3"])
def calibrate(values: Namespace) -> None:
    """Measures the coefficients that `predict` uses under a setting: a quarter of an hour, an hour under cheetah."""
    from jax_entropy.private.cost.calibration import calibrate as run

    run(read_setting(values), warn)
