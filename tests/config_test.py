"""Configs: to text and back, and what cannot work is named before anything expensive happens."""

import json

import pytest

from jax_entropy.architecture import ModelConfig
from jax_entropy.config import (
    check,
    default_config,
    flatten,
    from_json,
    model_config,
    to_json,
)
from jax_entropy.config_file import change
from jax_entropy.errors import UserError
from jax_entropy.notation import PLACES
from tests import REPOSITORY
from tests.tiny_config import get_config

ARCHITECTURE = "EReg(SM(t)+ScFuFFN)"


def with_fields(**fields):
    config = default_config(ARCHITECTURE)
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "model.ffn_dim": 768,
            "model.vocab_size": 4096,
            "model.residual_init_std": 0.01,
            "model.tanh_gelu": True,
        },
        {"optimizer.learning_rate": 1, "penalty.weight": 0, "mesh.rules": ((r"kernel$", ("fsdp", None)), (r".*", ()))},
        {"mesh.rules": ((r"x$", (("data", "fsdp"), None)),), "data.files": 'a\n"b" é ∑'},
    ],
)
def test_a_config_survives_being_text(fields):
    config = with_fields(**fields)
    again = from_json(to_json(config))
    assert flatten(again) == flatten(config)
    assert to_json(again) == to_json(config)
    assert {name: type(value) for name, value in flatten(again).items()} == {
        name: type(value) for name, value in flatten(config).items()
    }
    hash(again.mesh.rules)


def test_a_config_read_back_knows_its_types_and_unset_fields():
    config = from_json(to_json(default_config(ARCHITECTURE)))
    assert config.model.ffn_dim is None
    config.model.ffn_dim = 12
    config.model.residual_init_std = 1
    with pytest.raises(TypeError):
        config.model.ffn_dim = "wide"
    with pytest.raises(TypeError):
        config.train.num_steps = 1.5


def test_an_older_config_takes_new_fields_from_the_defaults():
    stored = json.loads(to_json(with_fields(**{"train.num_steps": 7})))
    del stored["penalty"]["shape"], stored["data"]["prefetch"]
    config = from_json(json.dumps(stored))
    assert (config.penalty.shape, config.data.prefetch, config.train.num_steps) == ("deadzone", 16, 7)
    check(config)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "5", "null", "{}", '{"architecture": "SM"}', '{"architecture": "SM", "mesh": {"rules": 5}}',
        '{"architecture": "SM", "mesh": {"rules": []}, "train": {"num_steps": "x"}}',
        '{"architecture": "SM", "mesh": {"rules": []}, "train": 5}',
    ],
)  # fmt: skip
def test_text_that_is_no_config_is_damaged(text):
    with pytest.raises(UserError, match="config.json is damaged"):
        from_json(text)


@pytest.mark.parametrize("name", ["quickstart", "codeparrot", "languini"])
@pytest.mark.parametrize("architecture", [ARCHITECTURE, "SM+LN+G", "EReg(SM(t)+ScFuFFN^6)"])
def test_bundled_configs_are_sound(name, architecture):
    namespace = {}
    exec((REPOSITORY / "configs" / f"{name}.py").read_text(), namespace)
    config = namespace["get_config"](architecture)
    check(config)
    assert config.architecture == architecture == str(model_config(config, 4096))
    assert from_json(to_json(config)).to_dict() == config.to_dict()


def test_the_tests_own_config_is_sound():
    check(get_config())
    check(default_config("SM"))
    check(with_fields(**{"penalty.warmup": 1.0, "optimizer.warmup": 200.0, "optimizer.clip_norm": 0.0}))


def test_the_defaults_of_config_and_model_agree():
    config = model_config(default_config("SM+LN+G"), 50257)
    assert config == ModelConfig()


def test_every_field_of_the_model_can_be_set_or_is_written_by_the_notation():
    written = {"ffn_free_layers", "entropy_regularizer"}.union(*(place.fields for place in PLACES))
    elsewhere = {"dtype": "train", "threshold_init": "penalty"}
    config = default_config("SM")
    for name in ModelConfig.__dataclass_fields__.keys() - written:
        assert name in config[elsewhere.get(name, "model")], name


def test_a_models_fields_come_from_three_places():
    fields = {"train.dtype": "bfloat16", "penalty.threshold_init": 0.3, "model.num_layers": 4, "model.ffn_dim": 768}
    config = model_config(with_fields(**fields), 512)
    assert (config.dtype, config.threshold_init, config.num_layers, config.ffn_dim, config.vocab_size) == (
        "bfloat16", 0.3, 4, 768, 512,
    )  # fmt: skip
    assert str(config) == ARCHITECTURE


def test_a_vocabulary_must_be_the_tokenizers():
    assert model_config(with_fields(**{"model.vocab_size": 512}), 512).vocab_size == 512
    assert model_config(with_fields(**{"model.vocab_size": 640}), 512).vocab_size == 640  # padded
    with pytest.raises(UserError, match="config.model.vocab_size=500 is less than the tokenizer's 512 entries"):
        model_config(with_fields(**{"model.vocab_size": 500}), 512)


# FIELD=VALUE, of each of which a sentence names both; and what it proposes, where that is asked for
WRONG = """
seed=x seed=-1 seed=18446744073709551616
guard.window=2147483648 train.num_steps=3000000000 optimizer.learning_rate=1e+39
model.num_layers=0 model.num_layers=-2 model.num_heads=0 model.num_heads=3 model.num_heads=7 model.model_dim=0
model.model_dim=33 model.ffn_dim=0 model.ffn_dim=100 model.context_length=0 model.context_length=-5 model.vocab_size=0
model.tanh_gelu=3 model.temperature_init=0.0 model.temperature_init=-1.0
model.temperature_init=nan model.temperature_parameter=exp model.final_norm=batch model.final_norm=layers:layer
model.final_norm=LN model.bias=some model.tied_head=maybe model.embedding_dropout=1.0 model.embedding_dropout=-0.1
model.init_std=-0.1 model.init_std=nan model.residual_init_std=-1.0 model.norm_epsilon=-1e-05 model.scan_unroll=-1
model.remat=yes model.remat=atention:attention
data.source= data.source=stdlib:files data.source=stdlibb:stdlib data.source=wiki data.vocab_size=0 data.vocab_size=10
data.validation_fraction=0.0 data.validation_fraction=1.0 data.validation_fraction=-0.5 data.validation_fraction=nan
data.max_documents=-1 data.num_threads=0 data.prefetch=0
train.num_steps=1.5 train.num_steps=many train.num_steps=0 train.num_steps=-1 train.batch_size=0 train.dtype=fp8
train.dtype=float16:bfloat16 train.dtype=fp32 train.log_every=0 train.evaluate_every=-1 train.evaluate_every=0
train.evaluate_chunks=-1 train.checkpoint_every=0 train.checkpoint_every=-1 train.keep=0 train.wandb=perhaps
optimizer.learning_rate=0.0 optimizer.learning_rate=-1.0 optimizer.learning_rate=-0.001 optimizer.learning_rate=nan
optimizer.learning_rate=inf optimizer.end_learning_rate=-1.0 optimizer.end_learning_rate=-1e-09 optimizer.schedule=
optimizer.schedule=lineer:linear optimizer.warmup=-0.5 optimizer.warmup=nan optimizer.beta1=1.0 optimizer.beta1=-0.1
optimizer.beta1=1.5 optimizer.beta2=1.0 optimizer.beta2=-0.1 optimizer.beta2=nan optimizer.epsilon=-1e-08
optimizer.weight_decay=-0.1 optimizer.clip_norm=-1.0 optimizer.clip_norm=nan optimizer.accumulate=0
optimizer.moments=float16:bfloat16
penalty.weight=-1.0 penalty.weight=nan penalty.warmup=-0.5 penalty.warmup=2.0 penalty.tolerance=-0.2
penalty.reduction=sum penalty.reduction=row_summ:row_sum penalty.shape=square penalty.shape=dead
penalty.threshold_init=nan
guard.limit=-1 guard.zscore=-3.0 guard.window=0 guard.learning_rate_factor=0.0 guard.learning_rate_factor=1.5
""".split()


@pytest.mark.parametrize("given", WRONG)
def test_a_value_that_cannot_work_is_named(given):
    name, _, rest = given.partition("=")
    value, _, proposed = rest.partition(":")
    with pytest.raises(UserError) as caught:
        check(change(get_config(), {name: value}))
    message = str(caught.value)
    assert name.split(".")[-1] in message and value in message and proposed in message, message
    assert "\n" not in message and ". " not in message, "one sentence"


@pytest.mark.parametrize(("rules", "said"), [
    ("3", "must be a tuple of"), ("(('x',", "must be a tuple of"),
    ("('x',)", "'x' is no pattern with its axes"), ("((1, ()),)", "no pattern"), ("(('(', ()),)", "no pattern"),
    ("(('x', 'fsdp'),)", "no pattern"), ("(('x', (3,)),)", "an axis 3"),
    ("(('x', ('tensr',)),)", "an axis 'tensr'; .*'tensor'"), ("(('x', ('data', ('fsdp', 'data'))),)", "'data' twice"),
])  # fmt: skip
def test_a_rule_that_no_mesh_can_follow_is_named(rules, said):
    with pytest.raises(UserError, match=rf"config.mesh.rules.*{said}"):
        check(change(get_config(), {"mesh.rules": rules}))


@pytest.mark.parametrize("architecture", ["", "SM+GELU", "EReg(SM(t)+ScFuFFN^13)"])
def test_an_architecture_that_does_not_exist_is_named(architecture):
    with pytest.raises(UserError, match="architecture|\\^13"):
        check(default_config(architecture))


@pytest.mark.parametrize(
    ("section", "field", "nearest"),
    [
        ("train", "num_step", "train.num_steps"),
        ("penalty", "lambda_weight", "penalty.weight"),
        (None, "sed", "seed"),
        ("optimizer", "lr", "optimizer.learning_rate"),
        ("train", "bs", "train.batch_size"),
    ],
)
def test_a_field_that_does_not_exist_is_answered_with_the_nearest(section, field, nearest):
    config = default_config(ARCHITECTURE)
    with (config if section is None else config[section]).unlocked() as open_config:
        open_config[field] = 3
    with pytest.raises(UserError, match=f"{field} is not a field; did you mean '{nearest}'"):
        check(config)


@pytest.mark.parametrize(
    "field", ["train.num_steps", "seed", "model.num_layers", "optimizer.learning_rate", "data.source"]
)
def test_a_field_that_is_missing_or_unset_is_named(field):
    config = with_fields(**{field: None})
    with pytest.raises(UserError, match=f"config.{field}=None must have a value"):
        check(config)
    *sections, name = field.split(".")
    section = config[sections[0]] if sections else config
    del section[name]
    with pytest.raises(UserError, match=f"config.{field} is missing"):
        check(config)


@pytest.mark.parametrize("field", ["model.ffn_dim", "model.vocab_size", "model.residual_init_std"])
def test_a_field_that_may_be_unset_is(field):
    assert flatten(default_config("SM"))[field] is None
    check(with_fields(**{field: None}))
