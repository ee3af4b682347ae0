"""The census against Tables 3, 4, 7 and 8 of the paper, row by row, and against the matrices that a model has."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jax_entropy.architecture import CHOICES, architecture
from jax_entropy.census import ACTIVATIONS, GROUPS, KINDS, NORMS, PRODUCTS, census
from jax_entropy.commands.census import print_census, print_costs
from jax_entropy.commands.main import main
from jax_entropy.config import default_config
from jax_entropy.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary
from jax_entropy.model import Transformer
from jax_entropy.notation import EXAMPLES

# Table: layers, context, and as printed there FLOPs in billions of the full FFN, of the fused one, and of attention.
TABLES = {
    "Table 3": (12, 128, 14.5, 1.8, 7.7),
    "Table 7": (12, 256, 29.0, 3.6, 16.3),
    "Table 4": (12, 512, 58.0, 7.2, 36.2),  # printed 7.3, an eighth of the rounded 58.0; it is 7.248
    "Table 8": (18, 128, 21.7, 2.7, 11.6),
}
# Architecture: nonlinear operations as the tables print them, with L layers and context T.
ROWS = {
    "SM+LN+G": {"softmax": "{S}×R^{{{T}×{T}}}", "LayerNorm": "{L2}×R^{{{T}×768}}", "GELU": "{L}×R^{{{T}×3072}}"},
    "SM+LN+R": {"softmax": "{S}×R^{{{T}×{T}}}", "LayerNorm": "{L2}×R^{{{T}×768}}", "ReLU": "{L}×R^{{{T}×3072}}"},
    "SM+ScFuFFN": {"softmax": "{S}×R^{{{T}×{T}}}"},
    "EReg(SM(t)+ScFuFFN)": {"softmax": "{S}×R^{{{T}×{T}}}"},
}


def operations(counted) -> dict[str, str]:
    return {operation.name: str(operation) for operation in counted.operations}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("table", TABLES)
def test_rows_of_the_tables(table, row):
    L, T, full, fused, attention = TABLES[table]
    counted = census(architecture(row, num_layers=L, context_length=T))
    assert round(counted.ffn_flops / 1e9, 1) == (fused if "ScFuFFN" in row else full)
    assert round(counted.attention_flops / 1e9, 1) == attention
    assert operations(counted) == {name: form.format(S=12 * L, L=L, L2=2 * L, T=T) for name, form in ROWS[row].items()}
    assert [str(operation) for operation in counted.final_operations] == [f"1×R^{{{T}×768}}"]


def test_table_3_literally():
    baseline, ours = census(architecture("SM+LN+G")), census(architecture("EReg(SM(t)+ScFuFFN)"))
    assert list(operations(baseline).values()) == ["144×R^{128×128}", "24×R^{128×768}", "12×R^{128×3072}"]
    assert list(operations(ours).values()) == ["144×R^{128×128}"]
    assert [operation.elements for operation in baseline.operations] == [2359296, 2359296, 4718592]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("SM", {}),
        ("SM+LN", {"LayerNorm": "24×R^{128×768}"}),
        ("SM+G", {"GELU": "12×R^{128×3072}"}),
        ("SM+R", {"ReLU": "12×R^{128×3072}"}),
        ("SM+RN+G", {"RMSNorm": "24×R^{128×768}", "GELU": "12×R^{128×3072}"}),
        ("SM+LR(layer)", {"leaky ReLU": "12×R^{128×3072}"}),
        ("SM+WNorm(QKVO+FFN)", {}),
        ("SM+SNorm(QK)", {}),
        ("SM+ScFFN", {}),
        ("SM(t)+ScFuFFN", {}),
        ("EReg(SM+LN+G^6)", {"LayerNorm": "18×R^{128×768}", "GELU": "6×R^{128×3072}"}),
        ("SM+LN+G^12", {"LayerNorm": "12×R^{128×768}"}),
        ("SM+FN+SReparam(QK)", {}),
        ("SM+DyT+BiFFN^2", {"DyT": "22×R^{128×768}", "bilinear product": "10×R^{128×1536}"}),
        ("SM+QKN+Cap(30)", {"soft cap": "144×R^{128×128}", "QK-norm": "288×R^{128×64}"}),
    ],
)
def test_other_architectures(name, expected):
    assert operations(census(architecture(name))) == {"softmax": "144×R^{128×128}", **expected}


def test_what_the_tables_leave_out():
    config = dict(activation="gelu_tanh", ffn_dim=1000, final_norm="rms")
    counted = census(architecture("SM+LN+G^3", **config))
    assert counted.ffn_flops == 4 * 128 * 768 * 1000 * 9
    assert operations(counted)["GELU (tanh)"] == "9×R^{128×1000}"
    assert [(operation.name, operation.count) for operation in counted.final_operations] == [("RMSNorm", 1)]
    assert census(architecture("SM+LN+G", final_norm="none")).final_operations == ()
    windowed = census(architecture("SM+Cap(30)+Mem8+Win(SSSL,32)")).operations  # the cap is of what the softmax sees
    capped, normalised = ([str(o) for o in windowed if o.name == name] for name in ("soft cap", "softmax"))
    assert capped == normalised == ["36×R^{128×136}", "108×R^{128×40}"]
    assert census(architecture("SM+ScFuFFN^12")).ffn_flops == 0


def test_parameters():
    L, D, T, V = 12, 768, 128, 50257
    block, embeddings = 12 * D * D + 2 * D, V * D + T * D + 2 * D
    assert census(architecture("SM")).parameters == L * block + embeddings
    assert census(architecture("SM+LN+G", bias="all", context_length=1024)).parameters == 124_439_808  # GPT-2 small
    ours = L * (5 * D * D + 2 * D + 2 + 12 * T + 12) + embeddings
    assert census(architecture("EReg(SM(t)+ScFuFFN)")).parameters == ours


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_matrix_of_the_model_is_counted(name):
    T, D = 32, 24
    config = architecture(name, num_layers=6, num_heads=4, model_dim=D, context_length=T, vocab_size=61)
    counted = census(config)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    kernels = sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]) if path[-1].key == "kernel"
    )
    scores = 6 * 3 * T * T * D
    assert counted.ffn_flops + counted.attention_flops == 2 * T * kernels + scores


@pytest.mark.parametrize("width", [80, 200])
def test_print(width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_census(census(architecture("SM+LN+G")), console)
    text = console.file.getvalue()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "FFN 14.5 B",
        "attention 7.7 B",
        "softmax 144×R^{128×128} 2,359,296",
        "GELU 12×R^{128×3072} 4,718,592",
    ):
        assert line in lines
    assert "LayerNorm, final 1×R^{128×768} 98,304" in lines
    assert "SM+LN+G" in text and "parameters" in text


def test_the_whole_forward_pass_is_the_blocks_and_the_vocabulary():
    config = architecture("SM+LN+G", num_layers=2, num_heads=4, model_dim=256, context_length=128, vocab_size=1024)
    counted = census(config)
    assert counted.blocks_flops == counted.ffn_flops + counted.attention_flops
    assert counted.forward_flops - counted.blocks_flops == 2 * 128 * 256 * 1024


@pytest.mark.parametrize(("config", "said"), [
    (architecture("SM+LN+G"), ["semi2k, plain export", "semi2k, optimised", "system 25.32 GB and 8.05 minutes"]),
    (architecture("SM", num_heads=1, model_dim=32), ["semi2k, plain export", "semi2k, optimised"]),
])  # fmt: skip
def test_private_costs_are_beside_it(config, said):
    file = io.StringIO()
    print_costs(config, Console(file=file, width=100))
    assert all(words in " ".join(file.getvalue().split()) for words in said), file.getvalue()


def test_the_table_of_kinds_has_every_nonlinearity_of_the_notation_once():
    """What a value of the notation is called stands in this table only; everything else asks it."""
    names = [kind.name for kind in KINDS]
    assert len({*names}) == len(names) and {kind.group for kind in KINDS} == {*GROUPS}
    assert {"none", *NORMS} == {*CHOICES["norm"]} == {*CHOICES["final_norm"]}
    assert {"identity", *ACTIVATIONS} == {*CHOICES["activation"]}
    assert {"full", "fused", *PRODUCTS} == {*CHOICES["ffn"]}


def test_the_vocabulary_is_that_of_the_tokenizer_that_a_config_names(tmp_path, capsys):
    train_tokenizer(["def f(x): return x\n" * 4], 270).save(tmp_path / "tokenizer.json")
    entries = load_tokenizer(tmp_path / "tokenizer.json").vocab_size
    config, small = default_config("SM"), dict(num_layers=1, num_heads=1, model_dim=8, context_length=16)
    assert vocabulary(config) == 4096
    config.data.tokenizer = str(tmp_path / "tokenizer.json")
    assert vocabulary(config) == entries < 4096
    flags = [f"--config.model.{name}={value}" for name, value in small.items()]
    flags.append(f"--config.data.tokenizer={tmp_path}/tokenizer.json")
    assert main(["census", "--config=quickstart:SM", *flags]) == 0
    own = census(architecture("SM", **small, vocab_size=entries))
    assert f"{own.parameters:,} parameters" in capsys.readouterr().out
