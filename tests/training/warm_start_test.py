"""Runs that start from another model: what is taken over, what it computes then, and that the source may go."""

import itertools
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jax_entropy.architecture import architecture
from jax_entropy.commands.main import main
from jax_entropy.config import default_config, model_config
from jax_entropy.data import load_tokenizer
from jax_entropy.data.tokenizer import train_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.huggingface import from_huggingface, to_huggingface
from jax_entropy.model import Transformer
from jax_entropy.runs.load import load_run
from jax_entropy.runs.workdir import Workdir
from jax_entropy.training.train import train
from jax_entropy.training.warm_start import Origin, Source, check_teacher, open_source, source_config, take_over
from tests import REPOSITORY
from tests.run_helpers import lines
from tests.tiny_model import VARIED, initial, random_tokens, scattered, tiny

TOKENS = random_tokens(3, 16)


def taken_over(old, new, *, same_tokens=True):
    source = Source("source", old, scattered(old)["params"], None)
    return take_over(source, Transformer(new), 3, same_tokens=same_tokens)


def logits(config, variables, tokens=TOKENS):
    return jax.jit(lambda variables: Transformer(config).apply(variables, tokens)[0])(variables)


def same(variables, old):
    """Paths of the parameters that are the source's, bit for bit."""
    ours, theirs = (flatten_dict(tree["params"], sep="/") for tree in (variables, scattered(old)))
    return {path for path in ours.keys() & theirs.keys() if np.array_equal(ours[path], theirs[path])}


def test_thresholds_join_and_the_function_stays_bit_for_bit():
    old, new = tiny("SM+LN+G", bias="all"), tiny("EReg(SM+LN+G)", bias="all")
    variables, origin = taken_over(old, new)
    assert origin.anew == ["attention/threshold"] and not origin.in_part and not origin.left_behind
    assert same(variables, old) == flatten_dict(scattered(old)["params"], sep="/").keys()
    np.testing.assert_array_equal(variables["params"]["blocks"]["attention"]["threshold"], 0.5)
    np.testing.assert_array_equal(logits(new, variables), logits(old, scattered(old)))


def test_what_is_derived_is_derived_from_what_was_taken_over():
    """Gains are the norms of the source's matrices, so that nothing changes; the largest singular values are theirs."""
    old, new = tiny("SM+LN"), tiny("SM+LN+WNorm(QKVO+FFN)")
    variables, origin = taken_over(old, new)
    assert sorted({name.rpartition("/")[2] for name in origin.anew}) == ["gain"]
    np.testing.assert_allclose(logits(new, variables), logits(old, scattered(old)), rtol=1e-4, atol=1e-5)
    variables, origin = taken_over(old, tiny("SM+LN+SNorm(FFN)"))
    up = variables["params"]["blocks"]["ffn"]["up"]["kernel"][1]
    left, right = (side[1] for side in variables["spectral"]["blocks"]["ffn"]["up"]["singular_vectors"])
    assert left @ up @ right == pytest.approx(np.linalg.norm(up, 2), rel=0.1)  # of sixteen power iterations
    assert not origin.anew


@pytest.mark.parametrize(("old", "new"), [("direct", "log"), ("log", "direct")])
def test_a_temperature_is_taken_over_as_a_temperature(old, new):
    old, new = (tiny("SM(t)", temperature_parameter=kind, temperature_init=0.3) for kind in (old, new))
    source = Source("source", old, initial(old)["params"], None)
    variables, _ = take_over(source, Transformer(new), 3, same_tokens=True)
    np.testing.assert_allclose(logits(new, variables), logits(old, initial(old)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [("SM+ScFuFFN", {}), ("SM+LN+G", dict(num_layers=1)), ("SM+RN+G", {})])
def test_what_does_not_begin_as_its_source_cannot_teach_in_its_place(name, size):
    old = tiny("SM+LN+G")
    alike, other = Transformer(tiny("EReg(SM+LN+G)")), Transformer(tiny(name, **size))
    source = Source("source", old, scattered(old)["params"], None)
    check_teacher(source, alike, *take_over(source, alike, 3, same_tokens=True))
    with pytest.raises(UserError, match=r"predicts otherwise than source \([0-9.]+ nats a token"):
        check_teacher(source, other, *take_over(source, other, 3, same_tokens=True))


def test_a_source_teaches_no_more_positions_than_it_has():
    old, longer, shorter = (tiny("SM+LN+G", context_length=length) for length in (16, 24, 10))
    source = Source("source", old, scattered(old)["params"], None)
    check_teacher(source, Transformer(shorter), *take_over(source, Transformer(shorter), 3, same_tokens=True))
    with pytest.raises(UserError, match="has read no more than 16 tokens: config.model.context_length=24 is longer"):
        check_teacher(source, Transformer(longer), *take_over(source, Transformer(longer), 3, same_tokens=True))


def test_layers_are_taken_over_one_by_one():
    """Four layers of which the last has no feed-forward, from two that both have one."""
    old, new = tiny("SM+LN+G"), tiny("SM+LN+G^1", num_layers=4)
    variables, origin = taken_over(old, new)
    ours, theirs = variables["params"]["blocks"], scattered(old)["params"]["blocks"]
    for name in ("up", "down"):
        np.testing.assert_array_equal(ours["ffn"][name]["kernel"][:2], theirs["ffn"][name]["kernel"])
        assert not np.array_equal(ours["ffn"][name]["kernel"][2], ours["ffn"][name]["kernel"][1])
    assert "ffn/up/kernel of layers 2" in origin.anew and "attention/query/kernel of layers 2, 3" in origin.anew
    assert "ffn/up/kernel of layers 0, 1" in origin.taken_over and not origin.left_behind
    back, origin = taken_over(new, tiny("SM+LN+G^1"))
    assert "ffn/up/kernel of layers 1, 2" in origin.left_behind and not origin.anew
    deepest, theirs = back["params"]["blocks_without_ffn"], scattered(new)["params"]["blocks"]
    np.testing.assert_array_equal(deepest["norm1"]["scale"][0], theirs["norm1"]["scale"][1])


@pytest.mark.parametrize(("length", "note"), [(24, "16 of 24"), (10, "10 of 16")])
def test_a_context_of_another_length_keeps_the_first_positions(length, note):
    old, new = tiny("SM(t)+LN"), tiny("SM(t)+LN", context_length=length)
    variables, origin = taken_over(old, new)
    assert set(origin.in_part) == {
        f"position_embedding (the first {note})",
        f"attention/temperature (the first {note})",
    }
    first = TOKENS[:, :10]
    np.testing.assert_allclose(logits(new, variables, first), logits(old, scattered(old), first), rtol=1e-6, atol=1e-6)


def test_other_tokens_leave_the_embedding_behind_and_a_larger_table_keeps_its_first_rows():
    old, new = tiny("SM+LN", tied_head=False), tiny("SM+LN", tied_head=False, vocab_size=64)
    _, origin = taken_over(old, new, same_tokens=False)
    assert set(origin.anew) == set(origin.left_behind) == {"token_embedding", "head"}
    variables, origin = taken_over(old, new)
    assert set(origin.in_part) == {"token_embedding (the first 61 of 64)", "head (the first 61 of 64)"}
    np.testing.assert_allclose(logits(new, variables)[..., :61], logits(old, scattered(old)), rtol=1e-6, atol=1e-6)


def test_any_model_starts_from_any_other():
    """Every array is there in its shape, and what both have alike is the source's."""
    for old_name, new_name in itertools.pairwise(VARIED):
        old, new = tiny(old_name), tiny(new_name)
        variables, origin = taken_over(old, new)
        assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, dict(scattered(new))), (old_name, new_name)
        assert {"token_embedding", "position_embedding"} <= same(variables, old)
        assert 0 < origin.share <= 1


def test_a_model_of_which_nothing_fits():
    with pytest.raises(UserError, match="nothing of source, SM, fits into SM of this size"):
        taken_over(tiny("SM", final_norm="none", bias="none"), tiny("SM", final_norm="none", bias="none", model_dim=24))


@pytest.fixture
def gpt2(tmp_path):
    """A tiny GPT-2 as Hugging Face publishes it."""
    texts = [path.read_text() for path in sorted((REPOSITORY / "jax_entropy").glob("*.py"))]
    tokenizer = train_tokenizer(texts, 400)
    size = dict(num_layers=2, num_heads=2, model_dim=32, context_length=32, vocab_size=tokenizer.vocab_size)
    config = architecture("SM+LN+G", **size, activation="gelu_tanh", bias="all")
    variables = jax.tree.map(lambda x: 0.3 * x, scattered(config))
    to_huggingface(config, variables, tmp_path / "gpt2", tokenizer.end_of_text)
    tokenizer.save(tmp_path / "gpt2" / "tokenizer.json")
    return tmp_path / "gpt2"


def test_an_imported_gpt2_is_repaired(tmp_path, gpt2, tiny):
    """EReg on a GPT-2: thresholds join at step 0, it trains, and goes on when the source is gone."""
    model, variables = from_huggingface(gpt2)
    expected, digest = logits(model, variables, TOKENS), load_tokenizer(gpt2 / "tokenizer.json").digest()
    config = source_config(gpt2)
    config.architecture, config.mesh.data = "EReg(SM+LN+G)", 8
    config.data.update({name: tiny().data[name] for name in ("source", "files", "directory")})
    config.train.update(num_steps=2, batch_size=8, log_every=2, evaluate_every=2, evaluate_chunks=8)
    said, run = [], tmp_path / "run"
    trained = train(config, run, said.append, start_from=gpt2)
    assert trained.complete and all(np.isfinite(line["loss"]) for line in lines(run))
    (line,) = [line for line in said if line.startswith("started from")]
    assert line == f"started from {gpt2}, SM+LN+G: 100.0% of the parameters are taken over"
    assert "  starting anew: attention/threshold" in said
    assert Origin.read(Workdir(run)).anew == ["attention/threshold"]

    shutil.rmtree(run / "checkpoints" / "2")
    start = load_run(run)
    assert (start.step, str(start.model.config), start.tokenizer.digest()) == (0, "EReg(SM+LN+G)", digest)
    np.testing.assert_array_equal(logits(start.model.config, start.variables, TOKENS), expected)

    shutil.rmtree(gpt2)
    again = train(config, run, said.append, start_from=gpt2)  # the same command, and from step 0 again
    jax.tree.map(np.testing.assert_array_equal, again.variables, trained.variables)


@pytest.mark.parametrize(("name", "taken_out"), [("SM+FN", "gelu_tanh"), ("SM+LN+R", None), ("SM+ScFuFFN", None)])
def test_an_imported_gpt2_loses_what_its_new_architecture_lacks(tmp_path, gpt2, name, taken_out):
    config = source_config(gpt2)
    assert model_config(config, 400).activation == "gelu_tanh"
    config.architecture = name
    assert str(model_config(config, 400)) == name
    config, _ = open_source(config, Workdir(tmp_path / "run"), gpt2, lambda line: None)
    assert config.anneal.activation == taken_out


@pytest.mark.parametrize("norm", ["rms", "tanh", "none"])
def test_only_a_layer_norm_is_annealed_to_a_frozen_one(tmp_path, monkeypatch, norm):
    source = Source("source", tiny("SM+LN+G", norm=norm), {}, object())
    monkeypatch.setattr("jax_entropy.training.warm_start._load", lambda name, notify: source)
    with pytest.raises(
        UserError, match=f"row statistics of a LayerNorm out, and source, .*, has '{norm}' in its place"
    ):
        open_source(default_config("SM+FN+G"), Workdir(tmp_path / "run"), "source", lambda line: None)


def test_without_a_config_the_command_takes_the_sources(tmp_path, gpt2, capfd):
    assert main(["train", f"--workdir={tmp_path / 'run'}", f"--from={gpt2}", "--config.model.num_heads=3"]) == 2
    assert "model_dim=32 is not divisible by num_heads=3" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_started_from_is_said(tmp_path, gpt2, tiny):
    say_nothing, config = (lambda line: None), tiny("SM+LN+G", **{"train.num_steps": 1})
    with pytest.raises(UserError, match="is neither the workdir of a run nor a Hugging Face folder"):
        train(config, tmp_path / "run", say_nothing, start_from=tmp_path)
    (gpt2 / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="gpt2 has no tokenizer; name its own as config.data.tokenizer"):
        train(config, tmp_path / "run", say_nothing, start_from=gpt2)
    assert not (tmp_path / "run").exists()
    checkpoint = tmp_path / "run" / "checkpoints" / "1"
    checkpoint.mkdir(parents=True)
    with pytest.raises(UserError, match="gpt2 has no tokenizer"):  # an empty folder is no checkpoint
        train(config, tmp_path / "run", say_nothing, start_from=gpt2)
    (checkpoint / "state").mkdir()
    with pytest.raises(UserError, match=r"run was not started from another model, not from .*gpt2; choose another"):
        train(config, tmp_path / "run", say_nothing, start_from=gpt2)
    Origin("elsewhere").write(Workdir(tmp_path / "run"))
    with pytest.raises(UserError, match="run was started from elsewhere, not from"):
        train(config, tmp_path / "run", say_nothing, start_from=gpt2)
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="elsewhere is neither"):  # broken off before its first checkpoint
        train(config, tmp_path / "run", say_nothing)
