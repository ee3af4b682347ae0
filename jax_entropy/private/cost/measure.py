"""What is measured and predicted, as tables: `private profile`, `compare`, `predict`, `calibrate`, and for `census`."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.errors import UserError
from jax_entropy.private.cost import model as cost_model
from jax_entropy.private.cost.model import predict_total
from jax_entropy.private.cost.paper import paper_cost
from jax_entropy.private.cost.profile import Network, Profile, ablation, add, on_network, profile, times
from jax_entropy.private.cost.work import ciphertext_memory, work
from jax_entropy.private.engine import engine
from jax_entropy.private.engine.engine import Account
from jax_entropy.private.program.export import export
from jax_entropy.private.program.fixed_point import check_range, random_tokens
from jax_entropy.private.program.stage import PLAIN, Steps, export_name

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


def random_variables(config: ModelConfig) -> Any:
    """Variables as a run starts with; bytes and rounds do not depend on values."""
    from jax_entropy.model import Transformer

    return jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def check_size(config: ModelConfig, num_tokens: int, setting: engine.Setting, plain: bool) -> None:
    """Raises UserError if the tokens do not fit into the context, or a run into the memory that is free.

    To be called before variables are made. Per party: weights as shares, masks and products, and a dozen arrays of the
    largest of scores, hidden and one-hot; under CHEETAH, the polynomials of its products instead of arrays.
    """
    if not 1 <= num_tokens <= config.context_length:
        raise UserError(
            f"--context={num_tokens} must lie between 1 and the model's context_length={config.context_length}"
        )
    T, L, N = num_tokens, config.num_layers, config.num_heads
    matrices = (
        4 + 2 * config.hidden_dim / config.model_dim
    ) * config.model_dim**2 * L + 2 * config.vocab_size * config.model_dim
    needed = setting.num_parties * 8 * 4 * matrices
    if setting.protocol == "cheetah":
        needed += 1.7e9 + ciphertext_memory(work(config, T, plain))
    else:
        copies = {"semi2k": 16, "aby3": 24}[setting.protocol]
        needed += setting.num_parties * 8 * copies * max(N * T * T, T * config.hidden_dim, T * config.vocab_size)
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = 1024 * int(next(line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return
    if needed > free:
        raise UserError(
            f"{config} on {T} tokens under {setting.protocol} needs some {needed / 1e9:.0f} GB, and "
            f"{free / 1e9:.0f} GB are free; take fewer tokens, layers or entries of the vocabulary"
        )


def run_profile(
    config: ModelConfig, variables: Any, steps: Steps, num_tokens: int, setting: engine.Setting, notify
) -> Profile:
    """A profile of a model's forward pass, after a check of its range."""
    exported, tokens = export(config, variables, steps), random_tokens(config.vocab_size, num_tokens)
    check_range(exported, tokens, setting)
    return profile(exported, tokens, setting, notify=notify)


def print_profile(measured: Profile, network: Network, network_name: str, console: Console) -> None:
    """A table by kind of operation, then cold and warm totals."""
    parties = range(measured.setting.num_parties)
    console.print(
        f"{measured.architecture}, {measured.export}, {measured.num_tokens} tokens under {measured.setting.protocol}",
        markup=False,
    )
    table = Table(
        "operation",
        *(f"MB by party {i}" for i in parties),
        "rounds",
        "s computing",
        f"s on {network_name}",
        box=None,
        pad_edge=False,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [*measured.by_kind().items(), ("all, warm", measured.total()), ("all, cold", measured.total("cold"))]
    for kind, account in rows:
        each = (f"{count / 1e6:,.3f}" for count in account.bytes)
        table.add_row(
            kind, *each, f"{account.rounds:,}", f"{account.seconds:.2f}", f"{on_network(account, network):.2f}"
        )
    console.print(table)
    console.print(f"peak memory of the engine, all parties: {measured.memory / 1e9:.2f} GB")


def _table(*numbers: str) -> Table:
    """A table of ways to run architectures, with columns of numbers."""
    table = Table("architecture", "export", *numbers, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[0].overflow = "ignore"
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def print_comparison(profiles: list[Profile], network: Network, network_name: str, console: Console) -> None:
    """One line for each way to run each architecture, with ratios to the first."""
    table = _table("MB sent", "ratio", "rounds", "ratio", f"s on {network_name}", "ratio")
    values = [(max(t.bytes) / 1e6, t.rounds, on_network(t, network)) for t in (p.total() for p in profiles)]
    for measured, row in zip(profiles, values, strict=True):
        cells = []
        for value, reference, form in zip(row, values[0], ("{:,.2f}", "{:,.0f}", "{:,.1f}"), strict=True):
            cells += [form.format(value), f"{reference / value:.2f}×"]
        table.add_row(measured.architecture, measured.export, *cells)
    console.print(table)


def compare(names: list[str], values: Any, setting: engine.Setting, warn) -> list[Profile]:
    """Each architecture exported plainly and optimised."""
    if not names:
        raise UserError("compare what? give architectures, like: private compare SM+LN+G 'EReg(SM(t)+ScFuFFN)'")
    size = {name: values[name].value for name in SIZE} | dict(context_length=values.context)
    configs = [architecture(name, **size) for name in names]
    for config in configs:
        check_size(config, values.context, setting, plain=True)
    profiles = []
    for config in configs:
        variables = random_variables(config)
        for steps in (PLAIN, Steps()):
            start, name = time.monotonic(), f"{config}, {export_name(steps)}"
            told = lambda line, name=name: warn(f"{name}: {line}")  # noqa: E731
            profiles.append(run_profile(config, variables, steps, values.context, setting, told))
            warn(f"{name}: measured in {time.monotonic() - start:.0f} s")
    return profiles


def print_ablation(
    config: ModelConfig, variables: Any, num_tokens: int, setting: engine.Setting, console: Console, warn
) -> list:
    """The table of every step alone and of all together."""
    tokens = random_tokens(config.vocab_size, num_tokens)
    check_range(export(config, variables, PLAIN), tokens, setting)
    rows = ablation(lambda steps: export(config, variables, steps), tokens, setting, warn)
    table = Table("steps", "MB warm", "MB cold", "rounds", "seconds", "logit error", "top-1", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.name, f"{max(row.warm.bytes) / 1e6:,.3f}", f"{max(row.cold.bytes) / 1e6:,.3f}", f"{row.warm.rounds:,}",
            f"{row.warm.seconds:.2f}", f"{row.error:.2g}", f"{row.agreement:.1%}",
        )  # fmt: skip
    console.print(table)
    return rows


def count_by_layers(config: ModelConfig, setting: engine.Setting, plain: bool, notify) -> Account:
    """A warm forward pass whose blocks are measured, two of each kind at full size, and counted as often as they occur.

    For settings that the cost model does not know. Raises UserError if the two blocks do not fit into memory.
    """
    of_each = [config.num_layers - config.ffn_free_layers, config.ffn_free_layers]
    few = [min(2, count) for count in of_each]
    small = dataclasses.replace(config, num_layers=sum(few), ffn_free_layers=few[1])
    steps = PLAIN if plain else Steps()
    check_size(small, config.context_length, setting, plain)
    measured = run_profile(small, random_variables(small), steps, config.context_length, setting, notify)
    sums = [add(e.warm for e in measured.entries if e.layer is None)]
    for count, layers in ((of_each[0], range(few[0])), (of_each[1], range(few[0], sum(few)))):
        if layers:
            blocks = add(entry.warm for entry in measured.entries if entry.layer in layers)
            sums.append(times(blocks, count / len(layers)))
    return add(sums)


def print_predictions(
    configs: list[ModelConfig], setting: engine.Setting, network: Network, network_name: str, console, warn
) -> list:
    """Predicted bytes and rounds of models too large to wait for, the paper's own figures beside them."""
    known = cost_model.is_known(setting)
    if not known:
        engine.environment_python()
        warn(f"no coefficients for this setting of {setting.protocol}: two blocks are measured, and counted by layers")
    table = _table("MB sent", "ratio", "rounds", "ratio", f"s waiting on {network_name}", "paper GB")
    rows, first = [], None
    for config in configs:
        try:
            papers = f"{paper_cost(config).gigabytes:.2f}"
        except UserError:
            papers = "–"
        for plain in (True, False):
            if known:
                total = predict_total(config, config.context_length, setting, plain)
            else:
                total = count_by_layers(config, setting, plain, warn)
            first = first or total
            waiting = on_network(total._replace(seconds=0.0), network)
            table.add_row(
                str(config), "plain" if plain else "optimised", f"{max(total.bytes) / 1e6:,.1f}",
                f"{max(first.bytes) / max(total.bytes):.2f}×", f"{total.rounds:,}",
                f"{first.rounds / total.rounds:.2f}×", f"{waiting:,.0f}", papers,
            )  # fmt: skip
            rows.append(dict(architecture=str(config), plain=plain, bytes=total.bytes, rounds=total.rounds))
    console.print(table)
    return rows


def print_costs(config: ModelConfig, console: Console) -> None:
    """What a forward pass would cost under secure computation: predicted for this engine, and in the paper's system."""
    setting, table = engine.Setting(), Table("private, predicted", "MB sent", "rounds", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for plain in (True, False):
        total = predict_total(config, config.context_length, setting, plain)
        name = f"{setting.protocol}, {'plain export' if plain else 'optimised'}"
        table.add_row(name, f"{total.bytes[0] / 1e6:,.1f}", f"{total.rounds:,}")
    console.print(table)
    try:
        papers = paper_cost(config)
        console.print(f"in the paper's system {papers.gigabytes:.2f} GB and {papers.minutes:.2f} minutes")
    except UserError:
        pass  # its tables are of other sizes


def calibrate(setting: engine.Setting, notify) -> None:
    """Measures what the cost model is fitted to and writes the coefficients of this setting into the package."""
    cost_model.check_writable()
    measured = []
    for name, fields in cost_model.ARCHITECTURES:
        for shape in cost_model.SHAPES:
            config = architecture(name, **shape, **fields)
            variables, T = random_variables(config), config.context_length
            for steps in (PLAIN, Steps()):
                measured.append((config, run_profile(config, variables, steps, T, setting, lambda line: None)))
            notify(f"{len(measured)} of {2 * len(cost_model.ARCHITECTURES) * len(cost_model.SHAPES)} measured")
    cost_model.write_costs(setting, cost_model.fit(measured))
