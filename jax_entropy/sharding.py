"""One mesh (`data`, `fsdp`, `tensor`) and the rule table that says how each parameter is split over it.

Rules are data: (pattern of the parameter's path, axes), first match wins, no match is an error. What used to be pmap
and pjit is `jax.jit` over these shardings; heads are split over `tensor`, so entropies never leave their shard.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_entropy.errors import UserError
from jax_entropy.fields import AXES, RULES

BATCH = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all `devices`, by default those that JAX finds; one axis may be -1, "what is left".

    Where devices span slices or hosts, `data` goes over the slow network between them, then `fsdp`, never `tensor`.

    Raises:
      UserError: the axes' product is not the number of devices: no device stays idle silently.
    """
    devices = jax.devices() if devices is None else devices
    shape, count = [data, fsdp, tensor], len(devices)
    spelled = "×".join(map(str, shape))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh {spelled} (data×fsdp×tensor): sizes are at least 1, and at most one may be -1, the rest")
    fixed = math.prod(size for size in shape if size != -1)
    if count % fixed or (-1 not in shape and fixed != count):
        raise UserError(
            f"mesh {spelled} (data×fsdp×tensor) does not divide the {count} devices that are here; "
            f"config.mesh.data=-1 takes what fsdp×tensor leaves, and that product must divide {count}"
        )
    shape = tuple(count // fixed if size == -1 else size for size in shape)
    if devices[0].platform == "cpu" and count > 1:
        _keep_no_compilations()
    processes = {device.process_index for device in devices}
    if shape[0] * shape[1] % len(processes):
        raise UserError(
            f"mesh {'×'.join(map(str, shape))} (data×fsdp×tensor) splits a batch in {shape[0] * shape[1]} parts, and "
            f"each of the {len(processes)} processes must have parts of its own; choose a smaller config.mesh.tensor"
        )
    if len(processes) == 1:
        return _arranged(shape, devices)
    if devices[0].platform == "tpu":
        slices = {getattr(device, "slice_index", 0) for device in devices}
        mesh = _arranged(shape, devices) if len(slices) == 1 else _hybrid(shape, len(slices), devices, by_process=False)
        if _rows_are_apart(mesh):
            return mesh
    return _hybrid(shape, len(processes), devices, by_process=True)


def _keep_no_compilations() -> None:
    """Keeps JAX from storing programs for several CPU devices and from reading them back, whoever named the folder.

    One that another process compiled exchanges its messages in another order, and Gloo ends the processes.
    """
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)


def _arranged(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> Mesh:
    """Axes along the chips' own network; an axis of it is cut in two only where the shape does not fit otherwise."""
    try:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError:
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)


def _hybrid(shape: tuple[int, ...], slow: int, devices: Sequence[jax.Device], *, by_process: bool) -> Mesh:
    """The first axes go over the slow network between `slow` groups of devices as far as they divide it."""
    between = []
    for size in shape:
        between.append(math.gcd(size, slow))
        slow //= between[-1]
    within = [size // part for size, part in zip(shape, between, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(
        within, between, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES)


def _rows_are_apart(mesh: Mesh) -> bool:
    """Whether no two processes hold the same rows of a batch: each reads a share of its own."""
    process_of = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return bool(np.all(process_of == process_of[..., :1]))


def config_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A config's mesh over `devices`.

    Raises:
      UserError: batch or heads cannot be split over it.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.train.batch_size % parts:
        nearest = parts * max(1, round(config.train.batch_size / parts))
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} cannot be split over data×fsdp={parts} devices; "
            f"the nearest size that can is {nearest}"
        )
    heads, tensor = config.model.num_heads, mesh.shape["tensor"]
    if heads % tensor:
        raise UserError(
            f"config.model.num_heads={heads} cannot be split over config.mesh.tensor={tensor}; the largest axis that "
            f"divides both is config.mesh.tensor={math.gcd(heads, tensor)}"
        )
    return mesh


def path_name(path: tuple) -> str:
    """A parameter's place in its tree, "params/blocks/attention/query/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_spec(path: str, shape: tuple[int, ...], rules: Iterable = RULES) -> PartitionSpec:
    """The axes that the first matching rule gives to a parameter; leading axes (layers) are not split.

    Raises:
      UserError: no rule matches, or it has more axes than the parameter.
    """
    for pattern, axes in rules:
        if re.search(pattern, path):
            if len(axes) > len(shape):
                raise UserError(f"config.mesh.rules: {(pattern, axes)} has more axes than {path} {shape}")
            return PartitionSpec(*(None,) * (len(shape) - len(axes)), *axes)
    raise UserError(f"no sharding rule covers the parameter {path!r}; add (pattern, axes) to config.mesh.rules")


def tree_sharding(tree: Any, mesh: Mesh, rules: Iterable = RULES) -> Any:
    """Shardings for a tree of parameters, or of optimiser moments: they keep their parameter's path.

    Scalars are replicated.

    Raises:
      UserError: a dimension is not divisible by the axes that split it.
    """

    def one(path, leaf):
        name = path_name(path)
        if leaf.ndim == 0 or name == "key":
            return NamedSharding(mesh, PartitionSpec())
        spec = parameter_spec(name, leaf.shape, rules)
        for size, axes in zip(leaf.shape, spec, strict=False):
            parts = math.prod(mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis)
            if size % parts:
                raise UserError(f"{name} {leaf.shape}: a dimension of {size} cannot be split in {parts} ({axes})")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences are split over `data` and `fsdp`, tokens are not."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def on_shards(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`f` of the parts that a device holds inside a mesh of ours that splits something; elsewhere `f` of the whole.

    Args:
      f: a function of arrays; what it sums over rows it adds up by `sum_over`, once, whatever loops it has.
      in_specs, out_specs: a PartitionSpec for each argument and result; axes that none of them names stay automatic.
    """
    specs = jax.tree.leaves((in_specs, out_specs), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    names = {name for spec in specs for axis in spec if axis for name in ((axis,) if isinstance(axis, str) else axis)}
    if not _are_split(names):
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def sum_over(axes: Sequence[str], x: Any) -> Any:
    """Sums of what the devices along `axes` found, within `on_shards`; elsewhere `x`."""
    return jax.lax.psum(x, axes) if _are_split(axes) else x


def platform() -> str:
    """Of the devices of the mesh that we are in, which may be a machine to be rented; outside, of this process's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """Of the same devices, as JAX names it: "NVIDIA H100 80GB HBM3"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Fixes the layout of an activation inside a mesh of ours; elsewhere the identity."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if _inside() else x


def _are_split(axes: Iterable[str]) -> bool:
    """Whether several devices lie along them: XLA refuses to sum over one alone while others are automatic."""
    return _inside() and math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes) > 1


def _inside() -> bool:
    return jax.sharding.get_abstract_mesh().axis_names == AXES
