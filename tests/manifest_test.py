"""The hashes of a folder's files: what `sha256sum` reads, and what a changed folder is told to be."""

import shutil
import subprocess

import pytest

from jax_entropy.manifest import MANIFEST, damage, seal


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/shard").write_bytes(bytes(range(256)))
    (tmp_path / "empty").touch()
    seal(tmp_path)
    return tmp_path


def test_sha256sum_reads_it(folder):
    assert damage(folder) is None
    subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=folder, check=True, capture_output=True)


def test_it_moves_with_its_folder(folder, tmp_path_factory):
    assert damage(shutil.copytree(folder, tmp_path_factory.mktemp("other") / "place")) is None


def test_what_changed_is_named(folder):
    shard = folder / "deep/er/shard"
    shard.write_bytes(bytes(range(255)))
    assert damage(folder) == "deep/er/shard is not as written"
    shard.unlink()
    assert damage(folder) == "deep/er/shard is missing"
    shard.write_bytes(bytes(range(256)))
    assert damage(folder) is None
    (folder / "more").touch()
    assert damage(folder) == "more is not as written"
    (folder / MANIFEST).unlink()
    assert damage(folder) == f"{MANIFEST} is missing"
