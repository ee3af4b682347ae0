"""Workdirs from GPT-2 folders and back: the same bits, the same tokens, and runs that evaluate and generate."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_entropy.architecture import architecture
from jax_entropy.commands.main import main
from jax_entropy.config import default_config, model_config
from jax_entropy.data import Tokenizer, load_tokenizer
from jax_entropy.data.tokenizer import train_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.evaluate import evaluate
from jax_entropy.export import export_run
from jax_entropy.generate import generate
from jax_entropy.huggingface.convert import import_run
from jax_entropy.huggingface.folder import check_expressible, from_huggingface, to_huggingface
from jax_entropy.model import Transformer
from jax_entropy.notation import PARTS
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.load import load_run
from jax_entropy.runs.workdir import Workdir
from jax_entropy.state import init_state
from jax_entropy.training.train import train
from tests import REPOSITORY

SOURCE = REPOSITORY / "jax_entropy"
SIZE = dict(num_layers=2, num_heads=2, model_dim=16, context_length=32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([path.read_text() for path in sorted(SOURCE.glob("*.py"))], 400)


def random_variables(config, seed: int = 0):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), shapes)


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """A GPT-2 folder of the kind that Hugging Face publishes: gelu_new and a tokenizer."""
    config = architecture(
        "SM+LN+G", **SIZE, vocab_size=tokenizer.vocab_size, activation="gelu_tanh", bias="all", ffn_dim=40
    )
    to_huggingface(config, random_variables(config), tmp_path / "gpt2", tokenizer.end_of_text)
    tokenizer.save(tmp_path / "gpt2" / "tokenizer.json")
    return tmp_path / "gpt2"


def write_run(path: Path, tokenizer: Tokenizer, name: str, losses: dict[int, float]) -> None:
    """A run as training leaves it: at each step of `losses` other parameters and that validation loss."""
    config = default_config(name)
    config.model.update(SIZE)
    workdir = Workdir(path)
    workdir.claim(config, tokenizer)
    model = model_config(config, tokenizer.vocab_size)
    state = jax.jit(functools.partial(init_state, config, Transformer(model)))()
    with Checkpointer(workdir.checkpoints) as checkpointer:
        for step, loss in losses.items():
            state = state._replace(step=jnp.int32(step), params=random_variables(model, step)["params"])
            checkpointer.save(step, state, None, {}, loss)


def weights(directory: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(directory / "model.safetensors").items()}


def test_folder_to_workdir_and_back(tmp_path, folder, tokenizer):
    import_run(folder, tmp_path / "run")
    run = load_run(tmp_path / "run", pytest.fail)
    config, variables = from_huggingface(folder)
    assert run.model.config == config and run.step == 0
    assert jax.tree.all(jax.tree.map(np.array_equal, run.variables, variables))
    assert run.tokenizer.digest() == tokenizer.digest()

    export_run(tmp_path / "run", tmp_path / "again", notify=pytest.fail)
    assert weights(tmp_path / "again") == weights(folder)
    first, second = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert first == second
    assert (tmp_path / "again" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_an_imported_run_generates_and_evaluates(tmp_path, folder):
    import_run(folder, tmp_path / "run")
    run = load_run(tmp_path / "run", pytest.fail)
    assert isinstance(generate(run, "def ", num_tokens=3, temperature=0.0), str)

    config_file = tmp_path / "run" / "config.json"
    config = json.loads(config_file.read_text())
    config["data"] |= dict(source="files", files=str(SOURCE), directory=str(tmp_path / "data"))
    config_file.write_text(json.dumps(config))
    told = []
    evaluation = evaluate(tmp_path / "run", notify=told.append)
    assert not any("tokenizer" in line for line in told)
    assert np.isfinite(evaluation["validation_loss"]) and evaluation["head_entropy"].shape == (2, 2)


def test_an_imported_run_is_trained_on_wherever_it_is_moved(tmp_path, folder):
    import_run(folder, tmp_path / "imported")
    shutil.rmtree(folder)
    moved = (tmp_path / "imported").rename(tmp_path / "moved")
    config = Workdir(moved).read_config()
    assert str(tmp_path) not in Workdir(moved).config.read_text()
    config.data.update(source="files", files=str(SOURCE), directory=str(tmp_path / "data"), tokenizer="")
    config.train.update(num_steps=1, batch_size=8)
    trained = train(config, moved)
    tokenizer = trained.corpus.tokenizer.digest()
    assert trained.step == 1 and tokenizer == load_tokenizer(moved / "tokenizer.json").digest()

    shutil.rmtree(tmp_path / "data")
    again = moved.rename(tmp_path / "again")
    config.train.num_steps = 2  # the same command, and more steps
    trained = train(config, again)
    assert trained.step == 2 and trained.corpus.tokenizer.digest() == tokenizer
    evaluation = evaluate(again, notify=lambda line: None)
    np.testing.assert_allclose(evaluation["validation_loss"], trained.evaluation["validation_loss"], rtol=1e-6)


def test_without_a_tokenizer(tmp_path, folder):
    (folder / "tokenizer.json").unlink()
    told = []
    import_run(folder, tmp_path / "run", told.append)
    assert len(told) == 1 and "has neither tokenizer.json nor vocab.json and merges.txt" in told[0]
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_run(tmp_path / "run", pytest.fail)
    export_run(tmp_path / "run", tmp_path / "again", notify=pytest.fail)
    assert weights(tmp_path / "again") == weights(folder)
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]


def test_a_trained_run_is_exported(tmp_path, tokenizer):
    write_run(tmp_path / "run", tokenizer, "SM+LN+G", {10: 2.0, 20: 3.0})
    tokens = jnp.arange(32)[None]
    for best in (False, True):
        run = load_run(tmp_path / "run", pytest.fail, best=best)
        export_run(tmp_path / "run", tmp_path / str(best), notify=pytest.fail, best=best)
        assert run.step == (10 if best else 20)
        config, variables = from_huggingface(tmp_path / str(best))
        expected = run.model.apply(run.variables, tokens)[0]
        np.testing.assert_allclose(Transformer(config).apply(variables, tokens)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_workdir_is_not_written_over(tmp_path, folder, tokenizer):
    write_run(tmp_path / "run", tokenizer, "SM+LN+G", {1: 1.0})
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UserError, match="holds a run already"):
        import_run(folder, tmp_path / "run")
    with pytest.raises(UserError, match="is not an empty folder"):
        export_run(tmp_path / "run", tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_tokenizer_of_a_larger_vocabulary(tmp_path, folder):
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": 400, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has 401 entries, but the model has vocab_size=400"):
        import_run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


TEXT = "def f(x):\n    return x  # </s> <|endoftext|> naïve\n"


def test_a_padded_vocabulary(tmp_path, folder, tokenizer):
    config = dataclasses.replace(from_huggingface(folder)[0], vocab_size=448)
    to_huggingface(config, random_variables(config), folder, tokenizer.end_of_text)
    told = []
    import_run(folder, tmp_path / "run", told.append)
    assert len(told) == 1 and "has 400 entries and the model 448: the rest is taken for padding" in told[0]
    run = load_run(tmp_path / "run", pytest.fail)
    assert run.model.config == config and run.tokenizer.vocab_size == 400
    assert isinstance(generate(run, "def ", num_tokens=8, seed=1), str)
    export_run(tmp_path / "run", tmp_path / "again", notify=pytest.fail)
    assert weights(tmp_path / "again") == weights(folder)


@pytest.mark.parametrize("where", ["config.json", "special_tokens_map.json", "vocab.json"])
def test_another_end_of_text_and_tokenizers_of_two_files(tmp_path, folder, tokenizer, where):
    """What ends a text is renamed and nothing else: every text keeps its tokens."""
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "</s>")
    settings = json.loads(text)
    config = json.loads((folder / "config.json").read_text())
    if where == "vocab.json":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(settings["model"]["vocab"]))
        merges = "\n".join(" ".join(merge) for merge in settings["model"]["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    else:
        (folder / "tokenizer.json").write_text(text)
    if where == "special_tokens_map.json":
        del config["eos_token_id"]
        (folder / where).write_text(json.dumps({"eos_token": {"content": "</s>"}}))
        (folder / "config.json").write_text(json.dumps(config))
    told = []
    import_run(folder, tmp_path / "run", told.append)
    assert len(told) == 1 and "'</s>' (id 0) ends a text; here it is called <|endoftext|>" in told[0]
    read = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert read.end_of_text == 0 and read.encode(TEXT) == tokenizer.encode(TEXT)


def test_a_folder_in_which_nothing_ends_a_text(tmp_path, folder, tokenizer):
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "</s>")
    (folder / "tokenizer.json").write_text(text)
    config = json.loads((folder / "config.json").read_text())
    for end in (None, 9999, tokenizer.encode("def")[0], [], "</s>"):
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
        with pytest.raises(UserError, match=r"no token that can end a text; give there the id of the one that does"):
            import_run(folder, tmp_path / "run")


def test_what_gpt2_cannot_express_is_not_exported(tmp_path, tokenizer):
    write_run(tmp_path / "run", tokenizer, "EReg(SM(t)+ScFuFFN)", {1: 1.0})
    with pytest.raises(UserError, match=r"norm='none' of EReg\(SM\(t\)\+ScFuFFN\) has no place in GPT-2"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [*PARTS, "ScFFN", "WNorm(QK)"])
def test_no_piece_of_the_notation_is_lost_in_an_export(part):
    with pytest.raises(UserError, match="has no place in GPT-2, only .* has"):
        check_expressible(architecture(f"SM+LN+G+{part}"))


def test_nothing_to_export(tmp_path, tokenizer):
    with pytest.raises(UserError, match="holds no run"):
        export_run(tmp_path / "nothing", tmp_path / "out")
    write_run(tmp_path / "run", tokenizer, "SM+LN+G", {})
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, folder, capfd):
    def convert(**flags: object) -> int:
        return main(["convert", *(f"--{name}={value}" for name, value in flags.items())])

    run, out = tmp_path / "run", tmp_path / "out"
    assert convert(huggingface=folder, workdir=run, to="workdir") == 0
    assert convert(huggingface=out, workdir=run, to="huggingface") == 0
    assert weights(out) == weights(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    capfd.readouterr()
    for flags, message in (
        (dict(huggingface=folder, workdir=tmp_path / "new", to="workdir"), "pickle"),
        (dict(huggingface=folder, workdir=tmp_path / "new", to="workdirs"), "did you mean 'workdir'?"),
        (dict(workdir=run, to="huggingface"), "--huggingface is missing"),
        (dict(huggingface=out, to="huggingface"), "--workdir is missing"),
    ):
        assert convert(**flags) == 2
        error = capfd.readouterr().err
        assert message in error and error.count("\n") == 1


def test_transformers_reads_the_tokenizer(tmp_path, folder, tokenizer):
    transformers = pytest.importorskip("transformers")
    import_run(folder, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f(x):\n    return x  # naïve λόγος\t数据\n"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.end_of_text


def test_an_imported_run_is_trained_on(tmp_path, folder):
    """Under any settings of training, from the imported weights; not as another model."""
    import_run(folder, tmp_path / "run")
    workdir = f"--workdir={tmp_path / 'run'}"
    imported = Workdir(tmp_path / "run").config.read_text()
    overrides = [
        f"--config.{field}"
        for field in (
            "data.source=files", f"data.files={SOURCE}", f"data.directory={tmp_path / 'data'}", "train.num_steps=2",
            "train.batch_size=8", "optimizer.learning_rate=1e-20", "optimizer.weight_decay=0.0",
        )
    ]  # fmt: skip
    assert main(["train", workdir, *overrides, "--config.model.num_layers=3"]) == 2
    assert main(["train", workdir, *overrides, "--config.optimizer.moments=bfloat16"]) == 2  # not those of its step 0
    assert Workdir(tmp_path / "run").config.read_text() == imported
    assert main(["train", workdir, *overrides]) == 0
    run = load_run(tmp_path / "run", pytest.fail)
    _, variables = from_huggingface(folder)
    assert run.step == 2
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), run.variables["params"], variables["params"])
    assert main(["train", workdir]) == 0  # complete
    assert main(["train", workdir, "--config.optimizer.learning_rate=1e-3"]) == 2  # by now it is a run of its own
