"""What a user may get wrong, as a table: each ends in one sentence that names it and exit code 2, with no traceback.

Cases that need files of their own are in the tests of their modules; main_test.py has those that need a trained run.
"""

import importlib.util

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.commands.main import main
from jax_entropy.config import check, default_config, flatten
from jax_entropy.errors import UserError
from jax_entropy.notation import EXAMPLES
from tests import REPOSITORY

TINY = f"--config={REPOSITORY}/tests/tiny_config.py"

# what only the command finds; tests/config_test.py has the values that `check` refuses
FIELDS = """
model.attention= model.attention=gpu train.batch_size=12 optimizer.warmup=1000.0 optimizer.lr=1.0 model.layers=3
penalty.lambda=1.0 nothing=3 train.num_steps=1e3 data.files=gs://x data.directory=s3://x
""".split()

MESHES = ["mesh.data=0", "mesh.data=-2", "mesh.data=16", "mesh.fsdp=-1", "mesh.tensor=16", "mesh.tensor=0"]

# beside those of tests/architecture_test.py, which are not asked of the command again
NOTATIONS = """
SM+LN+LN SM(t SM(s) SM^x SM+SNorm(QK)+WNorm(QK) SM+LR(x) LN+SM sm+ln+g SM+LN+G) SM+ScFuFFN+G SM+ScFuFFN^99 ☃
""".split()

LINES = {
    "trian": "train",
    "train": "--config",
    f"train {TINY}": "--workdir",
    f"train {TINY} --workdir=new --x": "--x",
    f"train {TINY} --workdir=new --distributed=perhaps": "takes no value, but was given 'perhaps'",
    f"train {TINY} --workdir=new --profile=x": "profile",
    f"train {TINY} --workdir=new --profile=-1": "profile",
    f"train --config={REPOSITORY} --workdir=new": str(REPOSITORY),
    f"train {TINY} --workdir={REPOSITORY}/setup.cfg": f"workdir={REPOSITORY}/setup.cfg cannot be written",
    "evaluate": "--workdir",
    "evaluate --workdir=nowhere": "nowhere",
    "evaluate --workdir": "--workdir: needs a value",
    "evaluate --workdir=": "--workdir='' is empty; name a path",
    "evaluate --workdir=nowhere --batch_size=x": "batch_size",
    "evaluate --workdir=nowhere --besst": "best",
    "generate": "--workdir",
    "generate --workdir=nowhere --prompt=x": "nowhere",
    "generate --workdir=nowhere --prompt=x --seed=x": "seed",
    "generate --workdir=nowhere --prompt_file=missing": "missing",
    "report": "--workdir",
    "report --workdir=nowhere": "nowhere",
    "status": "--workdir",
    "status nowhere": "nowhere",
    "status nowhere --deep": "deep",
    "convert": "--workdir",
    "convert --workdir=nowhere": "--to",
    "convert --workdir=nowhere --to=hf": "'hf'",
    "convert --workdir=nowhere --to=huggingface": "--huggingface",
    "convert --workdir=nowhere --to=huggingface --huggingface=out": "nowhere",
    "convert --workdir=new --to=workdir --huggingface=missing": "missing",
    "convert --workdir=new --to=workdir --huggingface=missing --best": "--best",
    "census": "--architecture",
    "census --architecture=SM --num_layers=0": "num_layers",
    "census --architecture=SM --num_heads=5": "num_heads",
    "census --architecture=SM --context_length=-1": "context_length",
    "census --architecture=SM --config=quickstart": "exclude",
    "census --num_layers=3 --config=quickstart": "goes with --architecture",
    "census --config=nowhere.py": "nowhere.py",
    "bench": "attention",
    "bench stpe": "step",
    "bench step --rounds=0": "--rounds=0",
    "bench step --rounds=x": "rounds",
    "bench step --peer_python=missing": "missing",
    "bench attention --rounds=0": "--rounds=0",
    "bench data": "--config",
    "bench monitoring": "--config",
    f"plan {TINY}": "--topology",
    f"plan {TINY} --topology=v9:2x2": "v9",
    f"plan {TINY} --topology=v5e": "v5e",
    f"plan {TINY} --topology=v5e:4x4 --mesh=1,2": "1,2",
    f"plan {TINY} --topology=v5e:4x4 --mesh=a,b,c": "a,b,c",
    f"plan {TINY} --topology=v5e:4x4 --mesh=1,1,-1 --search": "--search tries meshes, and goes without --mesh",
    f"plan {TINY} --topology=v5e:4x4 --efficiency=2": "2.0",
    "private": "setup",
    "private genrate": "generate",
    "private setup --check --force": "--force",
}


def check_refused(capsys, arguments, named):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and said.startswith("jax-entropy: "), said
    assert named in said, said


@pytest.mark.parametrize("line", LINES)
def test_bad_command_lines(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(capsys, line.split(), LINES[line])
    assert not list(tmp_path.iterdir())


def test_a_compiled_peer_without_torch(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_refused(capsys, ["bench", "step", "--compiled"], "name a Python that has them as peer_python")


PLACES = {
    "JAX_NUM_PROCESSES=two": "'two'",
    "JAX_NUM_PROCESSES=0": "'0'",
    "JAX_PROCESS_ID=-1": "'-1'",
    "JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=2": "JAX_PROCESS_ID=2 must be below",
    "JAX_COORDINATOR_ADDRESS=localhost": "HOST:PORT",
    "JAX_COORDINATOR_ADDRESS=:99999": "HOST:PORT",
    "": "(coordinator_address should be defined); set JAX_COORDINATOR_ADDRESS",
}


@pytest.mark.parametrize("variables", PLACES)
def test_a_process_that_does_not_know_its_place(variables, tmp_path, monkeypatch, capsys):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))

    def initialize(**_):
        raise ValueError("coordinator_address should be defined.\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    arguments = ["train", TINY, f"--workdir={tmp_path}/new", "--distributed"]
    check_refused(capsys, arguments, PLACES[variables])


@pytest.mark.parametrize("field", FIELDS)
def test_bad_values_of_fields(field, tmp_path, capsys, corpus_directory):
    name = field.partition("=")[0].split(".")[-1]
    directory = f"--config.data.directory={corpus_directory}"
    check_refused(capsys, ["train", TINY, f"--workdir={tmp_path}/run", directory, f"--config.{field}"], name)


@pytest.mark.parametrize("field", MESHES)
def test_bad_meshes(field, tmp_path, capsys):
    check_refused(capsys, ["train", TINY, f"--workdir={tmp_path}/run", f"--config.{field}"], "mesh")


@pytest.mark.parametrize("notation", NOTATIONS)
def test_bad_notations(notation, capsys):
    check_refused(capsys, ["census", f"--architecture={notation}"], notation if "^99" not in notation else "^99")


alphabet = st.sampled_from(
    [*"+()^09tx. ", "SM", "EReg", "LN", "RN", "G", "R", "LR", "WNorm", "SNorm", "QK", "FFN", "ScFFN"]
)


@given(st.one_of(st.text(max_size=20), st.lists(alphabet, max_size=8).map("".join), st.sampled_from(EXAMPLES)))
def test_any_notation_is_understood_or_refused(text):
    try:
        config = architecture(text)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 or "\n" in text or "\r" in text
    else:
        assert isinstance(config, ModelConfig) and architecture(str(config)) == config


@given(
    st.sampled_from(sorted(flatten(default_config("SM")))),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
    ),
)
def test_any_value_of_any_field_is_accepted_or_refused(name, value):
    config = default_config("EReg(SM(t)+ScFuFFN)")
    try:
        config.update_from_flattened_dict({name: value})
        check(config)
    except (UserError, TypeError) as error:  # TypeError: ml_collections', of another type than the field's
        assert str(error)
