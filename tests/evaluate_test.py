"""Held-out figures: computed directly once more, whatever the batch, in the bytes of the text."""

import importlib
import math

import jax
import numpy as np
import pytest

from jax_entropy.errors import UserError
from jax_entropy.evaluate import evaluate_batches
from jax_entropy.model import Transformer
from jax_entropy.runs.load import load_run
from jax_entropy.sharding import batch_sharding, make_mesh
from tests import REPOSITORY
from tests import reference_model as reference
from tests.tiny_model import VARIED, random_tokens, scattered, tiny

BYTES = np.random.default_rng(5).integers(0, 7, 61).astype(np.int32)
ROWS = np.asarray(random_tokens(7, 17, seed=3))

evaluate_module = importlib.import_module("jax_entropy.evaluate")  # the package's name is the function


def batches(size, padding=0):
    """The rows in batches of a size; the last is padded with rows of token 60 and weight 0."""
    for start in range(0, len(ROWS), size):
        rows = ROWS[start : start + size]
        missing = size - len(rows)
        weight = np.asarray([1.0] * len(rows) + [0.0] * missing, np.float32)
        yield np.concatenate([rows, np.full((missing, 17), padding, np.int32)]), weight


def run(config, *args, read=None, **kwargs):
    return evaluate_batches(Transformer(config), scattered(config), batches(*args, **kwargs), BYTES, read)


@pytest.mark.parametrize("name", VARIED)
def test_the_figures_are_those_of_a_direct_computation(name):
    config = tiny(name)
    logits, entropy, *_ = reference.forward(config, scattered(config), ROWS[:, :-1])
    targets = ROWS[:, 1:]
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    largest = logits.max(-1)
    loss = np.log(np.exp(logits - largest[..., None]).sum(-1)) + largest - picked
    nats = loss.sum()

    readings = []
    result = run(config, 4, read=readings.append)
    (reading,) = readings  # of the first batch
    np.testing.assert_array_equal(reading.tokens, ROWS[:4])
    np.testing.assert_allclose(reading.loss, loss[:4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reading.entropy, np.moveaxis(entropy[:, :4], 1, 2), rtol=1e-3, atol=1e-5)
    assert result["validation_loss"] == pytest.approx(nats / targets.size, rel=1e-5)
    assert result["validation_perplexity"] == pytest.approx(math.exp(nats / targets.size), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / BYTES[targets].sum(), rel=1e-5)
    np.testing.assert_allclose(result["head_entropy"], entropy.mean((1, 3)), rtol=1e-4)
    seen_LxT = [np.minimum(np.arange(1, 17), window) + config.num_slots for window in config.windows]
    np.testing.assert_allclose(result["maximum_causal"], np.log(seen_LxT).mean(1), rtol=1e-5)
    assert (result["tokens"], result["context_length"]) == (targets.size, 16) == (112, 16)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_the_batch_does_not_change_the_figures(size):
    config = tiny("EReg(SM(t)+ScFuFFN^1)")
    one, other = run(config, 4), run(config, size, padding=60)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-6, err_msg=name)


def test_weights_count_rows():
    """A row of weight 2 counts as two rows."""
    config = tiny("SM+LN+G")
    model, variables = Transformer(config), scattered(config)
    weighted = evaluate_batches(model, variables, [(ROWS[:2], np.asarray([2.0, 1.0], np.float32))], BYTES)
    repeated = evaluate_batches(model, variables, [(ROWS[[0, 0, 1]], np.ones(3, np.float32))], BYTES)
    for name, value in repeated.items():
        np.testing.assert_allclose(weighted[name], value, rtol=1e-6, err_msg=name)


def test_figures_of_a_model_that_knows_nothing():
    """Equal logits: log V nats a token; one byte a token: log2 V bits a byte; keys all alike: entropies log i."""
    config = tiny("SM+LN+G")
    variables = jax.tree.map(np.zeros_like, scattered(config))
    result = evaluate_batches(Transformer(config), variables, [(ROWS, np.ones(7, np.float32))], np.ones(61, np.int32))
    assert result["validation_loss"] == pytest.approx(math.log(61), rel=1e-6)
    assert result["validation_perplexity"] == pytest.approx(61, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(math.log2(61), rel=1e-6)
    np.testing.assert_allclose(result["head_entropy"], np.log(np.arange(1, 17)).mean(), rtol=1e-5)


def test_batches_on_a_mesh_give_the_same_figures():
    config, mesh = tiny("EReg(SM(t)+ScFuFFN^1)"), make_mesh(2, 4, 1)
    placed = [tuple(jax.device_put(part, batch_sharding(mesh)) for part in batch) for batch in batches(8)]
    with jax.set_mesh(mesh):
        result = evaluate_batches(Transformer(config), scattered(config), placed, BYTES)
    for name, value in run(config, 4).items():
        np.testing.assert_allclose(result[name], value, rtol=1e-5, err_msg=name)


def test_dropout_is_off_and_spectral_vectors_stay():
    config = tiny("SM+LN+SNorm(QK)", embedding_dropout=0.9)
    variables = scattered(config)
    before = jax.tree.map(np.array, variables)
    first, again = run(config, 7), run(config, 7)
    assert first["validation_loss"] == again["validation_loss"]
    assert run(tiny("SM+LN+SNorm(QK)"), 7)["validation_loss"] == first["validation_loss"]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.all(a == b)), before, variables))


def test_a_loss_that_is_no_number_is_shown():
    config = tiny("SM+LN+G")
    variables = jax.tree.map(lambda leaf: leaf * np.nan, scattered(config))
    result = evaluate_batches(Transformer(config), variables, batches(7), BYTES)
    assert math.isnan(result["validation_loss"]) and math.isnan(result["bits_per_byte"])


@pytest.fixture
def loaded(unbroken):
    return load_run(unbroken[0])


def test_a_text_of_ones_choice_is_judged_whole(loaded, tmp_path):
    """Every token once, the first after an end of text, in windows of the context."""
    content = "def naïve(x):\r\n    return x  # <|endoftext|>\n" * 9
    (tmp_path / "text.txt").write_bytes(content.encode())
    result = evaluate_module.evaluate(loaded, text=tmp_path / "text.txt", batch_size=3)
    ids = np.array([loaded.tokenizer.end_of_text, *loaded.tokenizer.encode(content)])
    forward, nats = jax.jit(lambda tokens: jax.nn.log_softmax(loaded.model.apply(loaded.variables, tokens)[0])), 0.0
    for begin in range(0, len(ids) - 1, 32):
        window = ids[begin : begin + 33]
        nats -= np.take_along_axis(np.asarray(forward(window[None, :-1]))[0], window[1:, None], 1).sum(dtype=np.float64)
    assert len(ids) % 32 > 1  # a rest
    assert (result["tokens"], result["context_length"]) == (len(ids) - 1, 32)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(content.encode()), rel=1e-5)
    assert result["text"] == f"on {tmp_path / 'text.txt'}"
    for name, content in (("nothing", b""), ("latin", b"\xe9t\xe9")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="holds no text|is not UTF-8: invalid continuation byte at byte 0"):
            evaluate_module.evaluate(loaded, text=tmp_path / name)


def test_only_text_that_was_held_out_is_called_so(loaded):
    def judged(run, **options):
        result = evaluate_module.evaluate(run, **options)
        return result["text"], result["validation_loss"]

    text, loss = judged(loaded)
    assert text == "held out"
    assert judged(loaded, batch_size=10**12) == (text, pytest.approx(loss))  # no more rows than there are
    files = loaded.config.data.files
    assert judged(loaded._replace(corpus=None)) == (
        f"held out of {files}, which it is not known to have been trained on", loss,
    )  # fmt: skip
    with pytest.raises(UserError, match="has changed since .* what is held out of it now may have been trained on"):
        judged(loaded._replace(corpus="0123456789abcdef"))
    section = loaded.config.data.copy_and_resolve_references()
    section.update(prefetch=1, tokenizer=str(loaded.workdir.tokenizer), vocab_size=300, files=f"{files}/../asyncio/")
    assert judged(loaded, section=section) == ("held out", loss)
    section.join_documents = True
    assert judged(loaded, section=section)[0] == f"on the validation split of {section.files}"
    with pytest.raises(UserError, match="has changed since"):
        judged(loaded._replace(corpus="0123456789abcdef"), section=section)
    section.files = str(REPOSITORY / "jax_entropy" / "training")
    text, other = judged(loaded._replace(corpus="0123456789abcdef"), section=section)
    assert text == f"on the validation split of {section.files}" and other != loss
    with pytest.raises(UserError, match="text and section exclude each other"):
        judged(loaded, section=section, text="book.txt")
    with pytest.raises(UserError, match="best=True comes too late: step 24 is loaded"):
        judged(loaded, best=True)
    section.source = "file"
    with pytest.raises(UserError, match="config.data.source='file' is not known; .*'files'"):
        judged(loaded, section=section)
    section.source = "stdlib"
    assert evaluate_module._name(section) == "Python's standard library"


@pytest.mark.parametrize(
    "changes",
    [
        dict(validation_fraction=0.5),
        dict(max_documents=20, join_documents=True),
        dict(files="{}/*s.py", validation_fraction=0.5),
        dict(files="{}/b*.py"),
        dict(files="{}/../asyncio/../*/base_*.py"),
        dict(files="{}/events.py"),
        dict(source="languini"),
        dict(source="stdlib", files=""),
    ],
)
def test_text_that_the_run_was_trained_on_is_not_split_anew(loaded, changes):
    section, own = loaded.config.data.copy_and_resolve_references(), loaded.config.data
    section.update(changes | ({"files": changes["files"].format(own.files)} if "files" in changes else {}))
    changed = ", ".join(f"config.data.{name}=.* instead of .*" for name in evaluate_module._SPLIT if name in changes)
    with pytest.raises(UserError, match=f"^{changed} holds out other parts of the text of .*; leave what the run has"):
        evaluate_module.evaluate(loaded, section=section)


def test_text_that_it_is_not_known_to_have_seen_may_be_split_in_any_way(loaded):
    section = loaded.config.data.copy_and_resolve_references()
    section.validation_fraction = 0.3
    result = evaluate_module.evaluate(loaded._replace(corpus=None), section=section)
    assert result["text"] == f"on the validation split of {section.files}"
