"""Decoders of other families: transformers' numbers, from its own files too, and a sentence for what is not read."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_entropy.errors import UserError
from jax_entropy.huggingface.decoder import read_decoder
from jax_entropy.huggingface.decoders import FAMILIES
from jax_entropy.huggingface.forward import logits, losses
from tests.huggingface.decoders import CASES, FILE, TOKENS, compute, transformers_model, weights, write_folder


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as arrays:
        return dict(arrays)


def folder(golden, case, directory):
    tensors = weights(json.loads(str(golden[f"{case}/shapes"])))
    if "neox" in case:  # transformers 5 calls it otherwise than the files that it writes and reads
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    return write_folder(directory, CASES[case], tensors)


@pytest.mark.parametrize("case", CASES)
def test_numbers_of_transformers(golden, tmp_path, case):
    decoder, stored = read_decoder(folder(golden, case, tmp_path), FAMILIES)
    found, heads = logits(decoder, stored, TOKENS)
    for computed, name in ((found, "logits"), (heads.entropy, "entropy"), (heads.sink, "sink")):
        np.testing.assert_allclose(computed, golden[f"{case}/{name}"], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_folders_that_transformers_writes(tmp_path, case):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, _ = transformers_model(CASES[case])
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found, _ = logits(*read_decoder(tmp_path, FAMILIES), TOKENS)
    np.testing.assert_allclose(found, compute(model)["logits"], atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_and_missing_prefix(golden, tmp_path, dtype):
    tensors = load_file(folder(golden, "qwen2", tmp_path / "whole") / "model.safetensors")
    halves = {name.removeprefix("model."): tensor.astype(dtype) for name, tensor in tensors.items()}
    rounded = {name: halves[name.removeprefix("model.")].astype(np.float32) for name in tensors}
    folders = [write_folder(tmp_path / name, CASES["qwen2"], kind) for name, kind in (("a", halves), ("b", rounded))]
    first, second = (logits(*read_decoder(path, FAMILIES), TOKENS)[0] for path in folders)
    np.testing.assert_array_equal(first, second)


def test_a_head_of_its_own_counts_whatever_the_settings_say(golden, tmp_path):
    path = folder(golden, "llama", tmp_path)
    (path / "config.json").write_text(json.dumps(CASES["llama"] | dict(tie_word_embeddings=True)))
    found, _ = logits(*read_decoder(path, FAMILIES), TOKENS)  # as transformers reads it
    np.testing.assert_allclose(found, golden["llama/logits"], atol=1e-4)


def test_losses_are_of_the_logits(golden, tmp_path):
    decoder, stored = read_decoder(folder(golden, "llama", tmp_path), FAMILIES)
    found = golden["llama/logits"][0, :-1].astype(np.float64)
    expected = np.log(np.exp(found).sum(-1)) - found[np.arange(11), TOKENS[0, 1:]]
    np.testing.assert_allclose(losses(decoder, stored, TOKENS)[0][0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(architecture="SM+LN+G"), "holds a model of ours"),
        (dict(model_type="mamba"), "'mamba'; only gpt2, gpt_neo, gpt_neox, llama, mistral, qwen2 can be read"),
        (
            dict(use_sliding_window=True, max_window_layers=-1),
            "max_window_layers=-1, which must be a number of at least",
        ),
        (dict(use_sliding_window=True, layer_types=["full_attention"]), "do not name the attention of 2 layers"),
        (dict(quantization_config={"bits": 4}), 'quantization_config={"bits": 4}; only null can be read'),
        (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "rope_type='yarn'; only default, linear and llama3"),
        (dict(rope_scaling="yarn"), "rope_parameters='yarn', which must be an object"),
        (dict(partial_rotary_factor=1.5), "rotates 12 numbers of a head of 8; an even part of it can be read"),
        (
            dict(rope_scaling=dict(rope_type="llama3", factor=8, low_freq_factor=4.0, high_freq_factor=4.0)),
            "high_freq_factor=4.0, which must be above low_freq_factor=4.0",
        ),
        (dict(hidden_act="xielu"), "hidden_act='xielu'; what can be read is"),
        (dict(num_hidden_layers=3), "lacks the tensor 'layers.2.input_layernorm.weight'"),
        (dict(num_hidden_layers=1), "which is no part of the qwen2 that config.json describes"),
        (dict(num_key_value_heads=3), "4 heads, which 3 heads of keys do not divide"),
        (dict(hidden_size=-1), "hidden_size=-1, which must be a positive number"),
        (dict(intermediate_size=41), "of shape [40, 32], but config.json asks for [41, 32]"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(golden, tmp_path, change, sentence):
    path = folder(golden, "qwen2", tmp_path)
    (path / "config.json").write_text(json.dumps(CASES["qwen2"] | change))
    with pytest.raises(UserError) as error:
        logits(*read_decoder(path, FAMILIES), TOKENS)
    assert sentence in str(error.value)


def test_a_tensor_that_nobody_asks_for_is_refused(golden, tmp_path):
    path = folder(golden, "qwen2", tmp_path)
    more = {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}
    save_file(load_file(path / "model.safetensors") | more, path / "model.safetensors")
    with pytest.raises(UserError, match=r"'layers.0.self_attn.q_norm.weight', which is no part of the qwen2"):
        read_decoder(path, FAMILIES)
