"""Every test sees eight virtual CPU devices and refuses silent rank promotion; tests of runs share one unbroken run."""

import importlib.metadata
import os
import signal
import subprocess

os.environ["JAX_PLATFORMS"] = "cpu"  # chosen before jax is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("PIP_CONSTRAINT", None)  # the versions of this environment, not of the engine's own
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
# programs this small are compiled for longer than they run
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):  # a third of the time again; later XLA knows no such option
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

from tests.damage import Disk
from tests.run_helpers import run
from tests.tiny_config import get_config

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it, and all that it starts


def pytest_collection_modifyitems(items):
    """The slowest begin, so that workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def compilations(tmp_path_factory):
    """What the processes that tests start have compiled: the same small steps, once for all of them."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compilations"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture
def disk(tmp_path):
    """Makes a small disk of so many kilobytes."""
    made = []

    def make(kilobytes):
        made.append(Disk(tmp_path / "disk", kilobytes))
        return made[-1]

    yield make
    for one in made:
        subprocess.run(["umount", "-l", str(one.path)], check=True)


@pytest.fixture
def tiny(corpus_directory):
    def config(architecture="EReg(SM(t)+ScFuFFN)", **fields):
        config = get_config(architecture)
        config.data.directory = str(corpus_directory)
        config.mesh.data = 8
        config.update_from_flattened_dict(fields)
        return config

    return config


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, corpus_directory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    done = run(workdir, corpus_directory)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout
