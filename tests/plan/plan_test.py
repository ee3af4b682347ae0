"""Plans: what is read off a compiled program, and what real TPU compilations say about memory and collectives."""

import dataclasses
import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_entropy.chips import CHIPS
from jax_entropy.commands.console import console
from jax_entropy.commands.main import main
from jax_entropy.commands.plan import print_plan
from jax_entropy.config import default_config, model_config
from jax_entropy.errors import UserError
from jax_entropy.model import Transformer
from jax_entropy.plan import Plan, plan, search
from jax_entropy.plan.hlo import Program
from jax_entropy.plan.topology import devices_of
from jax_entropy.sharding import batch_sharding, make_mesh, tree_sharding
from jax_entropy.state import init_state
from tests import REPOSITORY

EREG = "EReg(SM(t)+ScFuFFN)"


def small(architecture_name=EREG, **fields):
    """Three layers of width 256: matrices are nearly all of it, and a stack of three is told from all else by size."""
    config = default_config(architecture_name)
    config.model.update(num_layers=3, num_heads=4, model_dim=256, context_length=128, vocab_size=1024)
    config.train.update(num_steps=100, batch_size=64, dtype="bfloat16")
    config.update_from_flattened_dict(fields)
    return config


def mesh_fields(data, fsdp, tensor):
    return {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


@pytest.fixture(scope="session")
def tpu():
    try:
        import libtpu  # noqa: F401
    except ImportError:
        pytest.skip("libtpu is not installed (the extra `plan`)")


@functools.cache
def planned(topology, mesh, architecture_name=EREG, remat="none"):
    return plan(small(architecture_name, **mesh_fields(*mesh), **{"model.remat": remat}), topology)


# What is read off a program, on the CPU's compiler


def compiled(function, *shapes, mesh, out=PartitionSpec()):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*arguments).compile()


def test_a_loop_counts_as_often_as_it_turns():
    mesh = make_mesh(8, 1, 1)

    def function(x, w):
        """One all-reduce of [64, 16] a turn: the contracted axis is split."""
        return jax.lax.scan(lambda c, w: (jnp.tanh(x @ w) * c, None), jnp.ones((64, 16)), w)[0]

    shapes = ((64, 32), PartitionSpec(None, "data")), ((5, 32, 16), PartitionSpec(None, "data"))
    reduced = Program(compiled(function, *shapes, mesh=mesh).as_text()).collectives()["all-reduce"]
    assert reduced.calls == 5 and reduced.sizes == {64 * 16}
    assert reduced.sent == pytest.approx(5 * 64 * 16 * 4 * 2 * 7 / 8)


def test_loops_within_loops_multiply():
    mesh = make_mesh(8, 1, 1)

    def turn(c, w):
        def product(i, c):
            return jnp.tanh(jax.lax.with_sharding_constraint(c @ w, PartitionSpec()))

        return jax.lax.fori_loop(0, 3, product, c), None

    def function(x, w):
        return jax.lax.scan(turn, x, w)[0]

    shapes = ((16, 16), PartitionSpec()), ((5, 16, 16), PartitionSpec(None, "data"))
    program = Program(compiled(function, *shapes, mesh=mesh).as_text())
    assert max(turns for *_, turns in program.executed()) == 15


@pytest.mark.parametrize(
    ("axes", "out", "kind", "sent"),
    [
        (PartitionSpec("data"), PartitionSpec(), "all-gather", 7 / 8),
        (PartitionSpec("fsdp"), PartitionSpec(), "all-gather", 1 / 2),
    ],
)
def test_bytes_are_those_that_a_device_sends(axes, out, kind, sent):
    mesh = make_mesh(8, 1, 1) if "data" in axes else make_mesh(4, 2, 1)
    program = Program(compiled(lambda x: x * 2, ((64, 16), axes), mesh=mesh, out=out).as_text())
    assert program.collectives()[kind].sent == pytest.approx(64 * 16 * 4 * sent)
    assert program.collectives()[kind].sizes == {64 * 16}


def test_traffic_is_what_is_read_and_written():
    mesh = make_mesh(8, 1, 1)
    shape = ((1024, 256), PartitionSpec())
    assert Program(compiled(lambda x: x * 2 + 1, shape, mesh=mesh).as_text()).traffic() == 2 * 1024 * 256 * 4

    def rows(x):
        """Reads each of 1024 rows once."""
        return jax.lax.fori_loop(0, 1024, lambda i, total: total + x[i], jnp.zeros(256))

    traffic = Program(compiled(rows, shape, mesh=mesh).as_text()).traffic()
    assert 1024 * 256 * 4 <= traffic < 5 * 1024 * 256 * 4  # not 1024 times the whole array


TPU_TEXT = """
HloModule jit_f, is_scheduled=true

%region_add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%condition (p: (s32[], f32[8,128])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%body (q: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %q = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%q), index=1
  %r = f32[8,128]{1,0:T(8,128)} all-reduce(%x), replica_groups=mesh['x'=4,'y'=4] {'y'}, to_apply=%region_add
  %near = f32[8,128]{1,0:T(8,128)S(1)} negate(%r)
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%j, %r)
}

ENTRY %main (z: f32[8,128]) -> f32[8,128] {
  %z = f32[8,128]{1,0:T(8,128)} parameter(0)
  %constant.2 = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%constant.2, %z)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_tpus_text_is_read_too():
    """Bounds are constants of the condition, groups are axes of a mesh, and S(1) is memory on the chip."""
    program = Program(TPU_TEXT)
    reduced = program.collectives()["all-reduce"]
    assert reduced.calls == 12 and reduced.sent == 12 * 8 * 128 * 4 * 2 * 3 / 4
    assert program.traffic() == 12 * (2 + 1) * 8 * 128 * 4  # read and written, read; the negated stays on the chip


FUSED_TEXT = """
HloModule jit_g, is_scheduled=true

%handed_on (a: f32[64,8,128]) -> f32[64,1024] {
  %a = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  ROOT %flat = f32[64,1024]{1,0:T(8,128)} bitcast(%a)
}

%updated (b: f32[64,1024], c: f32[1,1024], d: s32[]) -> f32[64,1024] {
  %b = f32[64,1024]{1,0:T(8,128)} parameter(0)
  %c = f32[1,1024]{1,0:T(8,128)} parameter(1)
  %d = s32[]{:T(128)} parameter(2)
  ROOT %row = f32[64,1024]{1,0:T(8,128)} dynamic-update-slice(%b, %c, %d, %d)
}

%product (e: f32[64,8,128], f: f32[1024,16]) -> f32[64,16] {
  %e = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %f = f32[1024,16]{1,0:T(8,128)} parameter(1)
  %g = f32[64,1024]{1,0:T(8,128)} fusion(%e), kind=kLoop, calls=%handed_on
  ROOT %h = f32[64,16]{1,0:T(8,128)} convolution(%g, %f), dim_labels=bf_io->bf
}

%first_row (i: f32[64,8,128]) -> f32[1,1024] {
  %i = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %j = f32[64,1024]{1,0:T(8,128)} fusion(%i), kind=kLoop, calls=%handed_on
  ROOT %k = f32[1,1024]{1,0:T(8,128)} slice(%j), slice={[0:1], [0:1024]}
}

ENTRY %main (x: f32[64,8,128], y: f32[64,1024], z: f32[1024,16], n: s32[]) -> f32[64,1024] {
  %x = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %y = f32[64,1024]{1,0:T(8,128)} parameter(1)
  %z = f32[1024,16]{1,0:T(8,128)S(1)} parameter(2)
  %n = s32[]{:T(128)S(6)} parameter(3)
  %p = f32[64,16]{1,0:T(8,128)S(1)} fusion(%x, %z), kind=kOutput, calls=%product
  %q = f32[1,1024]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%first_row
  ROOT %r = f32[64,1024]{1,0:T(8,128)} fusion(%y, %q, %n), kind=kLoop, calls=%updated
}
"""


def test_a_fusion_reads_what_an_inner_one_hands_on_and_writes_what_it_updates():
    """All of x for its product, a row of it, and a row of y written; what is on the chip, or stays in y, is free."""
    assert Program(FUSED_TEXT).traffic() == (64 * 1024 + 1024 + 1024) * 4


# Refused before any compile


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--topology=v5e:4x4", "--mesh=3,1,1"], "mesh 3×1×1"),
        (["--topology=v5e:4x4", "--mesh=16,1"], "'16,1' must be three whole numbers"),
        (["--topology=v5e:4x4", "--mesh=1,1,16"], "splits a batch in 1 parts"),
        (["--topology=v5e:4x4", "--config.train.batch_size=12"], "batch_size=12 cannot be split over data×fsdp=16"),
        (["--topology=v5e:2x2", "--mesh=1,1,4", "--config.model.num_heads=2"], "num_heads=2 cannot be split"),
        (["--topology=v5e:2x2", "--mesh=1,4,1", "--config.model.model_dim=18"], "a dimension of 18 cannot be split"),
        (["--topology=v5e:2x2", "--search", "--config.train.batch_size=3"], "batch_size=3 cannot be split"),
        (["--topology=v5e:3x5"], "there is no such slice"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_compiled(tpu, flags, reason, capsys, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: pytest.fail("compiled"))
    assert main(["plan", f"--config={REPOSITORY}/tests/tiny_config.py", *flags]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_parameter_without_a_rule_is_said_before_anything_is_compiled(tpu, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: pytest.fail("compiled"))
    config = small()
    config.mesh.rules = tuple(rule for rule in config.mesh.rules if "query" not in rule[0])
    with pytest.raises(UserError, match="no sharding rule covers the parameter .*attention"):
        plan(config, "v5e:2x2")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--topology is missing"),
        (["--topology=v9:2x2"], "the chip 'v9' is not known"),
        (["--topology=v5e"], "arranged like v5e:4x4"),
        (["--topology=v5p:4x4"], "arranged like v5p:2x2x2"),
        (["--topology=h100:8x8"], "arranged like h100:8"),
        (["--topology=v5e:4x4", "--efficiency=2"], "--efficiency=2.0 must lie above 0"),
    ],
)
def test_a_topology_that_is_none_is_named(flags, reason, capsys):
    assert main(["plan", f"--config={REPOSITORY}/tests/tiny_config.py", *flags]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize(("topology", "missing"), [("v5e:4x4", "libtpu"), ("h100:8", "jax_plugins.xla_cuda12")])
def test_a_compiler_that_is_not_installed_is_named(topology, missing, monkeypatch):
    from jax_entropy.plan import topology as topology_module

    monkeypatch.setattr(topology_module, "_installed", lambda module: False)
    with pytest.raises(UserError, match=f"topology={topology}.*pip install"):
        devices_of(topology)


# Real compilations


@pytest.mark.parametrize(("topology", "count"), [("v5e:4x4", 16), ("v5p:4x4x4", 64), ("v6e:16x16", 256)])
def test_every_kind_of_slice_has_its_devices(tpu, topology, count):
    chip, devices = devices_of(topology)
    assert chip is CHIPS[topology[:3]] and len(devices) == count


@pytest.mark.parametrize(
    ("topology", "slices", "mesh"),
    [
        ("v5e:4x4", 1, (4, 1, 4)),  # jax.make_mesh would stretch `tensor` over two hosts
        ("v6e:16x16", 1, (64, 1, 4)),
        ("v5p:4x4x4", 1, (2, 32, 1)),  # no product of the torus's own axes
        ("v5e:4x4", 2, (2, 16, 1)),
        ("v5e:4x4", 2, (8, 1, 4)),
        ("v5e:4x4", 2, (4, 4, 2)),
    ],
)
def test_hosts_have_rows_of_their_own_and_data_goes_between_slices(tpu, topology, slices, mesh):
    from jax.experimental import topologies

    devices_of(topology)
    more = {"num_slices": slices} if slices > 1 else {}
    devices = topologies.get_topology_desc(topology, platform="tpu", **more).devices
    grid = make_mesh(*mesh, devices=devices).devices
    assert grid.shape == mesh and len(set(grid.ravel())) == len(devices)
    assert all(len({device.process_index for device in group}) == 1 for rows in grid for group in rows)
    if slices > 1:
        assert all(len({device.slice_index for device in rows.ravel()}) == 1 for rows in grid)


@pytest.mark.slow
def test_fsdp_shards_parameters_and_optimiser_state(tpu):
    """What a device holds before a step falls as 1/n, but for norms, temperatures and the batch."""
    width = {"model.model_dim": 512, "model.num_heads": 8}  # a quarter of it fills the tiles of a TPU's memory
    held = {n: plan(small(**width, **mesh_fields(4 // n, n, 1)), "v5e:2x2").arguments for n in (1, 2, 4)}
    assert held[1] / held[2] == pytest.approx(2, rel=0.02)
    assert held[1] / held[4] == pytest.approx(4, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("architecture_name", [EREG, "SM+LN+G"])
@pytest.mark.parametrize("mesh", [(1, 4, 1), (1, 2, 2)])
def test_no_stack_of_parameters_is_gathered_whole(tpu, architecture_name, mesh):
    """Layers are gathered one at a time, inside of their loop, and XLA gathers nothing to lay it out anew."""
    made = planned("v5e:2x2", mesh, architecture_name)
    model = Transformer(model_config(small(architecture_name), 1024))
    params = jax.eval_shape(functools.partial(init_state, small(architecture_name), model)).params
    matrices = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim > 2]
    stacks = {size // tensor for size in matrices for tensor in (1, mesh[2])}
    assert made.warnings == 0
    assert sum(collective.calls for collective in made.collectives.values()) > 4
    assert not made.collectives["all-gather"].sizes & stacks


@pytest.mark.slow
def test_a_plan_adds_up(tpu):
    made = planned("v5e:2x2", (4, 1, 1))
    state = jax.eval_shape(functools.partial(init_state, small(), Transformer(model_config(small(), 1024))))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert made.arguments == pytest.approx(size + 16 * 129 * 4, rel=0.02)
    assert made.fits and made.temporaries > 0 and made.peak >= made.arguments + made.temporaries
    assert made.tokens == 64 * 128 and made.executed_flops == made.flops
    gradients = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 2 <= made.collectives["all-reduce"].sent / (2 * 3 / 4 * gradients) < 5  # 2 or 4 bytes each, and statistics
    assert made.seconds(0.5) == 2 * max(made.terms.values())
    again = planned("v5e:2x2", (4, 1, 1), remat="full")
    assert again.flops == made.flops < again.executed_flops


def test_a_small_step_has_a_count_that_is_not_zero(capsys):
    made = Plan(
        "v5e:2x2", CHIPS["v5e"], (4, 1, 1), "none", 256, 10, 2.5e6, 1.5e9, arguments=2**20, temporaries=0, peak=1.0
    )
    print_plan(made, 0.5, console())
    assert "256 tokens, 10.00 MFLOPs (forward and backward), 1.50 GFLOPs on each chip" in capsys.readouterr().out
    print_plan(dataclasses.replace(made, flops=108.3e12, xla_flags="--xla_gpu_x=1"), 0.5, console())
    said = capsys.readouterr().out
    assert "433.2 TFLOPs (forward" in said and "XLA_FLAGS=--xla_gpu_x=1" in said


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much(tpu, capsys):
    flags = ["--config.train.batch_size=4096", "--config.model.context_length=2048", "--config.model.model_dim=1024"]
    assert main(["plan", f"--config={REPOSITORY}/tests/tiny_config.py", "--topology=v5e:2x2", *flags]) == 0
    said = capsys.readouterr().out
    peak, memory = map(float, re.search(r"peak ([\d.]+) GiB of ([\d.]+) GiB", said).groups())
    over = float(re.search(r"does not fit, ([\d.]+) GiB too much", said)[1])
    assert memory == 15.75 and over == pytest.approx(peak - memory, abs=0.02)


@pytest.mark.slow
def test_a_search_ranks_what_fits(tpu):
    heard = []
    plans = search(small(**{"train.batch_size": 16}), "v5e:2x2", heard.append)
    steps = [max(found.terms.values()) for found in plans]
    assert steps == sorted(steps) and all(found.fits for found in plans)
    assert {found.mesh for found in plans} == {(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)}
    assert len(heard) == len(plans) and all(name in line for line in heard for name in plans[0].terms)


@pytest.mark.slow
def test_256_devices_take_two_cores_two_minutes_at_most(tpu):
    """In the process's own time: beside other programs a compilation takes longer, but no more of the cores."""
    config = default_config("SM+LN+G")
    config.model.update(context_length=1024, vocab_size=50304)
    config.train.update(batch_size=512, dtype="bfloat16")
    config.update_from_flattened_dict(mesh_fields(1, 256, 1))
    begin = time.process_time()
    made = plan(config, "v5e:16x16")
    assert time.process_time() - begin < 2 * 120
    assert made.num_devices == 256 and made.fits and made.warnings == 0


@pytest.mark.slow
def test_gpus_are_compiled_for_where_the_plugin_is_installed():
    pytest.importorskip("jax_plugins.xla_cuda12", reason="JAX's CUDA plugin is not installed")
    made = plan(small(), "h100:8")
    assert made.num_devices == 8 and made.fits and made.collectives["all-reduce"].calls > 0
    assert made.traffic > 0


def test_shardings_do_not_depend_on_whose_devices_they_are(tpu):
    _, devices = devices_of("v5e:2x4")
    state = jax.eval_shape(functools.partial(init_state, small(), Transformer(model_config(small(), 1024))))
    meshes = make_mesh(2, 2, 2), make_mesh(2, 2, 2, devices)
    specs = [jax.tree.map(lambda sharding: sharding.spec, tree_sharding(state, mesh)) for mesh in meshes]
    assert specs[0] == specs[1] and batch_sharding(meshes[0]).spec == batch_sharding(meshes[1]).spec
