import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_entropy.errors import UserError
from jax_entropy.manifest import MANIFEST
from jax_entropy.runs.checkpoint import Checkpointer
from tests import REPOSITORY
from tests.damage import flip
from tests.runs.checkpoint_helpers import abstract, bits, folders, make_state, saved


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "deleted": Path.unlink,
    "truncated": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "first bit flipped": lambda path: flip(path, 0),
    "middle bit flipped": lambda path: flip(path, 4 * path.stat().st_size + 5),
    "last bit flipped": lambda path: flip(path, 8 * path.stat().st_size - 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_to_any_file_is_found_and_the_older_step_used(tmp_path, damage):
    good = saved(tmp_path / "good", [10, 20], loss_20=1.0)
    names = [path.relative_to(good) for path in (good / "20").rglob("*") if path.is_file()]
    assert {MANIFEST, "_CHECKPOINT_METADATA", "_METADATA"} <= {name.name for name in names}
    for name in names:
        directory = tmp_path / "copy"
        shutil.copytree(good, directory)
        damage(directory / name)
        messages = []
        with Checkpointer(directory, notify=messages.append) as checkpointer:
            assert checkpointer.latest_step() == checkpointer.latest_step() == 10, name
            assert checkpointer.best_step() is None
            with pytest.raises(UserError, match="step 20 .* is damaged"):
                checkpointer.restore(20, abstract(make_state()), None)
            assert bits(checkpointer.restore(10, abstract(make_state()), None)[0]) == bits(make_state(10))
        assert "step 20" in messages[0] and str(directory) in messages[0], name
        assert messages[1:] == ["the checkpoint of step 10 is used instead"], name
        if name.name != MANIFEST:
            assert str(name.relative_to("20")) in messages[0]
        shutil.rmtree(directory)


def test_any_bit_of_the_manifest_counts(tmp_path):
    good = saved(tmp_path / "good", [1])
    manifest = good / "1" / MANIFEST
    for bit in range(0, 8 * manifest.stat().st_size, 53):
        flip(manifest, bit)
        with pytest.raises(UserError, match="damaged"), Checkpointer(good, notify=lambda _: None) as checkpointer:
            checkpointer.latest_step()
        flip(manifest, bit)
    with Checkpointer(good) as checkpointer:
        assert checkpointer.latest_step() == 1


def test_an_added_file_is_damage(tmp_path):
    saved(tmp_path, [1, 2])
    (tmp_path / "2" / "state" / "extra").write_text("x")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1


def test_all_damaged_is_an_error_and_touches_nothing(tmp_path):
    saved(tmp_path, [10, 20])
    for step in "10", "20":
        flip(next((tmp_path / step / "state" / "d").iterdir()), 100)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    messages = []
    sentence = pytest.raises(UserError, match="all checkpoints in .* are damaged .steps 10, 20.")
    with Checkpointer(tmp_path, notify=messages.append) as checkpointer, sentence as error:
        checkpointer.latest_step()
    assert "\n" not in str(error.value)
    assert len(messages) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_damaged_older_step_is_not_counted_as_kept(tmp_path):
    saved(tmp_path, [10, 20, 30], keep=3)
    flip(tmp_path / "20" / "meta" / "metadata", 3)
    messages = []
    with Checkpointer(tmp_path, keep=3, notify=messages.append) as checkpointer:
        assert checkpointer.latest_step() == 30
        assert messages == []
        checkpointer.save(40, make_state(40), None, {})
    assert folders(tmp_path) == [10, 30, 40]
    assert len(messages) == 1 and "step 20" in messages[0]


def test_damaged_newer_step_is_replaced_when_training_comes_by_again(tmp_path):
    saved(tmp_path, [10, 20, 30])
    (tmp_path / "30" / MANIFEST).unlink()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 20
        checkpointer.save(30, make_state(99), None, {"again": True})
        restored, meta = checkpointer.restore(30, abstract(make_state()), None)
        assert checkpointer.latest_step() == 30
    assert bits(restored) == bits(make_state(99)) and meta == {"again": True}


def test_going_on_from_an_older_step_gives_up_the_newer_ones(tmp_path):
    saved(tmp_path, [10, 20])
    messages = []
    with Checkpointer(tmp_path, notify=messages.append) as checkpointer:
        checkpointer.restore(10, abstract(make_state()), None)
        assert folders(tmp_path) == [10, 20]
        checkpointer.save(15, make_state(15), None, {})
        assert checkpointer.latest_step() == 15
    assert folders(tmp_path) == [10, 15]
    assert len(messages) == 1 and "step 20" in messages[0]


def test_saving_a_step_twice_keeps_the_second(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, make_state(1), None, {})
        checkpointer.save(5, make_state(2), None, {}, 1.0)
        assert checkpointer.best_step() == 5
        assert bits(checkpointer.restore(5, abstract(make_state()), None)[0]) == bits(make_state(2))
    assert os.listdir(tmp_path) == ["5"]


def test_a_kill_while_a_step_is_replaced_loses_neither(tmp_path, monkeypatch):
    """Nothing is deleted before the new one has its name, and a run takes back what a kill left without one."""
    delete, found = shutil.rmtree, []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (found.append(folders(tmp_path)), delete(path)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, make_state(1), None, {})
        checkpointer.save(5, make_state(2), None, {})
    assert found == [[5]]
    (tmp_path / "5").rename(tmp_path / "5.unfinished")  # where a kill came between the two names
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.take_back()
        assert checkpointer.latest_step() == 5
        assert bits(checkpointer.restore(5, abstract(make_state()), None)[0]) == bits(make_state(2))
    cut(next((tmp_path / "5").rglob("manifest.ocdbt")))
    (tmp_path / "5").rename(tmp_path / "5.unfinished")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.take_back()
        assert checkpointer.latest_step() is None


def test_leftovers_are_ignored_then_removed_and_said_once(tmp_path):
    messages = []
    saved(tmp_path, [1])
    (tmp_path / "2").mkdir()
    for name in "3.unfinished", "3.unfinished.orbax-checkpoint-tmp", "4.removed", "5.orbax-checkpoint-tmp":
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / "6.mine").mkdir()
    (tmp_path / "notes.txt").touch()
    with Checkpointer(tmp_path, notify=messages.append) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert messages == []
        checkpointer.save(2, make_state(2), None, {})
        checkpointer.save(3, make_state(3), None, {})
        assert checkpointer.latest_step() == 3
    assert len(messages) == 1 and "3.unfinished" in messages[0]
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "6.mine", "notes.txt"]


def test_only_leftovers_is_a_fresh_start(tmp_path):
    (tmp_path / "2").mkdir()
    (tmp_path / "3.unfinished.orbax-checkpoint-tmp").mkdir()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None


def test_a_step_gets_its_name_once_its_manifest_is_there(tmp_path, monkeypatch):
    rename, complete = Path.rename, []

    def checked(path, target):
        complete.append((path / MANIFEST).exists())
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", checked)
    saved(tmp_path, [1, 2])
    assert complete == [True, True]


SAVE_FOREVER = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from jax_entropy.runs.checkpoint import Checkpointer
with Checkpointer(sys.argv[1]) as checkpointer:
    first = (checkpointer.latest_step() or 0) + 1
    for step in range(first, 100_000):
        checkpointer.save(step, {"x": jnp.full((1 << 19,), step, jnp.int32)}, None, {"step": step})
        print(step, flush=True)
"""


def test_killed_while_saving(tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = {"x": jax.ShapeDtypeStruct((1 << 19,), jnp.int32, sharding=sharding)}
    rng, reached = np.random.default_rng(0), 0
    for _ in range(4):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        started = (int(line) for line in process.stdout if line.strip().isdigit())
        seen = [next(started) for _ in range(rng.integers(1, 5))]
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        last = max([*seen, *started])
        process.wait()
        with Checkpointer(tmp_path, notify=pytest.fail) as checkpointer:
            latest = checkpointer.latest_step() or 0
            # A save returns once the one before it is complete; the last may be complete, or even a next one unsaid.
            assert last - 1 <= latest <= last + 1 and latest >= reached
            if latest:
                restored, meta = checkpointer.restore(latest, tree, None)
                assert meta == {"step": latest} and (np.asarray(restored["x"]) == latest).all()
        reached = latest
    assert reached >= 3


@pytest.fixture
def small_disk(disk):
    return disk(3 << 10)


def test_disk_full(small_disk, capfd):
    state = make_state(1)
    too_large = {"x": jax.random.normal(jax.random.key(0), (1 << 20,))}
    with Checkpointer(small_disk.path / "checkpoints") as checkpointer:
        checkpointer.save(1, state, None, {})
        checkpointer.save(2, too_large, None, {})
        with pytest.raises(UserError, match="step 2 could not be saved in .*: No space left on device") as error:
            while True:
                checkpointer.poll()
        assert "\n" not in str(error.value)
        assert os.listdir(small_disk.path / "checkpoints") == ["1"]
        assert bits(checkpointer.restore(1, abstract(state), None)[0]) == bits(state)

        checkpointer.save(2, too_large, None, {})
        with pytest.raises(UserError, match="No space left"):
            checkpointer.save(3, state, None, {})
        checkpointer.save(3, state, None, {})
        assert checkpointer.latest_step() == 3

        small_disk.fill()
        with pytest.raises(UserError, match="step 4 .*No space left"):
            checkpointer.save(4, state, None, {})
        assert sorted(os.listdir(small_disk.path / "checkpoints")) == ["1", "3"]
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


SAVE_TOO_MUCH = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from jax_entropy.runs.checkpoint import Checkpointer
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, {"x": jax.random.normal(jax.random.key(0), (1 << 20,))}, None, {})
    checkpointer.save(2, {"x": jax.random.normal(jax.random.key(0), (1 << 20,))}, None, {})
"""


@pytest.mark.parametrize("free", [1 << 20, 0])
def test_disk_full_lets_the_process_end(small_disk, free):
    small_disk.fill(but=free)
    result = subprocess.run(
        [sys.executable, "-c", SAVE_TOO_MUCH, str(small_disk.path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert lines[-1].startswith("jax_entropy.errors.UserError: the checkpoint of step 1 could not be saved")
    assert not any("absl" in line or line.startswith(("ERROR", "WARNING")) for line in lines)


def test_read_only_disk_can_be_read_but_not_written(small_disk, capfd):
    saved(small_disk.path / "checkpoints", [1])
    small_disk.read_only()
    with Checkpointer(small_disk.path / "checkpoints") as checkpointer:
        step = checkpointer.latest_step()
        assert bits(checkpointer.restore(step, abstract(make_state()), None)[0]) == bits(make_state(1))
        with pytest.raises(UserError, match="step 2 could not be saved in .*: Read-only file system"):
            checkpointer.save(2, make_state(2), None, {})
    with Checkpointer(small_disk.path / "new") as checkpointer, pytest.raises(UserError, match="Read-only file system"):
        checkpointer.save(2, make_state(2), None, {})
    assert "Traceback" not in capfd.readouterr().err


def test_disk_full_while_the_manifest_is_written(tmp_path, monkeypatch):
    saved(tmp_path, [1])
    write_bytes = Path.write_bytes

    def fails(path, content):
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(UserError, match="step 2 .*No space left on device"):
        saved(tmp_path, [2])
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["1"]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1


def test_directory_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with Checkpointer(tmp_path / "file" / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(UserError, match="Not a directory"):
            checkpointer.save(1, make_state(), None, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        saved(tmp_path, [1])
