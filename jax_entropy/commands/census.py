"""The census of a model as tables."""

from rich.console import Console
from rich.table import Table

from jax_entropy.census import Census


def print_census(census: Census, console: Console) -> None:
    """Prints FLOPs and parameters, and a table of the nonlinear operations."""
    config = census.config
    console.print(
        f"{config}: {config.num_layers} layers, {config.num_heads} heads, width {config.model_dim}, "
        f"context {config.context_length}, {census.parameters:,} parameters",
        markup=False,
    )
    flops = Table("FLOPs of a forward pass", "", box=None, pad_edge=False)
    flops.columns[1].justify = "right"
    for name, count in (("FFN", census.ffn_flops), ("attention", census.attention_flops)):
        flops.add_row(name, f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M")
    console.print(flops)
    operations = Table("nonlinear operation", "shape", "elements", box=None, pad_edge=False)
    operations.columns[2].justify = "right"
    for operation in census.operations:
        operations.add_row(operation.name, str(operation), f"{operation.elements:,}")
    for operation in census.final_operations:
        operations.add_row(f"{operation.name}, final", str(operation), f"{operation.elements:,}")
    console.print(operations)
