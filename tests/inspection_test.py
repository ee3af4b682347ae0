"""The doctor's findings: arrays that agree with each other, a page, numbers, and sentences for what cannot be."""

import html
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from jax_entropy.commands.main import main
from jax_entropy.data.tokenizer import train_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.huggingface.decoders import FAMILIES
from jax_entropy.inspection import _first_tokens, _pieces, _tokenizer, findings, inspect
from tests import REPOSITORY
from tests.huggingface.decoders import CASES, FILE, weights, write_folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama with a tokenizer that is not byte-level."""
    with np.load(FILE) as golden:
        shapes = json.loads(str(golden["llama/shapes"]))
    folder = write_folder(tmp_path_factory.mktemp("models") / "llama", CASES["llama"], weights(shapes))
    words = {"[UNK]": 0} | {f"w{i}": i for i in range(1, 37)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_model_is_inspected_from_the_command_line(llama, tmp_path, capsys):
    text, page, numbers = tmp_path / "text.txt", tmp_path / "page.html", tmp_path / "numbers.json"
    text.write_text(" ".join(f"w{i % 36 + 1}" for i in range(33)))
    arguments = [str(llama), f"--text={text}", "--context_length=16", f"--page={page}", f"--json={numbers}"]
    assert main(["inspect", *arguments]) == 0
    found = inspect(llama, text.read_text(), context_length=16)
    assert found.tokens.shape == (2, 17) and found.entropy.shape == (2, 4, 2, 16)
    np.testing.assert_allclose(found.maximum, np.log(np.arange(1, 17)).mean())
    assert not (found.overloaded & found.collapsed).any()
    assert ((found.sink > 0) & (found.sink < 1)).all()
    assert {"RMSNorm", "softmax", "SiLU, priced as GELU (tanh)", "bilinear product", "rotation"} <= set(found.private)
    written, said = json.loads(numbers.read_text()), capsys.readouterr().out
    np.testing.assert_allclose(written["head_entropy"], found.head_entropy, rtol=1e-5)
    assert all(sentence in said for sentence in written["findings"]) and written["findings"] == [*findings(found)]
    page = page.read_text()
    assert (
        "gated SiLU, rotary positions, 2 heads of keys" in page and "training batch" not in page.partition("<script")[0]
    )
    assert all(sentence in html.unescape(page) for sentence in written["findings"])


def test_a_text_is_neither_cut_nor_padded_by_the_tokenizers_file(llama, tmp_path):
    text, model = " ".join(f"w{i % 36 + 1}" for i in range(33)), shutil.copytree(llama, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for set_up in (lambda: tokenizer.enable_truncation(5), lambda: tokenizer.enable_padding(length=40)):
        set_up()
        tokenizer.save(str(model / "tokenizer.json"))
        np.testing.assert_array_equal(_first_tokens(_tokenizer(model), text, 99), [i % 36 + 1 for i in range(33)])
        tokenizer.no_truncation()


def test_a_prefix_is_read_the_same_without_what_follows(llama):
    ids = np.arange(1, 30)
    whole, part = (inspect(llama, ids[:count], context_length=count) for count in (29, 9))
    np.testing.assert_allclose(part.entropy, whole.entropy[..., :8], atol=1e-5)


def test_weights_that_are_not_numbers_are_said_and_shown(llama, tmp_path, capsys):
    broken = shutil.copytree(llama, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= np.nan
    save_file(tensors, broken / "model.safetensors")
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(" ".join(f"w{i % 36 + 1}" for i in range(33)))
    assert main(["inspect", str(broken), f"--text={text}", "--context_length=16", f"--page={page}"]) == 0
    said = "Attention is not finite in layers 0 and 1."
    assert said in capsys.readouterr().out and said in page.read_text()


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("w1 w2", "at least three tokens"),
        ([1, 2, 37], "token 37, and the model of"),
        ([-1, 2, 3], "token -1, and the model of"),
    ],
)
def test_texts_that_cannot_be_read(llama, text, sentence):
    with pytest.raises(UserError, match=sentence):
        inspect(llama, text)


def test_tokens_are_shown_as_text_whatever_the_tokenizer(llama, tmp_path):
    text = "naïve λόγος\t数据 def f(x):\n    return x\n"
    tokenizer = train_tokenizer([text.replace("数据", "")], 300)  # which has these in bytes only
    tokenizer.save(tmp_path / "tokenizer.json")
    pieces = _pieces(tmp_path, np.array(tokenizer.encode(text)))
    assert "".join(pieces) == text and len(pieces) == len(tokenizer.encode(text))
    assert "".join(_pieces(llama, np.array([3, 1, 3]))) == "w3 w1 w3"
    assert _pieces(tmp_path / "nothing", np.array([7, 8])) == ["7 ", "8 "]


def test_the_page_names_every_family():
    page = (REPOSITORY / "docs" / "inspect.md").read_text()
    assert all(f"`{family.model_type}`" in page for family in FAMILIES)
