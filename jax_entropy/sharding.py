"""One mesh (`data`, `fsdp`, `tensor`) and the rule table that says how each parameter is split over it.

Rules are data: (pattern of the parameter's path, axes), first match wins, no match is an error. What used to be pmap
and pjit is `jax.jit` over these shardings; heads are split over `tensor`, so entropies never leave their shard.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_entropy.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Axes of a parameter without its leading layer axis; a name, a tuple of names, or None for "not split".
RULES = (
    (r"(token_embedding|head)$", ("tensor", "fsdp")),
    (r"position_embedding$", (None, "fsdp")),
    (r"attention/(query|key|value)/kernel$", ("fsdp", "tensor", None)),
    (r"attention/(query|key|value)/(bias|gain)$", ("tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"attention/temperature$", ("tensor", None)),
    (r"attention/threshold$", ("tensor",)),
    (r"ffn/up/kernel$", ("fsdp", "tensor")),
    (r"ffn/up/(bias|gain)$", ("tensor",)),
    (r"ffn/down/kernel$", ("tensor", "fsdp")),
    (r"ffn/fused/kernel$", ("fsdp", "tensor")),
    (r"(attention/out|ffn/down|ffn/fused)/(bias|gain)$", (None,)),
    (r"(norm1|norm2|final_norm)/(scale|bias)$", (None,)),
    (r"(alpha|beta|negative_slope)$", ()),
    (r"spectral/.*/singular_vectors/\d$", (None,)),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh over all devices; one axis may be -1, "what is left".

    Raises UserError if the axes' product is not the number of devices: no device stays idle silently.
    """
    shape, count = [data, fsdp, tensor], jax.device_count()
    spelled = "×".join(map(str, shape))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh {spelled} (data×fsdp×tensor): sizes are at least 1, and at most one may be -1, the rest")
    fixed = math.prod(size for size in shape if size != -1)
    if count % fixed or (-1 not in shape and fixed != count):
        raise UserError(
            f"mesh {spelled} (data×fsdp×tensor) does not divide the {count} devices that are here; "
            f"config.mesh.data=-1 takes what fsdp×tensor leaves, and that product must divide {count}"
        )
    shape = [count // fixed if size == -1 else size for size in shape]
    return jax.make_mesh(tuple(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def path_name(path: tuple) -> str:
    """A parameter's place in its tree, "params/blocks/attention/query/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_spec(path: str, shape: tuple[int, ...], rules: Iterable = RULES) -> PartitionSpec:
    """The axes that the first matching rule gives to a parameter; leading axes (layers) are not split.

    Raises UserError if no rule matches.
    """
    for pattern, axes in rules:
        if re.search(pattern, path):
            return PartitionSpec(*(None,) * (len(shape) - len(axes)), *axes)
    raise UserError(f"no sharding rule covers the parameter {path!r}; add (pattern, axes) to config.mesh.rules")


def tree_sharding(tree: Any, mesh: jax.sharding.Mesh, rules: Iterable = RULES) -> Any:
    """Shardings for a tree of parameters, or of optimiser moments: they keep their parameter's path.

    Scalars are replicated. Raises UserError where a dimension is not divisible by the axes that split it.
    """

    def one(path, leaf):
        name = path_name(path)
        if leaf.ndim == 0 or name == "key":
            return NamedSharding(mesh, PartitionSpec())
        spec = parameter_spec(name, leaf.shape, rules)
        for size, axes in zip(leaf.shape, spec):
            parts = math.prod(mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis)
            if size % parts:
                raise UserError(f"{name} {leaf.shape}: a dimension of {size} cannot be split in {parts} ({axes})")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sequences are split over `data` and `fsdp`, tokens are not."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_parts() -> int:
    """How many ways the mesh that we are in splits a batch; 1 outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in BATCH) if mesh.axis_names == AXES else 1


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Fixes the layout of an activation inside a mesh of ours; elsewhere the identity."""
    if jax.sharding.get_abstract_mesh().axis_names != AXES:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
