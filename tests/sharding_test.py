"""Every parameter has its place on the mesh, and no mesh changes the numbers."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from jax_entropy.config import model_config
from jax_entropy.errors import UserError
from jax_entropy.fields import RULES
from jax_entropy.model import Transformer
from jax_entropy.sharding import (
    AXES,
    BATCH,
    batch_sharding,
    config_mesh,
    constrain,
    make_mesh,
    parameter_spec,
    path_name,
    tree_sharding,
)  # fmt: skip
from jax_entropy.state import init_state, make_train_step
from tests.tiny_model import ARCHITECTURES, run_config

MESHES = ((1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2))
TRAINED = ("EReg(SM(t)+ScFuFFN^1)", "EReg(SM+LN+LR(global)+SNorm(QKVO+FFN)+ScFFN)")


def mesh_of(shape):
    if math.prod(shape) == jax.device_count():
        return make_mesh(*shape)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=devices)


def abstract_state(config):
    return jax.eval_shape(functools.partial(init_state, config, Transformer(model_config(config, 64))))


# The table


@functools.cache
def states():
    """Every architecture's state as shapes."""
    fields = {"model.bias": "all", "model.tied_head": False}
    return {name: abstract_state(run_config(name, **fields)) for name in ARCHITECTURES}


def test_every_parameter_moment_and_singular_vector_has_a_rule():
    for name, state in states().items():
        shardings = tree_sharding(state, mesh_of((2, 2, 2)))
        specs = {path_name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)}
        leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        for path, leaf in leaves.items():
            if leaf.ndim and path != "key":
                assert any(re.search(pattern, path) for pattern, _ in RULES), (name, path)
            assert len(specs[path]) in (0, leaf.ndim), (name, path)
            if "blocks" in path and specs[path]:
                assert specs[path][0] is None, (name, path)  # layers are not split
        moments = [path for path in leaves if path.startswith("opt_state/")]
        for path in leaves:
            for moment in ("mu", "nu"):
                if path.startswith("params/"):
                    of_moment = [specs[p] for p in moments if p.endswith(f"/{moment}/{path[7:]}")]
                    assert of_moment == [specs[path]], (name, path)


def test_every_rule_is_needed():
    """Of each path the first rule that matches counts, and each rule is the first for some path."""
    first = set()
    for state in states().values():
        for path, _ in jax.tree_util.tree_leaves_with_path((state.params, state.collections)):
            first.add(
                next((i for i, (pattern, _) in enumerate(RULES) if re.search(pattern, "x/" + path_name(path))), None)
            )
    assert first - {None} == set(range(len(RULES)))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/token_embedding", (64, 16), ("tensor", "fsdp")),
        ("params/head", (64, 16), ("tensor", "fsdp")),
        ("params/position_embedding", (16, 16), (None, "fsdp")),
        ("params/blocks/attention/query/kernel", (2, 16, 2, 8), (None, "fsdp", "tensor", None)),
        ("opt_state/1/0/mu/blocks/attention/out/kernel", (2, 2, 8, 16), (None, "tensor", None, "fsdp")),
        ("params/blocks_without_ffn/attention/temperature", (1, 2, 16), (None, "tensor", None)),
        ("params/blocks/attention/threshold", (2, 2), (None, "tensor")),
        ("params/blocks/attention/key/gain", (2, 2, 8), (None, "tensor", None)),
        ("params/blocks/ffn/up/kernel", (2, 16, 64), (None, "fsdp", "tensor")),
        ("params/blocks/ffn/down/kernel", (2, 64, 16), (None, "tensor", "fsdp")),
        ("params/blocks/alpha", (2,), (None,)),
        ("params/final_norm/scale", (16,), (None,)),
        ("collections/spectral/blocks/ffn/up/singular_vectors/1", (2, 64), (None, None)),
    ],
)
def test_axes(path, shape, spec):
    assert parameter_spec(path, shape) == PartitionSpec(*spec)


@pytest.mark.parametrize(
    "path", ["params/blocks/attention/slots", "params/blocks/attention/querykernel", "params/kernel"]
)
def test_a_parameter_without_a_rule_is_an_error(path):
    with pytest.raises(UserError, match=f"no sharding rule covers the parameter '{path}'"):
        parameter_spec(path, (2, 2))
    tree = {}
    functools.reduce(lambda node, key: node.setdefault(key, {}), path.split("/")[:-1], tree)[path.split("/")[-1]] = (
        jnp.ones(2)
    )
    with pytest.raises(UserError, match=path):
        tree_sharding(tree, mesh_of((2, 2, 2)))


def test_the_first_rule_that_matches_counts():
    rules = ((r"query/kernel$", (None, None, "tensor")), *RULES)
    assert parameter_spec("params/blocks/attention/query/kernel", (2, 16, 2, 8), rules)[-1] == "tensor"
    assert parameter_spec("params/blocks/attention/key/kernel", (2, 16, 2, 8), rules) == PartitionSpec(
        None, "fsdp", "tensor", None
    )
    with pytest.raises(UserError, match=r"has more axes than params/head \(64, 16\)"):
        parameter_spec("params/head", (64, 16), ((r"head$", ("tensor", None, None)),))


@pytest.mark.parametrize(
    ("mesh", "fields", "message"),
    [
        ((1, 1, 8), {}, r"attention/.* a dimension of 2 cannot be split in 8"),
        ((1, 8, 1), {"model.model_dim": 12}, r"a dimension of 12 cannot be split in 8"),
    ],
)
def test_dimensions_that_do_not_divide_are_named(mesh, fields, message):
    with pytest.raises(UserError, match=message):
        tree_sharding(abstract_state(run_config("SM+LN+G", **fields)), mesh_of(mesh))


# The mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((2, -1, 1), (2, 4, 1)),
        ((1, 1, -1), (1, 1, 8)),
        ((8, 1, 1), (8, 1, 1)),
    ],
)
def test_a_mesh_takes_all_devices(sizes, shape):
    mesh = make_mesh(*sizes)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == AXES
    assert len(set(mesh.devices.ravel())) == 8


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 1, 1),
        (4, 1, 1),
        (16, 1, 1),
        (-1, 3, 1),
        (-1, -1, 1),
        (0, 1, 1),
        (-2, 1, 1),
        (8, 0, 1),
        (-1, 16, 1),
        (-1, 0, 1),
    ],
)
def test_a_mesh_that_the_devices_do_not_make_is_named(sizes):
    with pytest.raises(UserError, match="mesh " + "×".join(map(str, sizes))):
        make_mesh(*sizes)


@pytest.mark.parametrize(
    ("fields", "proposal", "instead"),
    [
        ({"train.batch_size": 31}, "the nearest size that can is 32", {"train.batch_size": 32}),
        ({"train.batch_size": 3}, "the nearest size that can is 8", {"train.batch_size": 8}),
        ({"mesh.tensor": 4, "model.num_heads": 6}, "divides both is config.mesh.tensor=2", {"mesh.tensor": 2}),
    ],
)
def test_a_config_that_a_mesh_cannot_split_is_answered_with_one_that_it_can(fields, proposal, instead):
    with pytest.raises(UserError, match=proposal):
        config_mesh(run_config("SM+LN+G", **fields))
    config_mesh(run_config("SM+LN+G", **fields | instead))


@pytest.fixture
def kept(tmp_path):
    """How many programs JAX has kept so far, in a cache of the test's own."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), True, 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield lambda: len(list(tmp_path.glob("*-cache")))
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_for_several_cpu_devices_are_not_kept(kept):
    """Read back, they would exchange their messages in another order; on one device there are none."""
    make_mesh(devices=jax.devices()[:1])
    jax.jit(lambda x: 5 * x + 11)(np.arange(7.0))
    assert kept() == 1
    rows = NamedSharding(make_mesh(8), PartitionSpec("data"))
    total = jax.jit(lambda x: (5 * x + 11).sum(), in_shardings=rows)(np.arange(8.0))
    assert total == 228 and kept() == 1


def test_outside_a_mesh_nothing_is_constrained():
    x = jnp.ones((4, 4))
    assert constrain(x, BATCH, None) is x
    with jax.set_mesh(mesh_of((2, 4, 1))):
        laid_out = jax.jit(lambda x: constrain(x, "fsdp", None))(x)
    assert {shard.data.shape for shard in laid_out.addressable_shards} == {(1, 4)}


@pytest.mark.parametrize(("mesh", "rows"), [((8, 1, 1), 1), ((2, 4, 1), 1), ((2, 2, 2), 2)])
def test_a_batch_is_split_over_data_and_fsdp(mesh, rows):
    batch = jax.device_put(np.arange(8 * 17).reshape(8, 17), batch_sharding(mesh_of(mesh)))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(rows, 17)}


# Training on it


@functools.cache
def initialised(architecture, shape):
    """(initial state, its shardings) on a mesh of a shape."""
    config, mesh = run_config(architecture), mesh_of(shape)
    sharding = tree_sharding(abstract_state(config), mesh)
    with jax.set_mesh(mesh):
        init = functools.partial(init_state, config, Transformer(model_config(config, 64)))
        return jax.jit(init, out_shardings=sharding)(), sharding


@functools.cache
def trained(architecture, shape):
    """(state after five steps, metrics of each step) on a mesh of a shape."""
    clipped = {"optimizer.qk_clip": 0.1} if architecture == TRAINED[0] else {}
    config, mesh = run_config(architecture, **clipped), mesh_of(shape)
    model = Transformer(model_config(config, 64))
    state, sharding = initialised(architecture, shape)
    with jax.set_mesh(mesh):
        step = jax.jit(
            make_train_step(config, model),
            static_argnums=2,
            in_shardings=(sharding, batch_sharding(mesh)),
            out_shardings=(sharding, NamedSharding(mesh, PartitionSpec())),
        )
        metrics = []
        for seed in range(5):
            tokens = np.random.default_rng(seed).integers(0, 64, (8, 17)).astype(np.int32)
            state, seen = step(state, jax.device_put(tokens, batch_sharding(mesh)), True)
            metrics.append(jax.device_get(seen))
    return state, metrics


@pytest.mark.parametrize(
    ("architecture", "shape"), [*((TRAINED[0], shape) for shape in MESHES[1:]), ("SM+LN+WNorm(QKVO+FFN)", MESHES[-1])]
)
def test_a_mesh_does_not_change_initial_values(architecture, shape):
    """To the bit, but for gains: they are sums over what is split."""
    one, other = (jax.device_get(initialised(architecture, s)[0]) for s in (MESHES[0], shape))
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (one, other)), strict=True):
        compare = np.testing.assert_array_equal
        if path_name(path).startswith("params") and path_name(path).endswith("gain"):
            compare = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        compare(b, a, err_msg=path_name(path))


@pytest.mark.parametrize(("architecture", "shape"), [
    *itertools.product(TRAINED, MESHES[1:]),
    *(pytest.param(name, MESHES[-1], marks=pytest.mark.long) for name in ARCHITECTURES[-4:]),  # every part among them
])  # fmt: skip
def test_a_mesh_does_not_change_losses_metrics_and_parameters(architecture, shape):
    one, metrics_of_one = trained(architecture, MESHES[0])
    other, metrics = trained(architecture, shape)
    for step, (expected, seen) in enumerate(zip(metrics_of_one, metrics, strict=True)):
        for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (expected, seen)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5, err_msg=f"step {step}: {path_name(path)}")
    for (path, a), (_, b) in zip(*map(jax.tree_util.tree_leaves_with_path, (one, other)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5, err_msg=path_name(path))
    assert architecture != TRAINED[0] or min(np.min(m["qk_clip"]) for m in metrics) < 1
    moved = [float(m["loss"]) for m in metrics]
    assert len(set(moved)) == 5


def test_every_device_holds_its_share_of_parameters_and_moments():
    """Over fsdp×tensor; what is small or a sum over both may be whole."""
    state = trained(TRAINED[0], (2, 2, 2))[0]
    for path, leaf in flatten_dict(state.params, sep="/").items():
        parts = leaf.size // leaf.addressable_shards[0].data.size
        expected = 4 if path.endswith("kernel") or path == "token_embedding" else 2 if "bias" not in path else parts
        assert parts == (expected if leaf.ndim > 1 and "alpha" not in path else parts), path
    local = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert local < 0.3 * total


def test_fsdp_alone_splits_every_matrix():
    state = trained(TRAINED[0], (2, 4, 1))[0]
    for leaf in jax.tree.leaves(state.params):
        if leaf.ndim > 1 and leaf.size >= 256:
            assert leaf.addressable_shards[0].data.nbytes * 4 == leaf.nbytes


def test_states_stay_where_they_are():
    for architecture, shape in itertools.product(TRAINED, MESHES):
        start, state = initialised(architecture, shape)[0], trained(architecture, shape)[0]
        pairs = zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True)
        assert all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs)


def test_nothing_is_gathered_whole_to_be_laid_out_anew(capfd):
    """XLA says so on stderr when it must; a lookup in a table that is split along both axes makes it speak."""
    mesh = mesh_of((2, 2, 2))
    table = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=batch_sharding(mesh))
    out = NamedSharding(mesh, PartitionSpec(BATCH))
    jax.jit(lambda table, tokens: jnp.take(table, tokens, axis=0), out_shardings=out).lower(table, tokens).compile()
    speaks = "nvoluntary full rematerialization" in capfd.readouterr().err
    trained.__wrapped__(TRAINED[0], (2, 2, 2))
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
    if not speaks:
        pytest.skip("this XLA does not say when it gathers")
