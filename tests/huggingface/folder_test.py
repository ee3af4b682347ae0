"""GPT-2 folders: Hugging Face's own numbers, exact round trips, and one sentence for everything that is wrong."""

import ast
import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_entropy.architecture import architecture
from jax_entropy.entropy import row_entropy
from jax_entropy.errors import UserError
from jax_entropy.huggingface.folder import from_huggingface, to_huggingface
from jax_entropy.huggingface.gpt2 import GPT2
from jax_entropy.huggingface.native import to_safetensors
from jax_entropy.layers import _activate
from jax_entropy.loss import loss_fn
from jax_entropy.model import Transformer
from tests import GOLDEN, REPOSITORY

SIZE = dict(num_layers=3, num_heads=4, model_dim=32, context_length=16, vocab_size=101)


def write_golden(directory: Path, activation: str, prefix: str = "transformer.") -> dict[str, np.ndarray]:
    """A folder with the golden model's weights and config; returns the whole golden file."""
    golden = dict(np.load(GOLDEN / f"hf_gpt2_{activation}.npz"))
    directory.mkdir(parents=True, exist_ok=True)
    weights = {prefix + name: tensor for name, tensor in section(golden, "param/transformer.").items()}
    save_file(weights, directory / "model.safetensors")
    write_json(directory / "config.json", {"model_type": "gpt2", **json.loads(str(golden["config"]))})
    return golden


def section(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    write_json(path, json.loads(path.read_text()) | changes)


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path, count: int = 3) -> None:
    """Cuts model.safetensors into shards with an index, as transformers does."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, directory / file)
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def random_model(name: str = "SM+LN+G", **overrides):
    """A config and variables in which no value is at its initial one."""
    config = architecture(name, **(SIZE | overrides))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), shapes)


def forward(config, variables, tokens_BxT: np.ndarray):
    return jax.jit(Transformer(config).apply)(variables, jnp.asarray(tokens_BxT, jnp.int32))


def assert_same_bits(first, second) -> None:
    first, second = (jax.tree_util.tree_leaves_with_path(tree) for tree in (first, second))
    assert [path for path, _ in first] == [path for path, _ in second]
    for (path, a), (_, b) in zip(first, second, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_numbers_of_hugging_face(tmp_path, activation, implementation):
    golden = write_golden(tmp_path / "model", activation)
    config, variables = from_huggingface(tmp_path / "model")
    config, tokens = dataclasses.replace(config, attention=implementation), jnp.asarray(golden["input_ids"], jnp.int32)

    logits, aux = forward(config, variables, tokens)
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux.stats.entropy, row_entropy(golden["attentions"]), rtol=1e-4, atol=1e-5)

    gradients_of = jax.value_and_grad(functools.partial(loss_fn, model=Transformer(config)), has_aux=True)
    (loss, _), gradients = jax.jit(gradients_of)(variables["params"], tokens)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-4, atol=1e-5)
    to_huggingface(config, {"params": gradients}, tmp_path / "gradients")
    gradients = load_file(tmp_path / "gradients" / "model.safetensors")
    expected = section(golden, "grad/")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_folder_round_trip_is_exact(tmp_path, activation):
    write_golden(tmp_path / "first", activation)
    change_config(tmp_path / "first", n_inner=128, initializer_range=0.3, embd_pdrop=0.25)
    config, variables = from_huggingface(tmp_path / "first")
    to_huggingface(config, variables, tmp_path / "second")
    assert_same_bits(*(load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")))
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert first.items() <= second.items()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_model_round_trip_is_exact(tmp_path, activation):
    config, variables = random_model(
        activation=activation, bias="all", ffn_dim=40, norm_epsilon=1e-3, init_std=0.1, embedding_dropout=0.5
    )
    strange = jnp.asarray([np.nan, np.inf, -np.inf, -0.0, 1e-45], jnp.float32)
    variables["params"]["final_norm"]["bias"] = variables["params"]["final_norm"]["bias"].at[:5].set(strange)
    to_huggingface(config, variables, tmp_path)
    read_config, read_variables = from_huggingface(tmp_path)
    assert read_config == config
    assert_same_bits(read_variables, variables)


@pytest.mark.parametrize("bias", ["none", "qk"])
def test_absent_biases_are_written_as_zeros(tmp_path, bias):
    config, variables = random_model(bias=bias)
    to_huggingface(config, variables, tmp_path)
    read_config, read_variables = from_huggingface(tmp_path)
    assert read_config == dataclasses.replace(config, bias="all")
    tokens = np.arange(16)[None]
    logits, _ = forward(config, variables, tokens)
    np.testing.assert_allclose(forward(read_config, read_variables, tokens)[0], logits, rtol=1e-6, atol=1e-6)
    qkv_bias = load_file(tmp_path / "model.safetensors")["transformer.h.1.attn.c_attn.bias"]
    assert np.any(qkv_bias[:64]) == (bias == "qk") and not np.any(qkv_bias[64:])


def test_names_without_prefix_shards_and_old_masks(tmp_path):
    write_golden(tmp_path / "model", "gelu")
    expected = from_huggingface(tmp_path / "model")
    write_golden(tmp_path / "bare", "gelu", prefix="")
    masks = {"h.0.attn.bias": np.ones((1, 1, 16, 16), np.uint8), "h.0.attn.masked_bias": np.full(1, -1e4, np.float32)}
    change_tensors(tmp_path / "bare", lambda tensors: tensors.update(masks))
    change_tensors(tmp_path / "bare", lambda tensors: tensors.update({"lm_head.weight": tensors["wte.weight"].copy()}))
    shard(tmp_path / "model")
    for name in ("model", "bare"):
        config, variables = from_huggingface(tmp_path / name)
        assert config == expected[0]
        assert_same_bits(variables, expected[1])


def test_half_precision_is_read_exactly(tmp_path):
    write_golden(tmp_path, "gelu")
    change_tensors(tmp_path, lambda tensors: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()}))
    half = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    _, variables = from_huggingface(tmp_path)
    assert_same_bits(variables["params"]["token_embedding"], half.astype(np.float32))


def test_how_it_is_computed_is_no_part_of_the_model(tmp_path):
    write_golden(tmp_path, "gelu")
    expected = from_huggingface(tmp_path)
    change_config(tmp_path, reorder_and_upcast_attn=True, use_cache=False)
    config, variables = from_huggingface(tmp_path)
    assert config == expected[0]
    assert_same_bits(variables, expected[1])


# As the activations of transformers compute them.
ACTIVATIONS = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_fast": lambda x: 0.5 * x * (1 + np.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
}
ACTIVATIONS |= {"gelu_python": ACTIVATIONS["gelu"]}
ACTIVATIONS |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), ACTIVATIONS["gelu_new"])


def test_activations_that_are_read_are_ours_up_to_the_rounding_of_float32():
    assert ACTIVATIONS.keys() == GPT2.activations.keys()
    x = np.linspace(-12, 12, 4001)
    with jax.enable_x64(True):
        for name, function in ACTIVATIONS.items():
            config = architecture("SM+LN+G", activation=GPT2.activations[name], dtype="float32")
            ours = _activate(jnp.asarray(x), config, None)
            np.testing.assert_allclose(ours, function(x), rtol=0, atol=2**-30, err_msg=name)


def test_defaults_of_gpt2(tmp_path):
    to_huggingface(*random_model(bias="all"), tmp_path)
    write_json(
        tmp_path / "config.json", {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 101}
    )
    with pytest.raises(UserError, match=r"'wpe.weight' of shape \[16, 32\], but its config.json asks for \[1024, 32\]"):
        from_huggingface(tmp_path)
    change_config(tmp_path, n_positions=16)
    config, _ = from_huggingface(tmp_path)
    assert (config.activation, config.norm_epsilon, config.hidden_dim) == ("gelu_tanh", 1e-5, 128)


def test_export_replaces_a_gpt2_but_nothing_else(tmp_path):
    config, variables = random_model()
    other = jax.tree.map(jnp.negative, variables)
    to_huggingface(config, variables, tmp_path)
    to_huggingface(config, other, tmp_path)
    assert_same_bits(from_huggingface(tmp_path)[1]["params"]["token_embedding"], other["params"]["token_embedding"])
    for content in ({"architecture": "SM", "train": {}}, {"model_type": "llama"}):
        write_json(tmp_path / "config.json", content)
        with pytest.raises(UserError, match="would be overwritten"):
            to_huggingface(config, variables, tmp_path)
        with pytest.raises(UserError, match="would be overwritten"):
            to_safetensors(config, variables, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == content
    with pytest.raises(UserError, match="end_of_text=101 is beyond the vocabulary, which ends at 100"):
        to_huggingface(config, variables, tmp_path / "new", end_of_text=101)
    with pytest.raises(UserError, match="directory='' is empty"):
        to_huggingface(config, variables, "")
    with pytest.raises(UserError, match="cannot be written"):
        to_huggingface(config, variables, tmp_path / "config.json")


@pytest.mark.parametrize(
    "name, overrides, field",
    [
        ("SM+G", {}, "norm='none'"),
        ("SM+RN+G", {}, "norm='rms'"),
        ("SM+LN", {}, "activation='identity'"),
        ("SM+LN+LR(0.1)", {}, "activation='leaky_relu'"),
        ("SM+LN+G+ScFFN", {}, "scaled=True"),
        ("SM+LN+G^1", {}, "ffn_free_layers=1"),
        ("SM+LN+G+WNorm(QK)", {}, "reparametrization='weight'"),
        ("SM(t)+LN+G", {}, "learnable_temperature=True"),
        ("EReg(SM+LN+G)", {}, "entropy_regularizer=True"),
        ("SM+LN+G", dict(final_norm="none"), "final_norm='none'"),
        ("SM+LN+G", dict(tied_head=False), "tied_head=False"),
        ("SM+LN+G", dict(embedding_scale=2.0), "embedding_scale=2.0"),
    ],
)
def test_what_gpt2_cannot_express(tmp_path, name, overrides, field):
    config, variables = random_model(name, **overrides)
    with pytest.raises(UserError) as error:
        to_huggingface(config, variables, tmp_path / "out")
    assert field in str(error.value) and "GPT-2" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_variables_of_another_config(tmp_path):
    config, _ = random_model()
    for other in (random_model(ffn_dim=40)[1], random_model(bias="all")[1], random_model(bias="none")[1]):
        with pytest.raises(UserError, match=r"the variables have .* for blocks/"):
            to_huggingface(config, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(name: str, change):
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


def lose_a_shard(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()


def damage_the_index(directory: Path) -> None:
    shard(directory)
    write_json(directory / "model.safetensors.index.json", {"weight_map": ["model-00001-of-00003.safetensors"]})


def point_outside(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    write_json(directory / "model.safetensors.index.json", {"weight_map": {"wte.weight": "../outside.safetensors"}})


def replace_tensor(name: str, value: np.ndarray | None):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return lambda directory: change_tensors(directory, change)


def config(**changes: object):
    return lambda directory: change_config(directory, **changes)


WEIGHTS, POSITIONS = "model.safetensors", "transformer.wpe.weight"
DAMAGED = f"{WEIGHTS} is damaged"
BROKEN = {
    "no folder": (lambda d: [f.unlink() for f in d.iterdir()] + [d.rmdir()], "is no folder"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json cannot be read: No such file"),
    "cut config": (rewrite("config.json", lambda raw: raw[:30]), "config.json is damaged"),
    "list as config": (lambda d: write_json(d / "config.json", [1]), "config.json is damaged: it holds no JSON object"),
    "binary config": (rewrite("config.json", lambda raw: b"\xff\xfe\x00"), "config.json is damaged"),
    "llama": (config(model_type="llama"), "model_type='llama'; only 'gpt2'"),
    "no type": (config(model_type=None), "model_type=None"),
    "activation": (config(activation_function="silu"), "'silu', which is another function than .*: gelu_new, .*relu$"),
    "another gelu": (config(activation_function="quick_gelu"), "'quick_gelu', which is another function"),
    "activation list": (config(activation_function=["gelu"]), r"activation_function=\['gelu'\]"),
    "unscaled": (config(scale_attn_weights=False), "scale_attn_weights=False; only True"),
    "by layer": (config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True; only"),
    "cross attention": (config(add_cross_attention=True), "add_cross_attention=True"),
    "untied": (config(tie_word_embeddings=False), "tie_word_embeddings=False; only True"),
    "text as size": (config(n_layer="3"), "n_layer='3'"),
    "flag as size": (config(n_layer=True), "n_layer=True"),
    "null as size": (config(n_embd=None), "n_embd=None"),
    "fraction as size": (config(n_inner=1.5), "n_inner=1.5"),
    "negative size": (config(n_layer=-1), "num_layers=-1"),
    "heads": (config(n_head=5), "model_dim=32 is not divisible by num_heads=5"),
    "epsilon": (config(layer_norm_epsilon="tiny"), "layer_norm_epsilon='tiny'"),
    "more layers": (config(n_layer=4), r"lacks the tensor 'h\.3\.ln_1\.weight'"),
    "fewer layers": (config(n_layer=2), r"'h\.2\.attn\.c_attn\.bias', which is no part"),
    "vocabulary": (config(vocab_size=100), r"'wte\.weight' of shape \[101, 32\].*\[100, 32\]"),
    "only pickle": (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), "only as pytorch_model.bin, a pickle"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "lost shard": (lose_a_shard, "model-00002-of-00003.safetensors is missing"),
    "index": (damage_the_index, "model.safetensors.index.json is damaged"),
    "index outside": (point_outside, "outside.safetensors is missing"),
    "empty file": (rewrite(WEIGHTS, lambda raw: b""), DAMAGED),
    "cut header": (rewrite(WEIGHTS, lambda raw: raw[:100]), DAMAGED),
    "cut data": (rewrite(WEIGHTS, lambda raw: raw[:-4]), DAMAGED),
    "header length": (rewrite(WEIGHTS, lambda raw: b"\xff" * 8 + raw[8:]), DAMAGED),
    "header bytes": (rewrite(WEIGHTS, lambda raw: raw[:20] + b"\xff" + raw[21:]), DAMAGED),
    "not safetensors": (rewrite(WEIGHTS, lambda raw: b"PK\x03\x04" * 99), DAMAGED),
    "missing": (replace_tensor("transformer.ln_f.weight", None), r"lacks the tensor 'ln_f\.weight'"),
    "extra": (replace_tensor("score.weight", np.zeros(3, np.float32)), r"'score\.weight', which is no part"),
    "own head": (replace_tensor("lm_head.weight", np.zeros((101, 32), np.float32)), "'lm_head.weight' of its own"),
    "shape": (replace_tensor(POSITIONS, np.zeros(512, np.float32)), r"'wpe\.weight' of shape \[512\].*\[16, 32\]"),
    "integers": (replace_tensor(POSITIONS, np.zeros((16, 32), np.int8)), "wpe.weight' as I8"),
    "float64": (replace_tensor(POSITIONS, np.zeros((16, 32))), "wpe.weight' as F64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, name):
    directory = tmp_path / "model"
    write_golden(directory, "gelu")
    break_it, message = BROKEN[name]
    break_it(directory)
    with pytest.raises(UserError, match=message) as error:
        from_huggingface(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def hugging_face_logits(model, tokens: np.ndarray) -> np.ndarray:
    return model.eval()(pytest.importorskip("torch").tensor(tokens)).logits.detach().numpy()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_transformers_reads_ours(tmp_path, transformers, activation):
    config, variables = random_model(activation=activation, ffn_dim=40, norm_epsilon=1e-3)
    to_huggingface(config, variables, tmp_path, end_of_text=7)
    model, problems = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is transformers.GPT2LMHeadModel and not any(problems.values())
    assert model.config.eos_token_id == 7
    tokens = np.random.default_rng(1).integers(0, 101, (2, 16))
    logits, _ = forward(config, variables, tokens)
    np.testing.assert_allclose(hugging_face_logits(model, tokens), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("form", ["whole", "sharded", "without head"])
def test_ours_reads_transformers(tmp_path, transformers, activation, form):
    size = dict(vocab_size=101, n_positions=16, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**size, activation_function=activation, initializer_range=0.3)
    )
    saved = model.transformer if form == "without head" else model
    saved.save_pretrained(tmp_path, max_shard_size="40KB" if form == "sharded" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "sharded")
    config, variables = from_huggingface(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 101, (2, 16))
    logits, _ = forward(config, variables, tokens)
    np.testing.assert_allclose(logits, hugging_face_logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_nothing_that_is_read_is_executed():
    """No pickle, no evaluation of text, no code that comes with a model; a config file is the user's own program."""
    for path in sorted((REPOSITORY / "jax_entropy").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    found = {alias.name.split(".")[0] for alias in names}
                case ast.ImportFrom(module=module) if module:
                    found = {module.split(".")[0]}
                case ast.Call(func=ast.Name(id=name)):
                    found = {name}
                case ast.keyword(arg=name) if name:
                    found = {name}
                case _:
                    continue
            forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "exec", "eval", "compile",
                         "trust_remote_code", "allow_pickle"}  # fmt: skip
            assert not found & forbidden, (path, node.lineno)
