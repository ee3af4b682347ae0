"""What was measured and predicted of private execution, as tables and lines."""

import os
from typing import Any, NamedTuple

from rich.console import Console

from jax_entropy.architecture import ModelConfig
from jax_entropy.commands.console import table
from jax_entropy.errors import UserError
from jax_entropy.private.cost.ablation import Ablation
from jax_entropy.private.cost.account import Network, on_network
from jax_entropy.private.cost.paper import paper_cost
from jax_entropy.private.cost.precision import Precision, cheapest
from jax_entropy.private.cost.prices import PriceList, thousand_tokens
from jax_entropy.private.cost.profile import Profile
from jax_entropy.private.engine.engine import Account, Setting

POSITIONS = dict(every="logits of every position", last="logits of one token")


class Predicted(NamedTuple):
    """One way to run a model: as it is written or optimised, and for the logits of "every" position or the "last"."""

    config: ModelConfig
    plain: bool
    logits: str
    total: Account


def print_profile(measured: Profile, network: Network, network_name: str, console: Console) -> None:
    """A table by kind of operation, then cold and warm totals."""
    parties = range(measured.setting.num_parties)
    console.print(
        f"{measured.architecture}, {measured.export}, {measured.num_tokens} tokens under {measured.setting.protocol}, "
        f"{POSITIONS[measured.logits]}, {measured.embedding} embedding"
    )
    columns = ("operation", *(f"MB by party {i}" for i in parties), "rounds", "s computing", f"s on {network_name}")
    accounts = [*measured.by_kind().items(), ("all, warm", measured.total()), ("all, cold", measured.total("cold"))]
    rows = []
    for kind, account in accounts:
        each = (f"{count / 1e6:,.3f}" for count in account.bytes)
        times = (f"{account.seconds:.2f}", f"{on_network(account, network):.2f}")
        rows.append((kind, *each, f"{account.rounds:,}", *times))
    console.print(table(columns, rows))
    console.print(f"peak memory of the engine, all parties: {measured.peak_memory_bytes / 1e9:.2f} GB")


def print_comparison(
    profiles: list[Profile], network: Network, network_name: str, price: PriceList, console: Console
) -> None:
    """One line for each way to run each architecture, with ratios to the first."""
    columns = ("architecture", "export", "MB sent", "ratio", "rounds", "ratio", f"s on {network_name}", "ratio", "$")
    rows = []
    values = [(max(t.bytes) / 1e6, t.rounds, on_network(t, network)) for t in (p.total() for p in profiles)]
    for measured, row in zip(profiles, values, strict=True):
        cells = []
        for value, reference, form in zip(row, values[0], ("{:,.2f}", "{:,.0f}", "{:,.1f}"), strict=True):
            cells += [form.format(value), f"{reference / value:.2f}×"]
        tokens = measured.num_tokens if measured.logits == "every" else 1
        money = thousand_tokens(measured.total(), tokens, price, os.cpu_count() or 1)
        rows.append((measured.architecture, measured.export, *cells, f"{money:,.4f}"))
    console.print(table(columns, rows, left=2))
    first, money = profiles[0], _what_money_is(price, profiles[0].logits)
    console.print(f"{POSITIONS[first.logits]}, {first.embedding} embedding; {money}, computing included")


def _what_money_is(price: PriceList, logits: str) -> str:
    tokens = "a thousand tokens " + dict(every="read", last="written, each by a pass of its own")[logits]
    return f"$: {tokens}, all parties' bytes, {price.name}, {price.date}"


def print_ablation(rows: list[Ablation], console: Console) -> None:
    """A line for every rewrite alone, and for all together."""
    columns = ("rewrites", "MB warm", "MB cold", "rounds", "seconds", "logit error", "top-1")
    cells = [
        (
            row.name, f"{max(row.warm.bytes) / 1e6:,.3f}", f"{max(row.cold.bytes) / 1e6:,.3f}", f"{row.warm.rounds:,}",
            f"{row.warm.seconds:.2f}", f"{row.error:.2g}", f"{row.agreement:.1%}",
        )
        for row in rows
    ]  # fmt: skip
    console.print(table(columns, cells))


def print_predictions(
    predicted: list[Predicted], num_tokens: int, embedding: str, network: Network, network_name: str,
    price: PriceList, console: Console,
) -> None:  # fmt: skip
    """Predicted bytes and rounds of models too large to wait for, the paper's own figures beside them."""
    numbers = ("MB sent", "ratio", "rounds", "ratio", f"s waiting on {network_name}", "$", "paper GB")
    rows, first = [], {row.logits: row.total for row in reversed(predicted)}
    for config, plain, logits, total in predicted:
        try:
            papers = f"{paper_cost(config).gigabytes:.2f}" if logits == "every" else ""
        except UserError:
            papers = "–"
        waiting, of = on_network(total._replace(seconds=0.0), network), first[logits]
        money = thousand_tokens(total, num_tokens if logits == "every" else 1, price)
        rows.append((
            str(config), "plain" if plain else "optimised", "every position" if logits == "every" else "one token",
            f"{max(total.bytes) / 1e6:,.1f}", f"{max(of.bytes) / max(total.bytes):.2f}×",
            f"{total.rounds:,}", f"{of.rounds / total.rounds:.2f}×", f"{waiting:,.0f}", f"{money:,.3f}", papers,
        ))  # fmt: skip
    console.print(table(("architecture", "export", "logits of", *numbers), rows, left=3))
    money = f"$: a thousand tokens, read or written, all parties' bytes, {price.name}, {price.date}"
    console.print(f"{embedding} embedding; {money}")


def print_precision(rows: list[Precision], largest_logit: float, tolerance: float, console: Console) -> None:
    """The table, then the flags of the cheapest good row."""
    columns = ("fraction bits", "exponential", "MB sent", "rounds", "largest error", "mean error", "top-1")
    lines = []
    for row in rows:
        setting = row.setting
        squarings = ",".join(map(str, setting.layer_iterations)) or setting.squarings
        name = f"{setting.exponent} {squarings}" if squarings else setting.exponent
        cells = ("refused", "", "", "", "")
        if row.account:
            cells = (
                f"{max(row.account.bytes) / 1e6:,.2f}", f"{row.account.rounds:,}", f"{row.largest_error:.4f}",
                f"{row.mean_error:.4f}", f"{row.agreement:.1%}",
            )  # fmt: skip
        lines.append((setting.fraction_bits, name, *cells))
    console.print(table(columns, lines, left=2))
    console.print(f"largest logit: {largest_logit:.3g}")
    for row in rows:
        if row.refused:
            console.print(f"refused: {row.refused}")
    errors = f"errors under {tolerance:.1%} of the largest logit, with a quarter to spare"
    best = cheapest(rows, tolerance, largest_logit)
    if best is None:
        return console.print(f"none keeps the same tokens and {errors}")
    flags = f"--fraction_bits={best.setting.fraction_bits} --exponent={best.setting.exponent}"
    if best.setting.layer_iterations:
        flags += f" --layer_iterations={','.join(map(str, best.setting.layer_iterations))}"
    elif best.setting.squarings:
        flags += f" --exponent_iterations={best.setting.squarings}"
    console.print(f"cheapest with the same tokens and {errors}: {flags}")


def spent(accounts: list, came: list[float], seconds: float, peak: int, setting: Setting) -> str:
    """What generating took, in two lines.

    Args:
      came: seconds after which each token was there.
      peak: bytes of memory of the engine.
    """
    prefill = next(account for name, account in accounts if name.startswith("prefill"))
    names = [name for name, _ in accounts]
    steps = [number for number, name in enumerate(names) if name.startswith("step ")]
    rest = [account for name, account in accounts[steps[0] :] if name.startswith(("step ", "choose"))] if steps else []
    line = f"{len(came)} tokens in {seconds:.1f} s under {setting.protocol}, "
    if came:
        line += f"the first after {came[0]:.1f} s, "
    if len(came) > 1:
        line += f"then {60 * (len(came) - 1) / (came[-1] - came[0]):.3g} a minute, "
    line += f"peak memory {peak / 1e9:.2f} GB; the prompt {_describe(prefill)}"
    if rest:
        line += f"\na token {_describe(Account(*(_mean(values, len(steps)) for values in zip(*rest, strict=True))))}"
    return line


def _mean(values: tuple, count: int) -> Any:
    if isinstance(values[0], tuple):
        return tuple(sum(column) / count for column in zip(*values, strict=True))
    return sum(values) / count


def _describe(account: Account) -> str:
    """Bytes of each party, rounds and time in a phrase."""
    each = " / ".join(f"{count / 1e6:,.2f}" for count in account.bytes)
    parties = " / ".join(map(str, range(len(account.bytes))))
    return f"{each} MB sent by party {parties}, {account.rounds:.0f} rounds, {account.seconds:.2f} s"
