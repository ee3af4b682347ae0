"""One engine for the tests of private execution: it starts once, and each test finds it as if it had just started."""

import pytest

from jax_entropy.errors import UserError
from jax_entropy.private.engine import environment
from jax_entropy.private.engine.engine import Engine, Setting
from tests.private.helpers import make_workdir


@pytest.fixture(scope="session")
def installed(request):
    """The engine's environment, made where it is missing, which is said; tests are skipped where it cannot be."""
    captured = request.config.pluginmanager.getplugin("capturemanager")

    def notify(line):
        with captured.global_and_fixture_disabled():
            print(f"\nthe engine of the tests in {environment.default_directory()}: {line}", flush=True)

    try:
        environment.setup(notify)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def one_engine(installed):
    with Engine(Setting()) as started:
        yield started


@pytest.fixture
def engine(one_engine):
    """engine(setting) is the one engine without anything that it held before."""
    return one_engine.reset


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A run of two layers that was never trained."""
    return make_workdir(tmp_path_factory.mktemp("private") / "run", **{"model.context_length": 32})
