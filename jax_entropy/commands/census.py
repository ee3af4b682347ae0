"""`jax-entropy census`: what a model computes, as tables, and what that would cost privately."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from jax_entropy.commands.console import console, table, write_json
from jax_entropy.commands.parse import CONFIG, JSON, Flag, OneOf, command
from jax_entropy.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from jax_entropy.architecture import ModelConfig
    from jax_entropy.census import Census

ARCHITECTURE = Flag("architecture", None, "in the paper's notation, like SM+LN+G")
SIZE = (
    Flag("num_layers", 12, "blocks"),
    Flag("num_heads", 12, "heads in a block"),
    Flag("model_dim", 768, "width"),
    Flag("context_length", 128, "tokens"),
    Flag("vocab_size", 50257, "entries of the tokenizer"),
)


@command(
    OneOf(((ARCHITECTURE, *SIZE), (CONFIG,))),
    JSON,
    examples=["census --architecture='EReg(SM(t)+ScFuFFN)'", "census --config=quickstart:SM+LN+G"],
)
def census(values: Namespace) -> None:
    """FLOPs, nonlinear operations and private cost of a model: of --architecture=…, or of --config=…."""
    from jax_entropy.architecture import architecture
    from jax_entropy.census import census as count
    from jax_entropy.config import check, model_config
    from jax_entropy.data.tokenizer import vocabulary
    from jax_entropy.runs.workdir import to_json

    if values.source == "config":
        check(values.config)
        model = model_config(values.config, vocabulary(values.config))
    else:
        model = architecture(values.architecture, **{flag.name: getattr(values, flag.name) for flag in SIZE})
    counted, out = count(model), console(values.json)
    print_census(counted, out)
    costs = print_costs(model, out)
    write_json(values.json, to_json(counted) | dict(private=costs))


def print_census(census: "Census", console: "Console") -> None:
    """Prints FLOPs and parameters, and a table of the nonlinear operations."""
    config = census.config
    console.print(
        f"{config}: {config.num_layers} layers, {config.num_heads} heads, width {config.model_dim}, "
        f"context {config.context_length}, {census.parameters:,} parameters"
    )
    flops = (("FFN", census.ffn_flops), ("attention", census.attention_flops))
    spelled = [(name, f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M") for name, count in flops]
    console.print(table(["FLOPs of a forward pass", ""], spelled))
    named = [(operation.name, operation) for operation in census.operations]
    named += [(f"{operation.name}, final", operation) for operation in census.final_operations]
    rows = [(name, operation, f"{operation.elements:,}") for name, operation in named]
    console.print(table(["nonlinear operation", "shape", "elements"], rows, left=2))


def print_costs(config: "ModelConfig", console: "Console") -> dict[str, Any]:
    """Prints what a forward pass would cost privately: predicted for this engine, and in the paper's system."""
    from jax_entropy.private.cost.model import predict_total
    from jax_entropy.private.cost.paper import paper_cost
    from jax_entropy.private.engine.engine import Setting

    setting, rows, costs = Setting(), [], {}
    try:
        for plain in (True, False):
            total = costs["plain" if plain else "optimised"] = predict_total(
                config, config.context_length, setting, plain
            )
            name = f"{setting.protocol}, {'plain export' if plain else 'optimised'}"
            rows.append((name, f"{total.bytes[0] / 1e6:,.1f}", f"{total.rounds:,}"))
        console.print(table(["private, predicted", "MB sent", "rounds"], rows))
    except UserError as error:  # of a kind of operation that is new
        console.print(f"private execution is not predicted: {error}")
    try:
        papers = costs["paper"] = paper_cost(config)
        console.print(f"in the paper's system {papers.gigabytes:.2f} GB and {papers.minutes:.2f} minutes")
    except UserError:
        pass  # its tables are of other sizes
    return costs
