"""`jax-entropy census`: what a model computes, as tables."""

from argparse import Namespace
from typing import TYPE_CHECKING

from jax_entropy.commands.console import console, table, write_json
from jax_entropy.commands.parse import CONFIG, JSON, Flag, OneOf, command

if TYPE_CHECKING:
    from rich.console import Console

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
    from jax_entropy.private.cost.measure import print_costs

    if values.source == "config":
        check(values.config)
        model = model_config(values.config, values.config.model.vocab_size or values.config.data.vocab_size)
    else:
        model = architecture(values.architecture, **{flag.name: getattr(values, flag.name) for flag in SIZE})
    counted, out = count(model), console(values.json)
    print_census(counted, out)
    print_costs(model, out)
    write_json(values.json, counted)


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
