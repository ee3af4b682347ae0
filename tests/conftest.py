"""Every test sees eight virtual CPU devices and refuses silent rank promotion; tests of runs share one unbroken run."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # chosen before jax is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("PIP_CONSTRAINT", None)  # the versions of this environment, not of the engine's own

import jax
import pytest

from tests.run_helpers import run
from tests.tiny_config import get_config

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


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
