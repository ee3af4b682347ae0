"""The tree of the package, held by reading imports: data moves downward only, and what needs no JAX loads none."""

import ast
import graphlib
import subprocess
import sys

import pytest

import jax_entropy
from tests import REPOSITORY

# Each room imports from those before it. Mathematics first, then what is done with it.
ROOMS = """
    errors paths manifest supervise
    notation architecture entropy chips data
    fields seeds config config_file sharding
    products linear annealing attention parts norms layers model census loss metrics optimizer state
    runs plan evaluate generate huggingface
    training private.engine private.program private.session private.cost private
    report inspection export sweep bench commands __main__
""".split()

PACKAGE = REPOSITORY / "jax_entropy"
FILES = {".".join(path.with_suffix("").relative_to(REPOSITORY).parts): path for path in PACKAGE.rglob("*.py")}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
del FILES["jax_entropy"]  # the public names, of every room


def imported(nodes):
    """Full names of what is imported in these nodes, and in what they hold."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)


BODIES = {name: ast.parse(path.read_text()).body for name, path in FILES.items()}
IMPORTS = {name: set(imported(body)) for name, body in BODIES.items()}
LOADED = {  # when the module is: neither in a function, nor for type checkers
    name: set(imported(node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))))
    for name, body in BODIES.items()
}


def reached(module, imports):
    """Everything that a module imports, and that what it imports does."""
    found, new = set(), {module}
    while new:
        found |= new
        new = set().union(*(imports.get(name, ()) for name in new)) - found
    return found - {module}


def room(module):
    name = module.removeprefix("jax_entropy.")
    return max((room for room in ROOMS if f"{name}.".startswith(f"{room}.")), key=len, default=None)


def rooms(modules):
    return {room(name) for name in modules if name in FILES}


def test_every_module_is_in_a_room_and_every_room_is_there():
    assert rooms(FILES) == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_nothing_is_imported_from_a_room_above(name):
    below = set(ROOMS[: ROOMS.index(name) + 1])
    above = {module: rooms(IMPORTS[module]) - below for module in FILES if room(module) == name}
    assert not any(above.values()), above


def test_no_modules_import_each_other():
    """A circle is a CycleError."""
    tuple(graphlib.TopologicalSorter({name: IMPORTS[name] & set(FILES) for name in FILES}).static_order())


def test_training_knows_neither_private_execution_nor_plans():
    training = {name for name in FILES if room(name) == "training"}
    known = rooms(set().union(*(reached(name, IMPORTS) for name in training)))
    assert not {name for name in known if name.startswith(("private", "plan"))}


def test_no_variable_of_the_environment_decides_what_a_step_computes():
    """A step is a function of its config; only what plans, reads or writes asks the environment."""
    mathematics = ROOMS[ROOMS.index("sharding") : ROOMS.index("runs")]
    assert not {name for name in FILES if room(name) in mathematics and "os" in IMPORTS[name]}


def test_entropy_knows_nothing_but_arrays():
    assert {name for name in rooms(IMPORTS["jax_entropy.entropy"])} <= {"errors"}


HEAVY = {"jax", "flax", "optax", "orbax", "grain", "tensorflow", "tensorflow_datasets", "matplotlib", "tensorboardX"}


@pytest.mark.parametrize("module", ["runs.workdir", "runs.status", "commands.main", "commands.parse", "config"])
def test_what_is_asked_from_outside_imports_no_jax(module):
    assert not {name.partition(".")[0] for name in reached(f"jax_entropy.{module}", LOADED)} & HEAVY


def test_a_card_is_measured_with_little_installed():
    """Flax, optax and what these bring; nothing that reads corpora, saves or draws."""
    measured = ("bench.device", "bench.parts", "bench.cases", "census", "config", "model", "state")
    loaded = set().union(*(reached(f"jax_entropy.{module}", LOADED) for module in measured))
    outside = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"jax_entropy"}
    assert outside <= {"jax", "flax", "optax", "einops", "ml_collections", "numpy"}


def test_type_checkers_see_the_public_names():
    (block,) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"jax_entropy.{home}" for name, home in jax_entropy._HOME.items()}


FRESH = """
import sys
import jax_entropy as je
import jax_entropy.runs.status, jax_entropy.commands.main
assert {"evaluate", "load_run", "__version__"} <= set(dir(je)) and je.__version__[0].isdigit()
assert "jax" not in sys.modules and "orbax" not in sys.modules

import importlib
from types import ModuleType
homes = {importlib.import_module(f"jax_entropy.{home}") for home in je._HOME.values()}
for name in je.__all__:  # the modules were first
    assert not isinstance(getattr(je, name), ModuleType), name
from jax_entropy import evaluate, attention
from jax_entropy.evaluate import evaluate_batches
del sys.modules["jax_entropy.evaluate"]
import jax_entropy.evaluate  # the function was first
assert je.evaluate is evaluate and callable(je.evaluate) and je.attention is attention
assert not hasattr(je, "nothing")
"""


def test_public_names_are_what_they_say_whatever_was_imported_before():
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
