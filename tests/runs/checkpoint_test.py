import os
import re
import socket
import subprocess
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_entropy.errors import UserError
from jax_entropy.manifest import MANIFEST
from jax_entropy.runs.checkpoint import Checkpointer
from tests import REPOSITORY
from tests.runs.checkpoint_helpers import abstract, batches, bits, folders, make_state, saved


@pytest.mark.parametrize("num_devices_before, num_devices_after", [(1, 1), (8, 2), (2, 1), (1, 8)])
def test_round_trip_is_exact_to_the_bit_on_any_layout(tmp_path, num_devices_before, num_devices_after):
    state = make_state(3, num_devices_before)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(3, state, None, {"config": {"name": "SM+LN", "rate": 0.1}})
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() == 3
        restored, meta = checkpointer.restore(3, abstract(state, num_devices_after), None)
    assert meta == {"config": {"name": "SM+LN", "rate": 0.1}}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert len(restored["params"]["blocks"]["kernel"].sharding.device_set) == num_devices_after


def test_eight_devices_to_two_to_one(tmp_path):
    state = make_state(1, 8)
    for step, num_devices in enumerate([2, 1]):
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(step, state, None, {})
            state, _ = checkpointer.restore(step, abstract(state, num_devices), None)
    assert bits(state) == bits(make_state(1))


def test_data_position_survives(tmp_path):
    state, iterator = make_state(), batches()
    for _ in range(7):
        next(iterator)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, state, iterator, {})
        expected = [next(iterator) for _ in range(300)]
        again = batches()
        checkpointer.restore(7, abstract(state), again)
    np.testing.assert_array_equal([next(again) for _ in range(300)], expected)


def test_state_may_be_donated_while_it_is_saved(tmp_path):
    state = {"x": jnp.arange(1 << 22, dtype=jnp.float32)}
    expected = bits(state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, None, {})
        for _ in range(20):
            state = step(state)
        jax.block_until_ready(state)
        restored, _ = checkpointer.restore(0, abstract(state), None)
    assert bits(restored) == expected


def test_nothing_saved_is_none_and_makes_no_directory(tmp_path):
    with Checkpointer(tmp_path / "runs" / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.best_step() is None
        with pytest.raises(UserError, match="no checkpoint of step 3"):
            checkpointer.restore(3, abstract(make_state()), None)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["p[0]", "sta*", "back\\slash", "no text \udcff", "new\nline"])
def test_a_directory_may_have_any_name(tmp_path, name):
    saved(tmp_path / "star", [7])  # which a pattern would match
    saved(tmp_path / name, [1, 2], loss_1=1.0)
    assert folders(tmp_path / name) == [1, 2] and folders(tmp_path / "star") == [7]
    with Checkpointer(tmp_path / name) as checkpointer:
        assert (checkpointer.latest_step(), checkpointer.best_step()) == (2, 1)
        assert bits(checkpointer.restore(2, abstract(make_state()), None)[0]) == bits(make_state(2))
        link = checkpointer._alias.path
        assert link.is_symlink()
    assert not link.parent.exists()


def test_what_was_written_and_cannot_be_read_back_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_entropy.runs.orbax._is_harmless", lambda path: True)  # so that Orbax loses all arrays
    with Checkpointer(tmp_path / "p[0]") as checkpointer:
        checkpointer.save(1, make_state(), None, {})
        with pytest.raises(UserError, match="step 1 could not be saved in .*: what was written cannot be read back"):
            checkpointer.latest_step()
        assert checkpointer.latest_step() is None and not os.listdir(tmp_path / "p[0]")


def test_keeps_the_newest_and_the_best(tmp_path):
    saved(tmp_path, [10, 20, 30, 40, 50], loss_10=3.0, loss_20=1.5, loss_30=float("nan"), loss_50=2.0)
    assert folders(tmp_path) == [20, 40, 50]
    with Checkpointer(tmp_path) as checkpointer:
        assert (checkpointer.latest_step(), checkpointer.best_step()) == (50, 20)
        assert bits(checkpointer.restore(20, abstract(make_state()), None)[0]) == bits(make_state(20))
        checkpointer.save(60, make_state(60), None, {}, 1.0)
        checkpointer.save(70, make_state(70), None, {})
        checkpointer.save(80, make_state(80), None, {})
        assert checkpointer.best_step() == 60
    assert folders(tmp_path) == [60, 70, 80]


def test_without_validation_no_step_is_the_best(tmp_path):
    saved(tmp_path, [1, 2, 3], keep=1)
    assert folders(tmp_path) == [3]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.best_step() is None


def test_poll_never_waits_and_the_manifest_comes_without_closing(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, make_state(1), None, {})
    deadline = time.monotonic() + 60
    while not (tmp_path / "1" / MANIFEST).exists() and time.monotonic() < deadline:
        start = time.monotonic()
        checkpointer.poll()
        assert time.monotonic() - start < 0.1
        time.sleep(0.01)
    assert len((tmp_path / "1" / MANIFEST).read_text().splitlines()) > 5
    checkpointer.close()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p | {"temperature": jnp.zeros(3)}, "has float32 () for params/temperature, .* needs float32 (3,)"),
        (
            lambda p: p | {"temperature": jnp.zeros((), jnp.bfloat16)},
            "has float32 () for params/temperature, .* needs bfloat16 ()",
        ),
        (lambda p: p | {"head": jnp.zeros(3)}, "has nothing for params/head, .* needs float32 (3,)"),
        (
            lambda p: {k: p[k] for k in p if k != "embedding"},
            "has bfloat16 (16, 3) for params/embedding, .* needs nothing",
        ),
        (
            lambda p: p | {"embedding": {"table": p["embedding"]}},
            "has nothing for params/embedding/table, .* needs bfloat16 (16, 3)",
        ),
    ],
)
def test_another_tree_shape_or_dtype_is_refused(tmp_path, change, message):
    state = make_state()
    saved(tmp_path, [1])
    iterator = batches()
    position = iterator.get_state()
    wanted = abstract(state | {"params": change(state["params"])})
    refused = pytest.raises(UserError, match=re.escape(message).replace(r"\.\*", ".*"))
    with Checkpointer(tmp_path) as checkpointer, refused:
        checkpointer.restore(1, wanted, iterator)
    assert iterator.get_state() == position


def test_what_was_not_saved_cannot_be_restored(tmp_path):
    saved(tmp_path, [10, 20])
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UserError, match="no checkpoint of step 33 .*'10', '20'"):
            checkpointer.restore(33, abstract(make_state()), None)
        with pytest.raises(UserError, match="without a data position"):
            checkpointer.restore(20, abstract(make_state()), batches())


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="at least 1 .* not 0"):
        Checkpointer(tmp_path, keep=0)


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path):
    with pytest.raises(TypeError), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), None, {"not JSON": object()})


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
address, index, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=index)
import grain, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_entropy.runs.checkpoint import Checkpointer
sharding = NamedSharding(jax.make_mesh((4,), ("data",), (AxisType.Auto,)), PartitionSpec("data"))
x = np.arange(64, dtype=np.float32)
state = {"x": jax.make_array_from_process_local_data(sharding, x[32 * index : 32 * index + 32])}
iterator = iter(grain.MapDataset.range(100)[index::2].to_iter_dataset())
next(iterator)
with Checkpointer(directory, notify=lambda text: print("notify", text)) as checkpointer:
    for step in 1, 2, 3:
        checkpointer.save(step, state, iterator, {"step": step}, float(step))
    print("latest", checkpointer.latest_step(), checkpointer.best_step())
    if index == 0:
        open(directory + "/3/meta/metadata", "a").write(" ")
    print("latest", checkpointer.latest_step())
    abstract = {"x": jax.ShapeDtypeStruct((64,), np.float32, sharding=sharding)}
    restored, meta = checkpointer.restore(2, abstract, iterator)
    for shard in restored["x"].addressable_shards:
        np.testing.assert_array_equal(shard.data, x[shard.index])
"""


def test_two_processes_agree_and_one_goes_on(tmp_path):
    tmp_path = tmp_path / "sweep[lr=0.1]"  # an odd name, which each process works around by itself
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(index), str(tmp_path)],
            stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for index, output in enumerate(outputs):
        lines = output.splitlines()
        assert [line for line in lines if line.startswith("latest")] == ["latest 3 1", "latest 2"]
        named = [line for line in lines if line.startswith("notify")]
        assert len(named) == (0 if index else 2)
        assert all(f"step {step} " in line for step, line in zip((3, 2), named, strict=False))
    iterator = iter(grain.MapDataset.range(100).to_iter_dataset())
    with Checkpointer(tmp_path, notify=lambda _: None) as checkpointer:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        tree = {"x": jax.ShapeDtypeStruct((64,), jnp.float32, sharding=sharding)}
        restored, meta = checkpointer.restore(checkpointer.latest_step(), tree, iterator)
    np.testing.assert_array_equal(restored["x"], np.arange(64))
    assert meta == {"step": 2} and next(iterator) == 1
