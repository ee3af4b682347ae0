"""Config files: found by path or name, run, changed by text; what is wrong with one is said with file and line."""

import configparser
import os

import pytest

from jax_entropy import config_file
from jax_entropy.config import check, default_config
from jax_entropy.config_file import change, load_config
from jax_entropy.errors import UserError
from tests import REPOSITORY

HEAD = """from jax_entropy.config import default_config
def get_config(architecture='SM'):
    c = default_config(architecture)
"""

BAD_FILES = {
    "    c.train.num_steps = nope\n": ", line 4: NameError: name 'nope' is not defined",
    "    c.train.num_steps = [][1]\n": ", line 4: IndexError: list index out of range",
    "    assert c is None, 'no way'\n": ", line 4: AssertionError: no way",
    "    return get_config(architecture)\n": "RecursionError",
    "    raise SystemExit\n": ", line 4: SystemExit",
    "    c.seed = c.optimizer.warmpu\n": ", line 4: optimizer.warmpu is not a field; did you mean 'optimizer.warmup'?",
    "    c.trian.num_steps = 3\n": ", line 4: trian is not a field; did you mean 'train'?",
    "    c.train.num_steps = 1e3\n": ", line 4: num_steps=1000.0 must be a whole number",
    "    c.train.update(num_steps='many')\n": ", line 4: num_steps=many must be a whole number",
    "    c.data.source = 3\n": ", line 4: source=3 must be text",
    "    c.model = 3\n": ", line 4: model is a section",
    "    c = [\n": "SyntaxError",
    "    return 3\n": "returns int, not a ConfigDict",
}


@pytest.mark.parametrize("body", BAD_FILES)
def test_a_file_that_raises_is_named_with_its_line(body, tmp_path):
    path = tmp_path / "file.py"
    path.write_text(HEAD + body)
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.count(". ") == 0
    assert BAD_FILES[body] in message, message


@pytest.mark.parametrize(
    ("text", "architecture", "message"),
    [
        ("x = 3", "", "has no function get_config"),
        ("def get_config(): return 3", ":SM", "takes no architecture; leave ':SM' out"),
        ("def get_config(name): return 3", "", "needs an architecture: "),
        ("import nonsense_that_is_not_there", "", "line 1: ModuleNotFoundError"),
        ("\0", "", "SyntaxError|ValueError"),
    ],
)
def test_a_file_without_what_is_asked_of_it_is_named(text, architecture, message, tmp_path):
    path = tmp_path / "file.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(f"{path}{architecture}")


def test_the_exception_behind_a_sentence_is_its_cause(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(HEAD + "    c.train.num_steps = nope\n")
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    assert isinstance(caught.value.__cause__, NameError)


def test_files_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = load_config("quickstart:SM+LN+G")
    assert named.to_dict() == load_config(f"{REPOSITORY}/configs/quickstart.py:SM+LN+G").to_dict()
    assert load_config("quickstart").architecture == "EReg(SM(t)+ScFuFFN)"
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "mine.py").write_text(HEAD + "    return c\n")
    assert load_config("a:b/mine.py:SM+R").architecture == "SM+R"
    monkeypatch.setenv("HOME", str(tmp_path / "a:b"))
    assert load_config("~/mine.py").architecture == "SM"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quikstart", "'quikstart' is no config file; did you mean 'quickstart'?"),
        ("configs/quickstart.py", "'configs/quickstart.py' is no config file; did you mean 'quickstart'?"),
        ("mien.py", "did you mean 'mine.py'?"),
        ("gs://bucket/file.py", "is an address on a network"),
        (".", "'.' is a folder, not a config file"),
    ],
)
def test_a_file_that_is_not_there_is_answered_with_one_that_is(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(UserError) as caught:
        load_config(name)
    assert message in str(caught.value)


def test_fields_are_changed_by_text():
    config = default_config("SM")
    config.model.ffn_dim = 7
    texts = {
        "model.ffn_dim": "None", "train.num_steps": "7", "model.tied_head": "false",
        "optimizer.learning_rate": "1e-2", "mesh.rules": "((r'.*', ('data', None)),)", "data.source": "None",
        "data.files": "~/x/*.py", "architecture": "SM+R",
    }  # fmt: skip
    change(config, texts)
    assert config.model.ffn_dim is None and config.train.num_steps == 7
    assert config.model.tied_head is False and config.optimizer.learning_rate == 0.01 and config.architecture == "SM+R"
    assert config.mesh.rules == ((".*", ("data", None)),)
    assert config.data.files == os.path.expanduser("~/x/*.py")
    assert config.data.source == "None"  # a text like any other; check has the last word


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("model.ffn_dim", "wide", "config.model.ffn_dim=wide must be a whole number"),
        ("train.num_steps", "1e3", "config.train.num_steps=1e3 must be a whole number"),
        ("optimizer.learning_rate", "fast", "config.optimizer.learning_rate=fast must be a number"),
        ("model.tied_head", "perhaps", "config.model.tied_head=perhaps must be true or false"),
        ("mesh.rules", "(", "config.mesh.rules=( must be a tuple"),
        ("train.num_step", "3", "config.train.num_step is not a field; did you mean 'train.num_steps'?"),
        ("data.files", "s3://bucket", "config.data.files='s3://bucket' is an address on a network"),
    ],
)
def test_a_text_of_the_wrong_type_is_named(field, text, message):
    with pytest.raises(UserError) as caught:
        change(default_config("SM"), {field: text})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("field", ["data.files", "data.directory", "data.tokenizer"])
def test_an_address_is_no_path_in_a_config_either(field):
    config = default_config("SM")
    config.update_from_flattened_dict({field: "gs://bucket/x"})
    with pytest.raises(UserError, match=f"config.{field}='gs://bucket/x' is an address"):
        check(config)


def test_every_package_and_config_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = {str(path.parent.relative_to(REPOSITORY)) for path in REPOSITORY.glob("jax_entropy/**/__init__.py")}
    assert listed == sorted(
        {folder.replace("/", ".") for folder in folders} | {"jax_entropy.configs", "jax_entropy.configs.sweeps"}
    )
    assert setup["options"]["package_dir"].split() == ["jax_entropy.configs", "=", "configs"]
    for folder, found in (("configs", config_file.BUNDLED), ("configs/sweeps", config_file.bundled("sweeps"))):
        assert set(found) == {path.stem for path in (REPOSITORY / folder).glob("*.py")} != set()
