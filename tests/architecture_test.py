"""The paper's notation: read, printed back to the letter, and refused with the piece that is wrong."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.errors import UserError
from jax_entropy.notation import PARTS, TARGETS
from tests.tiny_model import ARCHITECTURES

PLAIN = (
    *(name for name in ARCHITECTURES if not name.startswith("EReg(") and "^" not in name),
    "SM+FN+G", "SM+DyT+SReparam(QKV+FFN)+BiFFN", "PSM(4)+ScFuFFN+QKN", "SM(t)+LN+RoPE+Cap(30)",
)  # fmt: skip
NOTATIONS = (*PLAIN, *(f"EReg({name})" for name in PLAIN), *(f"{name}^6" for name in PLAIN))
NOTATIONS += (
    *(name for name in ARCHITECTURES if name not in NOTATIONS),
    "EReg(SM(t)+ScFuFFN^6)", "SM(t)", "SM(t)+LN+G", "SM+LN+LR(layer)+SNorm(QKV+FFN)+ScFFN^12", "SM+RN+LR(-0.25)",
    "EReg(SM(t)+RN+R+WNorm(QKVO+FFN)+ScFFN^1)", "SM+LR(1e-07)", "SM+LR(0.0)", "SM+WNorm(QK+FFN)+ScFuFFN",
    *(f"SM+ScFuFFN+{part}" for part in PARTS), "EReg(SM(t)+ScFuFFN+Conv4+RoPE+VRes)", "SM+LN+G+Conv12+VRes^3",
)  # fmt: skip


@pytest.mark.parametrize("name", NOTATIONS)
def test_a_notation_is_printed_back_to_the_letter(name):
    config = architecture(name)
    assert str(config) == name
    assert architecture(str(config)) == config


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("SM+LN+G", dict(norm="layer", activation="gelu", ffn="full", scaled=False)),
        ("SM+LN+R", dict(norm="layer", activation="relu")),
        ("SM+LN", dict(norm="layer", activation="identity")),
        ("SM+RN+G", dict(norm="rms", activation="gelu")),
        ("SM+G", dict(norm="none", activation="gelu")),
        ("SM", dict(norm="none", activation="identity", ffn="full", learnable_temperature=False)),
        ("SM+LR(0.1)", dict(activation="leaky_relu", slope="fixed", negative_slope=0.1)),
        ("SM+LR(layer)", dict(activation="leaky_relu", slope="layer", negative_slope=0.01)),
        ("SM+LR(global)", dict(activation="leaky_relu", slope="global")),
        ("SM+WNorm(QKV+FFN)", dict(reparametrization="weight", reparametrized="QKV+FFN")),
        ("SM+SNorm(QK)", dict(reparametrization="spectral", reparametrized="QK")),
        ("SM+ScFFN", dict(ffn="full", scaled=True, hidden_dim=3072)),
        ("SM+ScFuFFN", dict(ffn="fused", scaled=True, hidden_dim=768, entropy_regularizer=False)),
        ("SM(t)+ScFuFFN", dict(ffn="fused", learnable_temperature=True)),
        ("EReg(SM(t)+ScFuFFN^6)", dict(entropy_regularizer=True, ffn_free_layers=6, ffn="fused")),
        ("SM+Conv4+RoPE+VRes", dict(conv_width=4, rotary=True, value_residual=True, learned_positions=True)),
    ],
)  # fmt: skip
def test_a_notation_means_its_row_of_the_paper(name, fields):
    config = architecture(name)
    assert {field: getattr(config, field) for field in fields} == fields


def test_the_defaults_are_the_papers_baseline():
    assert architecture("SM+LN+G") == ModelConfig()
    assert str(ModelConfig()) == "SM+LN+G"
    assert (ModelConfig().head_dim, ModelConfig().hidden_dim) == (64, 3072)


def test_overrides_win_over_the_notation():
    config = architecture("SM+LN+G", num_layers=2, norm="rms", ffn_dim=100)
    assert (config.num_layers, config.hidden_dim, str(config)) == (2, 100, "SM+RN+G")


@st.composite
def written_fields(draw):
    """Any combination of fields that the notation writes."""
    ffn, power = draw(st.sampled_from(["full", "fused", "bilinear"])), draw(st.sampled_from([0, 2, 6]))
    activations = ["identity", "gelu", "relu", "leaky_relu"] if ffn == "full" else ["identity"]
    fields = dict(
        ffn=ffn,
        scaled=ffn == "fused" or (ffn == "full" and draw(st.booleans())),
        activation=draw(st.sampled_from(activations)),
        norm=draw(st.sampled_from(["none", "layer", "rms", "frozen", "tanh"])),
        power=power,
        learnable_temperature=not power and draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        logit_cap=0 if power else draw(st.sampled_from([0, 30])),
        entropy_regularizer=draw(st.booleans()),
        ffn_free_layers=draw(st.integers(0, 12)),
        reparametrization=draw(st.sampled_from(["none", "weight", "spectral", "sigma"])),
    )
    fields |= dict(conv_width=draw(st.sampled_from([0, 2, 4])), rotary=draw(st.booleans()))
    fields |= dict(value_residual=draw(st.booleans()), value_embedding=draw(st.booleans()))
    fields |= dict(num_slots=draw(st.sampled_from([0, 8])), log_scale=not power and draw(st.booleans()))
    pattern = draw(st.sampled_from(["", "S", "SSSL", "LS"]))
    fields |= dict(window_pattern=pattern, window=draw(st.integers(1, 127)) if pattern else 0)
    if fields["reparametrization"] != "none":
        fields["reparametrized"] = draw(st.sampled_from(TARGETS))
    if fields["activation"] == "leaky_relu":
        fields["slope"] = draw(st.sampled_from(["fixed", "layer", "global"]))
        if fields["slope"] == "fixed":
            fields["negative_slope"] = draw(st.floats(allow_nan=False, allow_infinity=False))
    return fields


@settings(deadline=None)
@given(written_fields())
def test_any_combination_survives_printing_and_reading(fields):
    config = ModelConfig(**fields)
    again = architecture(str(config))
    assert again == config
    assert str(again) == str(config)


NONSENSE = {
    "": "''", " ": "' '", "SM+": "''", "+SM": "''", "GELU": "GELU", "EReg(SM": "EReg(", "SM+WNorm(XX)": "WNorm(XX)",
    "SM+LN+G+R": "'R'", "SM^13": "^13", "EReg(SM(t)+ScFuFFN^99)": "^99",
    "sm": "'sm'", "SM+ln": "'ln'", "SM+LN+GELU": "GELU", "SM++G": "''", "SM+LN+LN+G": "'LN' cannot follow 'LN'",
    "SM+G+LN": "'LN' cannot follow 'G'", "SM+ScFFN+ScFuFFN": "'ScFuFFN' cannot follow 'ScFFN'", "SM+ScFuFN": "ScFuFN",
    "SM+LN+SNorm(QK)+WNorm(QK)": "WNorm(QK)", "SM+WNorm()": "WNorm()", "SM+WNorm": "WNorm", "SM+WNorm(QK": "WNorm(QK",
    "SM+SNorm(FFN+QK)": "SNorm(FFN+QK)", "SM+SNorm(qk)": "SNorm(qk)", "SM+LR()": "LR()", "SM+LR(lay)": "LR(lay)",
    "SM+LR(nan)": "LR(nan)", "SM+LR(inf)": "LR(inf)", "SM+G+ScFuFFN": "gelu", "SM(x)+ScFuFFN": "SM(x)",
    "SM+SM": "'SM'", "SM+SM(t)": "'SM(t)'", "LN+G": "'LN'", "SM^": "'^'", "SM^-1": "^-1", "SM^1.5": "^1.5",
    "SM^6^7": "^6^7", "SM^" + "9" * 5000: "9" * 5000, "EReg(SM))": "EReg(", "EReg(SM)^6": "EReg(", "EReg()": "''",
    "EReg(EReg(SM))": "EReg(SM)", "EReg": "EReg", "EReg(SM^x)": "^x", "SM+LN ": "'LN '", "SM+G\n": r"'G\n'",
    "ereg(SM)": "ereg(SM)", "SM+LR(0.1)+LR(0.1)": "LR(0.1)", "SM+G)": "G)",
    "SM+Conv4+Conv4": "'Conv4' cannot follow 'Conv4'", "SM+Conv3+RoPE+Conv4": "'Conv4' cannot follow 'RoPE'",
    "SM+RoPE+ScFuFFN": "'ScFuFFN' cannot follow 'RoPE'", "SM+Conv": "'Conv'", "SM+Conv0": "'Conv0'", "SM+rope": "rope",
    "SM+Mem": "'Mem'", "SM+Mem0": "'Mem0'", "SM+Win(SSSL)": "Win(SSSL)", "SM+Win(SSSL,)": "Win(SSSL,)",
    "SM(logs)": "SM(logs)", "SM+Win(SL,4)+Win(SL,4)": "'Win(SL,4)' cannot follow 'Win(SL,4)'",
    "SM+Conv-4": "'Conv-4'", "SM+Conv4.0": "'Conv4.0'", "SM+RoPE(2)": "RoPE(2)",
}  # fmt: skip


def offered(message: str) -> str | None:
    """The spelling that an error message proposes."""
    found = re.search(r"; (?:did you mean|choose one of) '(.*?)'(?:\?|, .*)$", message)
    return found[1] if found else None


def is_valid(spelling: str) -> bool:
    """Whether it can be written: a whole architecture, or a piece of one."""
    for name in (spelling, f"SM+{spelling}"):
        try:
            return architecture(name) is not None
        except UserError:
            continue
    return False


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_answered_with_the_bad_piece_and_a_valid_spelling(name):
    with pytest.raises(ValueError) as caught:
        architecture(name)
    message = str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in message
    assert NONSENSE[name] in message
    spelling = offered(message)
    if spelling is None:  # the model, not the spelling, is impossible
        assert "use ScFFN" in message or "the largest is ^12" in message
    else:
        assert is_valid(spelling) and spelling != name


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("EReg(SM", "EReg(SM)"), ("SM+ScFuFN", "ScFuFFN"), ("SM+WNorm(QKFFN)", "WNorm(QK+FFN)"),
        ("SM+LR(lay)", "LR(layer)"), ("PSM(0)", "PSM(4)"),
        ("sm", "SM"), ("SM(T)+ScFuFFN", "SM(t)"), ("SM+LN+G+R", "SM+LN+G"), ("SM+SNorm(QKVOFFN)", "SNorm(QKVO+FFN)"),
        ("EReg(SM(t)+ScFuFFN", "EReg(SM(t)+ScFuFFN)"), ("ereg(SM)", "EReg(SM)"),
    ],
)  # fmt: skip
def test_the_spelling_offered_is_the_nearest(name, spelling):
    with pytest.raises(UserError) as caught:
        architecture(name)
    assert offered(str(caught.value)) == spelling


@settings(deadline=None)
@given(st.one_of(st.text(), st.text("SM(t)+LNRGWorm QKVOFcu^0169.eg", max_size=30)))
def test_arbitrary_text_is_read_or_refused(name):
    try:
        config = architecture(name)
    except UserError as error:
        assert (spelling := offered(str(error))) is None or is_valid(spelling)
    else:
        assert architecture(str(config)) == config


@settings(deadline=None)
@given(st.sampled_from(NOTATIONS), st.data())
def test_a_damaged_notation_is_read_or_refused(name, data):
    position = data.draw(st.integers(0, len(name)))
    cut = data.draw(st.integers(0, 3))
    test_arbitrary_text_is_read_or_refused.hypothesis.inner_test(
        name[:position] + data.draw(st.text("SM(t)+LNG^6", max_size=2)) + name[position + cut :]
    )


@pytest.mark.parametrize("name", [None, 3, ("SM",), b"SM"])
def test_what_is_no_text_is_refused(name):
    with pytest.raises(UserError, match="is not understood; choose one of"):
        architecture(name)


FIELDS = {
    "num_layers": (0, -1, 2.0, "12"), "num_heads": (0,), "model_dim": (0,), "context_length": (0,), "vocab_size": (0,),
    "scan_unroll": (-1, 1.5), "ffn_dim": (0, -4, 1.5), "norm": ("layers", None), "final_norm": ("LN",),
    "activation": ("swish",),
    "slope": ("head",), "ffn": ("fusd",), "reparametrized": ("QQ", "QK"), "reparametrization": ("weight", "wieght"),
    "temperature_parameter": ("exp",), "bias": (True,), "dtype": ("float16",),
    "temperature_init": (0.0, -1.0, float("nan")),
    "alpha_init": (0.0,), "init_std": (0.0,), "residual_init_std": (0.0, -1.0), "norm_epsilon": (0.0,),
    "conv_width": (1, -4, 4.0), "rotary_base": (0.0,), "num_slots": (-1, 2.5), "window": (-2, 8),
    "window_pattern": ("SL",), "value_embedding_layers": ("first",),
    "embedding_dropout": (1.0, -0.1, float("nan")), "ffn_free_layers": (-1, 13), "negative_slope": (float("inf"),),
    "beta_init": (float("nan"),), "embedding_scale": (float("inf"),),
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_a_field_that_cannot_work_is_named_with_its_value(field, value):
    with pytest.raises(UserError) as caught:
        ModelConfig(**{field: value})
    message = str(caught.value)
    assert str(value) in message and "\n" not in message
    # these as the notation spells them
    assert field in message or field in ("ffn_free_layers", "window", "window_pattern")


def test_an_unknown_field_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="no field 'num_layer'; did you mean 'num_layers'"):
        architecture("SM", num_layer=2)


def test_heads_that_do_not_divide_the_width_are_answered_with_a_number_that_does():
    with pytest.raises(UserError, match="model_dim=768 .* num_heads=10; .* is 8$"):
        ModelConfig(num_heads=10)
    with pytest.raises(UserError, match="is 5$"):
        ModelConfig(num_heads=7, model_dim=25)


def test_a_fused_feed_forward_without_scales_has_no_spelling():
    with pytest.raises(UserError, match="no fused feed-forward without scales; take ScFuFFN"):
        architecture("SM+ScFuFFN", scaled=False)


def test_a_fused_feed_forward_is_square():
    with pytest.raises(UserError, match="ffn_dim=100 must be 768"):
        architecture("SM+ScFuFFN", ffn_dim=100)
    assert architecture("SM+ScFuFFN", ffn_dim=768).hidden_dim == 768


@pytest.mark.parametrize(("name", "message"), [
    ("PSM(3)", r"the power of PSM\(3\) must be even"), ("PSM(18)", "from 2 to 16"),
    ("PSM(2)+Cap(30)", "PSM.2. has none"),
    ("SM+G+BiFFN", "in the place of activation='gelu'"),
])  # fmt: skip
def test_what_cannot_go_together_is_a_sentence(name, message):
    with pytest.raises(UserError, match=message):
        architecture(name)


def test_a_config_is_frozen_and_hashable():
    config = architecture("EReg(SM(t)+ScFuFFN)")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3
    assert len({config, architecture("EReg(SM(t)+ScFuFFN)"), architecture("SM")}) == 2


def test_parts_may_come_in_any_order_and_are_printed_in_one():
    assert (
        str(architecture("SM+ScFuFFN+Win(SL,9)+VRes+RoPE+Mem4+Conv4^2"))
        == "SM+ScFuFFN+Conv4+RoPE+VRes+Mem4+Win(SL,9)^2"
    )


@pytest.mark.parametrize(("name", "message"), [
    ("SM+Win(SXL,32)", r"Win\(SXL,32\) is no pattern"), ("SM+Win(ssl,32)", "is no pattern"),
    ("SM+Win(LL,32)", "no layer"), (f"SM+Win({'L' * 12}S,32)", "no layer .* the first 12 of the pattern"),
    ("SM+Win(,32)", "is no pattern"), ("SM+Win(S,128)", "window=128 must be below context_length=128"),
    ("SM+Conv1", r"Conv1 \(conv_width=1\) sees no other position"), ("SM+Conv129", "the widest convolution is Conv128"),
])  # fmt: skip
def test_a_part_that_does_nothing_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        architecture(name)


def test_a_rotation_needs_pairs_of_features():
    with pytest.raises(UserError, match="model_dim=15 / num_heads=3 have 5; the width of a head must be even"):
        architecture("SM+RoPE", model_dim=15, num_heads=3)
